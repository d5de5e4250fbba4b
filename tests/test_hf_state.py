"""The state that a caller holds: captured when a forward begins, advanced once when it returns."""

import itertools

import pytest
import torch
from hf_models import attached, error, paths

from deltamem_kernels import hf

IDS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))
TRAIN = {"use_cache": False}


def _zeros(model, B=2):
    return hf.DeltaMemState.zeros(model, B)


@torch.no_grad()
def test_state_advances_in_its_own_storage():
    model = attached()
    state = _zeros(model)
    storage = list(state.tensors)
    model(IDS[:, :10], delta_state=state, **TRAIN)
    assert all(a is b and b.abs().sum() > 0 for a, b in zip(state.tensors, storage, strict=True))
    before = state.clone()
    logits = [model(IDS[:, 10:], delta_state=state, delta_write=False, **TRAIN).logits for _ in range(2)]
    assert torch.equal(*logits)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors, before.tensors, strict=True))
    model(IDS[:, 10:], delta_state=state, **TRAIN)
    assert not any(torch.equal(a, b) for a, b in zip(state.tensors, before.tensors, strict=True))


def test_state_carries_the_graph_under_grad():
    model = attached()
    state = _zeros(model)
    zeros = list(state.tensors)
    model(IDS[:, :10], delta_state=state, **TRAIN)
    assert all(x.abs().sum() == 0 for x in zeros)
    assert all(x.requires_grad for x in state.tensors)
    first = list(state.tensors)
    with torch.no_grad():  # storage that a graph holds is not written
        values = [x.clone() for x in first]
        model(IDS[:, 10:], delta_state=state, **TRAIN)
    assert all(torch.equal(a, b) for a, b in zip(first, values, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(state.tensors, values, strict=True))


def test_a_forward_that_raises_leaves_the_state(monkeypatch):
    model = attached()
    state = _zeros(model)
    monkeypatch.setattr(model.model.layers[2].mlp, "forward", lambda x: 1 / 0)
    for use_cache in (False, True):
        with torch.no_grad(), pytest.raises(ZeroDivisionError):
            model(IDS, delta_state=state, use_cache=use_cache)
    assert all(x.abs().sum() == 0 for x in state.tensors)


def _gradients(model, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    model.zero_grad()
    state = _zeros(model)
    logits = model(IDS[:, :12], delta_state=state, **TRAIN).logits.square().mean()
    model(IDS[:, 12:18], delta_state=state, **TRAIN)
    read = model(IDS[:, 18:], delta_state=state, delta_write=False, **TRAIN).logits
    (read.square().sum() + logits).backward()
    return read.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["qwen3", "granite"])
def test_gradient_checkpointing_recomputes_from_the_same_state(family, monkeypatch):
    from hf_models import FAMILIES

    monkeypatch.setitem(FAMILIES, "granite", ("GraniteConfig", {}))
    model = attached(family, delta_heads=["q", "k", "v", "o"], couple_lambda=False).train()
    plain, grads = _gradients(model, False)
    again, recomputed = _gradients(model, True)
    assert torch.equal(plain, again)
    assert set(paths(model)) == {"fused"} or family == "granite"
    for n, grad in grads.items():
        assert grad.abs().sum() > 0, n
        assert error(recomputed[n], grad) < 1e-6, n
    assert model._delta_mem.call is None


def test_reentrant_checkpointing_of_a_state_is_refused():
    model = attached().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="gradient checkpointing must be of use_reentrant=False with delta_state"):
        model(IDS, delta_state=_zeros(model), **TRAIN)
    model(IDS, **TRAIN).logits.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".layers.0." in n and p.requires_grad)


@pytest.mark.parametrize("family, options", [
    ("qwen3", {}), ("qwen3", {"rankwise_gates": False, "num_state_heads": 2}), ("granite", {}),
    ("qwen3", {"memory_write_granularity": "message_mean"}),
])  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, True])
def test_state_tells_how_much_was_let_in(family, options, checkpointing, monkeypatch):
    from hf_models import FAMILIES

    monkeypatch.setitem(FAMILIES, "granite", ("GraniteConfig", {}))
    model = attached(family, **options).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    first = model._delta_mem.memories[0]
    seen = []
    handle = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].detach()), with_kwargs=True
    )
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 18:] = 0
    state, given = _zeros(model), {}
    if first.config.writes_segments:
        given["delta_segment_ids"] = torch.tensor([[0] * 10 + [1] * 14, [0] * 20 + [1] * 4])
    with torch.no_grad():
        model(IDS, delta_state=state, attention_mask=mask, **given, **TRAIN)
    assert state.gates is None
    model(IDS, delta_state=state, attention_mask=mask, **given, **TRAIN)
    gates = state.gates
    assert len(gates) == 3 and all(x.shape == (2,) and x.requires_grad for x in gates)
    handle.remove()

    def expected(x, rows):
        if first.config.writes_segments:
            ids = given["delta_segment_ids"][rows[0], : rows[1]]
            x = torch.stack([x[ids == i].mean(0) for i in ids.unique()])
        return torch.sigmoid(x @ first.beta_proj.T + first.beta_bias).mean()

    x = seen[-1]
    want = torch.stack([expected(x[0], (0, 24)), expected(x[1, :18], (1, 18))])
    assert error(gates[0], want) < 1e-6
    grads = torch.autograd.grad(gates[0].square().sum(), [first.beta_proj, first.beta_bias])
    for grad, other in zip(
        grads, torch.autograd.grad(want.square().sum(), [first.beta_proj, first.beta_bias]), strict=True
    ):
        assert error(grad, other) < 1e-5
    model(IDS[:, :4], delta_state=state, delta_write=False, **TRAIN)  # what only reads leaves them
    assert state.gates is gates


