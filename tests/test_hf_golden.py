"""The golden models: tiny Qwen3 and SmolLM3 with adapters, run by the official implementation."""

import pytest
import torch
from hf_models import GOLDEN, NAMES, error, golden
from transformers import DynamicCache

from deltamem_kernels import hf

TOLERANCE = 1e-4


def segments(model, ids):
    return {"delta_segment_ids": ids} if model._delta_mem.config.writes_segments else {}


def paths(model):
    return {module.delta_mem.path for module in model._delta_mem.attentions.values()}


def test_golden_data_is_there():
    assert len(NAMES) == 6


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_prefill_and_decode(name, attn):
    model, expected = golden(name, attn)
    ids, mask, positions = (expected[x] for x in ("input_ids", "attention_mask", "position_ids"))
    cache = DynamicCache(config=model.config)
    valid = mask[:, :24].bool()

    def step(start, end):
        return model(
            ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end],
            past_key_values=cache, use_cache=True, delta_segment_ids="token",
        ).logits  # fmt: skip

    def state():
        return torch.stack([layer.delta_state for layer in cache.layers])

    logits = step(0, 24)
    assert paths(model) == {"fused"}
    assert error(logits[valid], expected["prefill_logits"][valid]) < TOLERANCE
    assert error(state(), expected["prefill_state"]) < TOLERANCE
    for i in range(6):
        logits = step(24 + i, 25 + i)
        assert error(logits, expected["decode_logits"][:, i : i + 1]) < TOLERANCE
    assert error(state(), expected["decode_state"]) < TOLERANCE


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_write_then_read_with_gradients(name, attn):
    model, expected = golden(name, attn)
    ids, mask, positions = (expected[x] for x in ("input_ids", "attention_mask", "position_ids"))
    state = hf.DeltaMemState.zeros(model, 2)
    valid = mask[:, :24].bool()
    logits = model(
        ids[:, :24], attention_mask=mask[:, :24], position_ids=positions[:, :24], use_cache=False, delta_state=state,
        **segments(model, expected["write_message_ids"]),
    ).logits  # fmt: skip
    assert paths(model) == {"fused"}
    assert error(logits[valid], expected["write_logits"][valid]) < TOLERANCE
    assert error(torch.stack(state.tensors), expected["write_state"]) < TOLERANCE
    written = list(state.tensors)
    logits = model(ids[:, 16:30], use_cache=False, delta_state=state, delta_write=False).logits
    assert error(logits, expected["read_logits"]) < TOLERANCE
    assert all(a is b for a, b in zip(state.tensors, written, strict=True))
    (logits * expected["d_read_logits"]).sum().backward()
    grads = {n.replace(".delta_mem", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert {f"grad.{n}" for n in grads} == {n for n in expected if n.startswith("grad.")}
    for n, grad in grads.items():
        assert error(grad, expected[f"grad.{n}"]) < TOLERANCE, n


@pytest.mark.parametrize("name", NAMES)
def test_detached_model_is_untouched(name):
    model, expected = golden(name, attached=False)
    ids = expected["input_ids"]
    before, weights = model(ids).logits, {n: p.clone() for n, p in model.state_dict().items()}
    trains = [p.requires_grad for p in model.parameters()]
    hf.load_adapter(model, GOLDEN / name)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".delta_mem." not in n)
    hf.detach(model)
    assert torch.equal(model(ids).logits, before)
    assert [p.requires_grad for p in model.parameters()] == trains
    after = model.state_dict()
    assert list(after) == list(weights) and all(torch.equal(after[n], weights[n]) for n in weights)
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.modules())
