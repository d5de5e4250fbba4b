"""Every family through the fused ops, other decoders through the generic path, against δ-mem written out."""

import pytest
import torch
from hf_models import FAMILIES, attached, error, paths
from hf_oracle import Oracle
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from deltamem_kernels import hf

ALL = {"delta_heads": ["q", "k", "v", "o"], "couple_lambda": False, "num_state_heads": 2}


def _masked(B=3, T=13):
    """Ids with no pads, pads at the left, pads at the right."""
    ids = torch.randint(3, 64, (B, T), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, :4] = 0
    mask[2:, 9:] = 0
    return ids, mask


def _flash_like(module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
    """Attention that takes masks as flash attention does: a 2-D one, or none; causal by itself."""
    T, K = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    i, j = torch.arange(T)[:, None] + K - T, torch.arange(K)
    visible = j <= i
    if sliding_window is not None:
        visible &= j > i - sliding_window
    if attention_mask is not None:
        assert attention_mask.ndim == 2
        visible = visible & (attention_mask[:, None, None, -K:] != 0)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("two_d", _flash_like)
AttentionMaskInterface.register("two_d", flash_attention_mask)


@pytest.mark.parametrize("attn", ["eager", "sdpa", "two_d"])
@pytest.mark.parametrize("name", FAMILIES)
def test_family_equals_the_written_out_formula(name, attn):
    model = attached(name, attn_implementation=attn, **ALL)
    ids, mask = _masked()
    state = hf.DeltaMemState([0.3 * torch.randn_like(x) for x in hf.DeltaMemState.zeros(model, 3).tensors])
    oracle = Oracle(model)
    valid = mask.bool()
    with torch.no_grad():
        expected = oracle(ids, valid, [x.clone() for x in state.tensors], attention_mask=mask)
        logits = model(ids, attention_mask=mask, use_cache=False, delta_state=state).logits
    assert paths(model) == ["fused"] * 3
    assert error(logits[valid], expected[valid]) < 1e-5
    for ours, theirs in zip(state.tensors, oracle.states, strict=True):
        assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_decode_equals_the_written_out_formula(name):
    model = attached(name, **ALL)
    ids = _masked(2, 21)[0]
    expected = Oracle(model)(ids)
    cache = DynamicCache(config=model.config)
    logits = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 6), (6, 17), (17, 18))]
    logits += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(18, 21)]
    assert paths(model) == ["fused"] * 3
    assert error(torch.cat(logits, 1), expected) < 1e-5


