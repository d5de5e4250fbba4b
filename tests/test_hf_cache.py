"""Memory inside KV caches: it is zero with a fresh one and goes wherever the keys go."""

import copy
import itertools
import pickle

import pytest
import torch
import transformers
from hf_models import FAMILIES, attached, error, paths
from transformers import DynamicCache, StaticCache

from deltamem_kernels import hf
from deltamem_kernels.hf.cache import cache_keyword


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
@torch.no_grad()
def test_any_split_of_a_prompt_is_the_same(name):
    model = attached(name)
    ids = torch.randint(3, 64, (2, 40))
    expected = model(ids, use_cache=False).logits
    whole = DynamicCache(config=model.config)
    model(ids, past_key_values=whole)
    for seed in range(6):
        cuts = torch.randperm(39, generator=torch.Generator().manual_seed(seed))[: 1 + 3 * seed] + 1
        bounds = [0, *cuts.sort().values.tolist(), 40]
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=48)):
            parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise(bounds)]
            assert error(torch.cat(parts, 1), expected) < 1e-5
            for ours, theirs in zip(cache.layers, whole.layers, strict=True):
                assert error(ours.delta_state, theirs.delta_state) < 1e-5


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@torch.no_grad()
def test_both_names_of_the_cache(monkeypatch):
    monkeypatch.setitem(FAMILIES, "granite", ("GraniteConfig", {}))
    model, other = attached(), attached("granite")
    ids = torch.randint(3, 64, (2, 12))
    for m, path in ((model, "fused"), (other, "generic")):
        expected = m(ids, use_cache=False).logits
        for name in {cache_keyword(m.forward), "past_key_values"}:
            cache = DynamicCache(config=m.config)
            parts = [m(x, **{name: cache}).logits for x in ids.split((7, 1, 4), 1)]
            assert error(torch.cat(parts, 1), expected) < 1e-5 and cache.layers[0].delta_state.any()
            assert all(x.startswith(path) for x in paths(m))


def _filled(model, ids, cache=None):
    cache = DynamicCache(config=model.config) if cache is None else cache
    return cache, model(ids, past_key_values=cache).logits


@torch.no_grad()
def test_state_is_reordered_selected_repeated_and_copied_with_the_keys():
    model = attached()
    ids, more = torch.randint(3, 64, (2, 3, 9))
    cache, _ = _filled(model, ids)
    rows = torch.tensor([2, 0, 0, 1])
    moved = copy.deepcopy(cache)
    moved.batch_select_indices(rows)
    expected = model(more[rows], past_key_values=_filled(model, ids[rows])[0]).logits
    assert error(model(more[rows], past_key_values=moved).logits, expected) < 1e-5
    moved = copy.deepcopy(cache)
    moved.batch_repeat_interleave(2)
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    expected = model(more[rows], past_key_values=_filled(model, ids[rows])[0]).logits
    assert error(model(more[rows], past_key_values=moved).logits, expected) < 1e-5
    moved = pickle.loads(pickle.dumps(cache))
    rows = torch.tensor([1, 1, 2])
    moved.reorder_cache(rows)
    expected = model(more, past_key_values=_filled(model, ids[rows])[0]).logits
    assert error(model(more, past_key_values=moved).logits, expected) < 1e-5
    with pytest.raises(ValueError, match="must hold the memory of 2 sequences, got that of 3"):
        model(more[:2], past_key_values=cache)


@pytest.mark.parametrize("options", [{}, {"couple_lambda": False}, {"state_update_mode": "no_lambda"}])
@torch.no_grad()
def test_pads_leave_the_state_to_the_bit(options):
    model = attached(delta_heads=["q"], num_state_heads=2, **options)
    ids, mask = torch.randint(3, 64, (2, 12)), torch.zeros(2, 12, dtype=torch.long)
    mask[1, 5:] = 1
    for dtype in (torch.float32, torch.bfloat16):
        cache = DynamicCache(config=model.config)
        model.to(dtype)(ids, attention_mask=mask, past_key_values=cache)
        for layer in cache.layers:
            assert layer.delta_state[0].abs().sum() == 0 and layer.delta_state[1].abs().sum() > 0
            layer.delta_state.normal_()
        before = [layer.delta_state.clone() for layer in cache.layers]
        mask_of_two = torch.zeros(2, 24, dtype=torch.long)
        model(ids, attention_mask=mask_of_two, past_key_values=cache)
        assert all(torch.equal(x.delta_state, y) for x, y in zip(cache.layers, before, strict=True))


