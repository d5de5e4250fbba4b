"""torch.compile(fullgraph=True): generate over a static cache, calls of the caller's own, training."""

import pytest
import torch
import transformers
from hf_models import attached, error, random_model
from transformers import CompileConfig, DynamicCache, StaticCache

from deltamem_kernels import hf

transformers.logging.set_verbosity_error()
IDS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model(name="qwen3", layers=1):
    own = {"layer_types": ["sliding_attention", "full_attention"]} if name == "gemma3" else {}
    return attached(model=random_model(name, num_hidden_layers=layers, **own))


def _compile(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_generate_over_a_static_cache(name):
    model = _model(name, layers=2)
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS[:1], **greedy)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": config}
    torch._dynamo.utils.counters.clear()
    assert torch.equal(model.generate(IDS[:1], **greedy, **compiled), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    if name != "qwen3":
        return
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1]], 1)
    out = model.generate(padded, attention_mask=(padded != 0).long(), **greedy, **compiled)
    assert torch.equal(out[:, 3:], expected)


@torch.no_grad()
def test_calls_over_a_prepared_cache():
    model = _model()
    ids = IDS.clone()
    ids[0, :4] = 0
    mask = (ids != 0).long()
    expected = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    compiled = _compile(model)
    with pytest.raises(Exception, match=r"hf\.prepare_cache|Observed exception"):
        compiled(ids, past_key_values=DynamicCache(config=model.config))
    cache = StaticCache(config=model.config, max_cache_len=32)
    hf.prepare_cache(model, cache, 2)
    logits = [
        compiled(ids[:, a:b], past_key_values=cache, attention_mask=mask[:, :b]).logits for a, b in ((0, 10), (10, 20))
    ]
    assert error(torch.cat(logits, 1)[mask.bool()], expected) < 1e-5


def test_training_and_a_callers_state():
    model = _model()
    results = []
    for call in (model, _compile(model)):
        model.zero_grad()
        state = hf.DeltaMemState.zeros(model, 2)
        logits = call(IDS, use_cache=False, delta_state=state).logits
        read = call(IDS[:, :7], use_cache=False, delta_state=state, delta_write=False).logits
        read.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([logits.detach(), read.detach(), *[x.detach() for x in state.tensors], *grads])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert error(ours, theirs) < 1e-6