def test_gradients_equal_those_of_one_long_sequence():
    # the state's gradient: write pass and read pass in one sequence of writes, cut in two calls without attention
    model = attached("mistral", delta_heads=["o"])
    for layer in model.model.layers:  # attention that sees its own token only
        layer.self_attn.config.sliding_window = 1
    model.model.config.sliding_window = 1
    grads = []
    for cuts in ((0, 24), (0, 9, 24), (0, 3, 11, 24)):
        model.zero_grad()
        state = _zeros(model)
        logits = [model(IDS[:, a:b], delta_state=state, **TRAIN).logits for a, b in itertools.pairwise(cuts)]
        torch.cat(logits, 1).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for other in grads[1:]:
        for n, grad in grads[0].items():
            assert error(other[n], grad) < 1e-5, n


@torch.no_grad()
def test_same_prompt_twice_gives_the_same_logits():
    model = attached()
    first = model(IDS).logits
    assert torch.equal(model(IDS).logits, first)
    assert torch.equal(model(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


@torch.no_grad()
def test_batch_equals_singles_and_permutes():
    model = attached(num_state_heads=2)
    ids = torch.randint(3, 64, (4, 15))
    state = _zeros(model, 4)
    logits = model(ids, delta_state=state, **TRAIN).logits
    for b in range(4):
        one = _zeros(model, 1)
        assert error(model(ids[b : b + 1], delta_state=one, **TRAIN).logits, logits[b : b + 1]) < 1e-5
        assert all(error(x, y[b : b + 1]) < 1e-5 for x, y in zip(one.tensors, state.tensors, strict=True))
    rows = torch.tensor([2, 0, 3, 1])
    moved = state.select(rows)
    again = model(ids[rows], delta_state=moved, delta_write=False, **TRAIN).logits
    assert error(again, model(ids, delta_state=state, delta_write=False, **TRAIN).logits[rows]) < 1e-5
    assert moved.batch_size == 4 and "4, 2, 4, 4" in repr(moved)


def test_state_of_inference_mode_trains():
    model = attached()
    with torch.inference_mode():
        state = _zeros(model)
        model(IDS[:, :10], delta_state=state, **TRAIN)
    model(IDS[:, 10:], delta_state=state, delta_write=False, **TRAIN).logits.sum().backward()


BAD = [
    (lambda m: {"delta_state": [1]}, TypeError, "delta_state must be a DeltaMemState, got list"),
    (lambda m: {"delta_state": _zeros(m, 3)}, ValueError, r"delta_state must hold shape \(2, 1, 4, 4\), got \(3, 1"),
    (lambda m: {"delta_state": hf.DeltaMemState(_zeros(m).tensors[:2])}, ValueError, "for each of 3 layers, got 2"),
    (
        lambda m: {"delta_state": hf.DeltaMemState([x.half() for x in _zeros(m).tensors])},
        TypeError,
        "delta_state must be float32, got torch.float16",
    ),
    (lambda m: {"attention_mask": torch.ones(2, 9)}, ValueError, r"attention_mask must cover \(2, 24\) tokens"),
    (lambda m: {"attention_mask": torch.ones(2, 1, 24)}, ValueError, "must be a 2-D or 4-D tensor"),
    (
        lambda m: {"position_ids": torch.arange(24).remainder(12)[None]},
        NotImplementedError,
        "position_ids must count up by 1",
    ),
    (
        lambda m: {"cu_seq_lens_q": torch.tensor([0, 24])},
        NotImplementedError,
        "sequences must not be packed into one row",
    ),
]


@pytest.mark.parametrize("given, kind, text", BAD, ids=lambda x: x[:40] if isinstance(x, str) else None)
@torch.no_grad()
def test_bad_arguments_are_refused_by_name(given, kind, text):
    model = attached()
    with pytest.raises(kind, match=f"forward: .*{text}|{text}"):
        model(IDS, **TRAIN, **given(model))


def test_attention_alone_is_refused():
    model = attached()
    x = torch.randn(1, 3, 32)
    with pytest.raises(RuntimeError, match="must be reached through its model's forward"):
        model.model.layers[0].self_attn(x, None, None)