OPTIONS = [
    {"state_update_mode": "lambda_outside"},
    {"state_update_mode": "lambda_outside", "couple_lambda": False, "rankwise_gates": False, "num_state_heads": 3},
    {"state_update_mode": "no_lambda"},
    {"state_update_mode": "no_lambda", "couple_lambda": False},
    {"rankwise_gates": False},
    {"num_state_heads": 4, "rank": 8, "delta_heads": ["q", "o"]},
    {"delta_heads": ["o"], "delta_o_rmsnorm": True, "delta_o_rmsnorm_eps": 1e-3},
    {"delta_heads": ["k", "v"]},
    {"trainable_delta_scale": True},
    {"trainable_delta_scale": True, "delta_scale_granularity": "head", "delta_scale_max": 3.0},
    {"normalize_qk": False, "rank": 2},
    {"target_layers": [0, 2]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_options_equal_the_written_out_formula(options):
    model = attached(**options)
    ids, mask = _masked()
    valid = mask.bool()
    oracle = Oracle(model)
    with torch.no_grad():
        expected = oracle(ids, valid, attention_mask=mask)
        packed = model(ids, attention_mask=mask, use_cache=False).logits
    trained = model(ids, attention_mask=mask, use_cache=False).logits
    assert error(packed[valid], expected[valid]) < 1e-5
    assert error(trained[valid], packed[valid]) < 1e-6


@pytest.mark.parametrize("granularity", ["message_mean", "sentence_mean"])
@torch.no_grad()
def test_segments_equal_the_written_out_formula(granularity):
    model = attached(memory_write_granularity=granularity, num_state_heads=2)
    ids, mask = _masked()
    valid = mask.bool()
    segments = torch.tensor([[5] * 4 + [-1] * 2 + [900] * 3 + [7] * 4, [0] * 6 + [1] * 7, [3] * 5 + [2] * 5 + [9] * 3])
    oracle = Oracle(model)
    expected = oracle(ids, valid, segments=segments, attention_mask=mask)
    state = hf.DeltaMemState.zeros(model, 3)
    logits = model(ids, attention_mask=mask, use_cache=False, delta_state=state, delta_segment_ids=segments).logits
    assert error(logits[valid], expected[valid]) < 1e-5
    for ours, theirs in zip(state.tensors, oracle.states, strict=True):
        assert error(ours, theirs) < 1e-5
    expected = oracle(ids[:1], states=[x[:1] for x in oracle.states], segments=segments[:1])
    cache = DynamicCache(config=model.config)
    model(ids[:1], past_key_values=cache, delta_segment_ids=segments[:1])
    first = [layer.delta_state.clone() for layer in cache.layers]
    for ours, theirs in zip(first, state.tensors, strict=True):
        assert error(ours, theirs[:1]) < 1e-5
    with pytest.raises(ValueError, match="delta_segment_ids must be a tensor where an adapter writes"):
        model(ids)
    with pytest.raises(ValueError, match=r"delta_segment_ids must have shape \(3, 13\)"):
        model(ids, delta_segment_ids=segments[:, :5])


def _mask_kinds(ids, mask):
    """The same pads as every kind of mask that a caller may hold."""
    B, T = mask.shape
    seen = torch.ones(T, T, dtype=torch.bool).tril() & mask.bool()[:, None, None]  # [B, 1, T, T]
    additive = torch.zeros(B, 1, T, T).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"int": mask, "bool": mask.bool(), "float": mask.float(), "4-D bool": seen, "4-D additive": additive}


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@torch.no_grad()
def test_every_kind_of_mask_says_the_same(attn):
    model = attached("llama", attn_implementation=attn)
    ids, mask = _masked()
    valid = mask.bool()
    expected = Oracle(model)(ids, valid, attention_mask=mask)
    for kind, given in _mask_kinds(ids, mask).items():
        if (attn, kind) == ("eager", "4-D bool"):
            continue  # the stock eager attention adds its mask
        state = hf.DeltaMemState.zeros(model, 3)
        logits = model(ids, attention_mask=given, use_cache=False, delta_state=state).logits
        assert error(logits[valid], expected[valid]) < 1e-5, kind
        assert paths(model) == ["generic: a 4-D attention mask" if "4-D" in kind else "fused"] * 3
        # the second half over a cache of the first
        cache = DynamicCache(config=model.config)
        parts = []
        for a, b in ((0, 6), (6, 13)):
            part = given[:, :, a:b, :b] if given.ndim == 4 else given[:, :b]
            parts.append(model(ids[:, a:b], attention_mask=part, past_key_values=cache).logits)
        assert error(torch.cat(parts, 1)[valid], expected[valid]) < 1e-5, kind
        for layer, x in zip(cache.layers, state.tensors, strict=True):
            assert error(layer.delta_state, x) < 1e-5, kind


# decoders that the fused path does not know; the last hands its layers no keyword arguments
OTHERS = {
    "granite": ("GraniteConfig", {"attention_multiplier": 0.3}),
    "gemma2": ("Gemma2Config", {"sliding_window": 8, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}),
    "olmo2": ("Olmo2Config", {}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "stablelm": ("StableLmConfig", {}),
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_other_decoders_take_the_generic_path(name, monkeypatch, capsys):
    monkeypatch.setitem(FAMILIES, name, OTHERS[name])
    model = attached(name, attn_implementation="eager", delta_heads=["q", "k", "v", "o"])
    ids, mask = _masked()
    valid = mask.bool()
    expected = Oracle(model)(ids, valid, attention_mask=mask)
    assert error(model(ids, attention_mask=mask, use_cache=False).logits[valid], expected[valid]) < 1e-5
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits for a, b in ((0, 7), (7, 13))]
    assert error(torch.cat(parts, 1)[valid], expected[valid]) < 1e-5
    attention = type(next(iter(model._delta_mem.attentions.values()))).__name__
    assert paths(model) == [f"generic: {attention} is not a family that the fused path knows"] * 3
    hf.explain(model)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"model.layers.1.self_attn: generic ({attention} is not a family")
    unattached = hf.detach(model)(ids, attention_mask=mask).logits
    assert error(unattached[valid], expected[valid]) > 0.05


def test_generic_path_trains_as_the_fused_one_does():
    grads = {}
    for asked in ("fused", "generic"):
        model = attached(delta_heads=["q", "k", "v", "o"], attn_implementation="eager", delta_o_rmsnorm=True)
        ids, mask = _masked()
        state = hf.DeltaMemState.zeros(model, 3)
        model(ids, attention_mask=mask, use_cache=asked == "generic", delta_state=state)
        logits = model(ids[:, :5], use_cache=asked == "generic", delta_state=state, delta_write=False).logits
        assert all(path.startswith(asked) for path in paths(model))
        logits.square().sum().backward()
        grads[asked] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for n, grad in grads["fused"].items():
        assert error(grads["generic"][n], grad) < 1e-4, n


def test_explain_names_path_heads_and_last_call(capsys):
    model = attached(delta_heads=["q", "k", "o"])
    with torch.no_grad():
        model.model.layers[1].self_attn.delta_mem.delta_k_proj.zero_()
        model(torch.tensor([[3, 4, 5]]), output_attentions=True)
    hf.explain(model)
    assert capsys.readouterr().out.splitlines()[1] == (
        "model.layers.1.self_attn: fused (qwen3); corrects q, o; k all zero, skipped at inference; "
        "last call: generic: attention weights were asked for"
    )
