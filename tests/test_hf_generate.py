"""The memory under generate: every way of generating reads and writes the same states."""

import copy

import pytest
import torch
import transformers
from hf_models import FAMILIES, attached, error, paths
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from deltamem_kernels import hf

transformers.logging.set_verbosity_error()

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
SAMPLE = {"max_new_tokens": 12, "do_sample": True, "top_k": 20, "eos_token_id": None}


def _prompt(T=17):
    """A prompt whose second half repeats, so that prompt lookup drafts."""
    ids = torch.randint(3, 64, (1, T), generator=torch.Generator().manual_seed(11))
    return torch.cat([ids[:, : T // 2], ids], 1)


MODES = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 5},
    "chunked prefill, static cache": {"prefill_chunk_size": 5, "cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_way_of_generating_gives_the_same_tokens(name):
    model = attached(name)
    ids = _prompt()
    expected = model.generate(ids, use_cache=False, **GREEDY)
    assert paths(model) == ["fused"] * 3
    assert not torch.equal(expected, hf.detach(copy.deepcopy(model)).generate(ids, **GREEDY))
    for mode, options in MODES.items():
        for _ in range(2):  # nothing is left over from the first time
            assert torch.equal(model.generate(ids, **GREEDY, **options), expected), mode
        assert paths(model) == ["fused"] * 3, mode
    torch.manual_seed(5)
    sampled = model.generate(ids, use_cache=False, num_return_sequences=2, **SAMPLE)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, num_return_sequences=2, **SAMPLE), sampled)
    beams = model.generate(ids, use_cache=False, num_beams=4, **GREEDY)
    assert torch.equal(model.generate(ids, num_beams=4, **GREEDY), beams)


def test_generic_path_generates_the_same_tokens(monkeypatch):
    monkeypatch.setitem(FAMILIES, "granite", ("GraniteConfig", {"attention_multiplier": 0.3}))
    model = attached("granite")
    ids = _prompt()
    expected = model.generate(ids, use_cache=False, **GREEDY)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    for mode, options in MODES.items():
        assert torch.equal(model.generate(ids, **GREEDY, **options), expected), mode
        out = model.generate(padded, attention_mask=(padded != 0).long(), **GREEDY, **options)
        assert torch.equal(out[:, 3:], expected), mode
    assert all(path.startswith("generic: GraniteAttention") for path in paths(model))
    beams = model.generate(ids, use_cache=False, num_beams=4, **GREEDY)
    assert torch.equal(model.generate(ids, num_beams=4, **GREEDY), beams)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "prompt lookup"] + ["no cache", "beams"])
@pytest.mark.parametrize("name", ["qwen3", "smollm3", "mistral", "gemma3"])
def test_left_padded_batch_equals_singles(name, mode):
    model = attached(name)
    options = MODES.get(mode, {"use_cache": False} if mode == "no cache" else {"num_beams": 3})
    prompts = [_prompt(), _prompt(10), _prompt(13)[:, 2:]]
    longest = max(p.shape[1] for p in prompts)
    ids, mask = torch.zeros(2, len(prompts), longest, dtype=torch.long)
    for i, p in enumerate(prompts):
        ids[i, longest - p.shape[1] :] = p
        mask[i, longest - p.shape[1] :] = 1
    batch = model.generate(ids, attention_mask=mask, **GREEDY, **options)
    assert paths(model) == ["fused"] * 3
    for i, p in enumerate(prompts):
        single = model.generate(p, **GREEDY, **options)
        assert torch.equal(batch[i, longest:], single[0, p.shape[1] :]), i


def test_generate_takes_state_write_and_segments():
    model = attached(memory_write_granularity="message_mean")
    ids, question = _prompt(), _prompt(9)
    state = hf.DeltaMemState.zeros(model, 1)
    with torch.no_grad():
        model(ids, delta_state=state, delta_segment_ids=torch.zeros_like(ids), use_cache=False)
    before = state.clone()
    answer = model.generate(question, delta_state=state, delta_write=False, **GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors, before.tensors, strict=True))
    expected = model.generate(question, delta_state=state, delta_write=False, use_cache=False, **GREEDY)
    assert torch.equal(answer, expected)
    other = model.generate(question, delta_state=hf.DeltaMemState.zeros(model, 1), delta_write=False, **GREEDY)
    assert not torch.equal(other, answer)
    # the prompt is one message, what is generated is not written
    model.generate(ids, delta_state=(written := hf.DeltaMemState.zeros(model, 1)),
                   delta_segment_ids=torch.zeros_like(ids), **GREEDY)  # fmt: skip
    for a, b in zip(written.tensors, before.tensors, strict=True):
        assert error(a, b) < 1e-6
    with pytest.raises(ValueError, match="generate: delta_state must be None with beams or drafts"):
        model.generate(ids, delta_state=state, delta_write=False, num_beams=2, **GREEDY)
    with pytest.raises(ValueError, match=r"generate: delta_write must be False with a delta_state and no cache .*None"):
        model.generate(ids, delta_state=state, use_cache=False, **GREEDY)
    with pytest.raises(ValueError, match="`model_kwargs` are not used by the model"):
        model.generate(ids, delta_sate=state, **GREEDY)


def test_continuous_batching_is_refused():
    model = attached()
    with pytest.raises(NotImplementedError, match="continuous batching has no slots"):
        model.generate_batch([[3, 4, 5]], **{"generation_config": model.generation_config})
    with pytest.raises(NotImplementedError, match="continuous batching has no slots for memory states"):
        model(torch.tensor([[3, 4]]), cache=PagedAttentionCache.__new__(PagedAttentionCache))