@torch.no_grad()
def test_a_conversation_goes_on_over_its_cache():
    model = attached("mistral")
    first, second = torch.randint(3, 64, (2, 2, 11))
    cache = DynamicCache(config=model.config)
    answer = model.generate(first, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None)
    ids = torch.cat([answer, second], 1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_reset_cache_is_a_fresh_one(static):
    model = attached("gemma3")
    ids = torch.randint(3, 64, (2, 9))
    cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    _, expected = _filled(model, ids, cache=cache)
    storage = cache.layers[1].delta_state.data_ptr()
    cache.reset()
    _, again = _filled(model, ids, cache=cache)
    assert torch.equal(again, expected)
    assert (cache.layers[1].delta_state.data_ptr() == storage) or not static


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
@torch.no_grad()
def test_cropped_tokens_leave_no_trace(name):
    model = attached(name)
    ids, wrong = torch.randint(3, 64, (2, 2, 20))
    expected, kept = model(ids, past_key_values=(whole := DynamicCache(config=model.config))).logits, whole.layers
    cache = DynamicCache(config=model.config)
    model(ids[:, :10], past_key_values=cache)
    cache.activate_past_recording()
    model(torch.cat([ids[:, 10:12], wrong[:, :2]], 1), past_key_values=cache)
    model(wrong[:, 2:3], past_key_values=cache, delta_write=False)
    model(wrong[:, 3:6], past_key_values=cache)
    cache.crop(torch.tensor(-6))
    assert error(model(ids[:, 12:15], past_key_values=cache).logits, expected[:, 12:15]) < 1e-5
    cache.crop(0)
    model(wrong[:, :1], past_key_values=cache)
    cache.crop(-1)
    assert error(model(ids[:, 15:], past_key_values=cache).logits, expected[:, 15:]) < 1e-5
    for ours, theirs in zip(cache.layers, kept, strict=True):
        assert error(ours.delta_state, theirs.delta_state) < 1e-5
    cache.crop(0)
    with pytest.raises(RuntimeError, match="at most the tokens since the last crop must be removed, got 1 of 0"):
        cache.crop(-1)


@torch.no_grad()
def test_crop_of_written_segments():
    model = attached(memory_write_granularity="message_mean")
    ids = torch.randint(3, 64, (2, 20))
    message = {"delta_segment_ids": torch.zeros(2, 5, dtype=torch.long)}
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache, **message)
    cache.activate_past_recording()
    model(ids[:, 5:10], past_key_values=cache, **message)
    expected = [layer.delta_state.clone() for layer in cache.layers]
    model(ids[:, 10:15], past_key_values=cache, **message)
    with pytest.raises(NotImplementedError, match="a call that wrote segments must stay or go as a whole"):
        cache.crop(-3)
    cache.crop(-5)
    for layer, x in zip(cache.layers, expected, strict=True):
        assert error(layer.delta_state, x) < 1e-6


@torch.no_grad()
def test_cache_without_its_memory_is_refused():
    model = attached()
    ids = torch.randint(3, 64, (2, 9))
    plain = DynamicCache(config=model.config)
    hf.detach(copy.deepcopy(model))(ids, past_key_values=plain)
    with pytest.raises(ValueError, match="must be fresh or have been filled with its memory, got a cache of 9 tokens"):
        model(ids, past_key_values=plain)
    cache, _ = _filled(model, ids)
    with pytest.raises(RuntimeError, match="the cache must record its past to take tokens back"):
        cache.crop(-2)
    assert cache.get_seq_length() == 9
    # a caller's state takes over from the cache's, which is then unknown
    state = hf.DeltaMemState([layer.delta_state.clone() for layer in cache.layers])
    model(ids[:, :1], past_key_values=cache, delta_state=state)
    with pytest.raises(ValueError, match="got a cache of 10 tokens without one"):
        model(ids[:, :1], past_key_values=cache)
    model(ids[:, :1], past_key_values=cache, delta_state=state)


@torch.no_grad()
def test_other_cache_layers_take_the_generic_path(monkeypatch):
    model = attached()
    ids = torch.randint(3, 64, (2, 9))
    expected = model(ids, use_cache=False).logits
    layer = type("OtherLayer", (transformers.cache_utils.DynamicLayer,), {})
    cache = transformers.Cache(layer_class_to_replicate=layer)
    logits = torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 8), (8, 9))], 1)
    assert paths(model) == ["generic: OtherLayer does not keep what it returns"] * 3
    assert error(logits, expected) < 1e-5


def test_memory_is_fp32_in_a_half_precision_model():
    model = attached().to(torch.bfloat16)
    cache = DynamicCache(config=model.config)
    model.generate(torch.randint(3, 64, (2, 9)), past_key_values=cache, max_new_tokens=4)
    assert {layer.delta_state.dtype for layer in cache.layers} == {torch.float32}
    assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}
