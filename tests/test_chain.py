"""Algebra of the whole chain through the public functions: what must be equal is, whoever computes it."""

import calls
import pytest
import torch
from kernel_checks import CUDA, TRITON

import deltamem_kernels as dk
from deltamem_kernels.fused import MAX_DECODE_TOKENS

BACKENDS = ["reference", "cpu", CUDA, TRITON]
B, T, S = 3, 53, 96
TOKENWISE = ("q", "k", "v", "mem_q", "mem_k", "mem_v", "beta", "lam", "token_mask")


def close(backend):
    """Of two ways through one backend's kernels; cuda's tests are in bf16."""
    tolerance = 2e-2 if backend == "cuda" else 2e-5
    return {"rtol": tolerance, "atol": tolerance}


def layer(tokens=T, batch=B, dtype=None):
    """One call's tokens with every correction, from state zero."""
    return calls.qkv(tokens, batch, dtype) | calls.memory(tokens, batch, dtype) | calls.projections(dtype)


def part(arguments, start, stop):
    return {n: x[:, start:stop] if n in TOKENWISE and x is not None else x for n, x in arguments.items()}


def empty_cache(batch=B, fill=float("nan"), dtype=None):
    """Caches and states whose unused slots are poison."""
    return {
        "k_cache": torch.full((batch, S, calls.HKV, calls.D), fill, dtype=dtype or calls.DTYPE),
        "v_cache": torch.full((batch, S, calls.HKV, calls.D), fill, dtype=dtype or calls.DTYPE),
        "state_pool": torch.full((batch + 2, calls.H, calls.R, calls.R), fill),
        "state_indices": torch.arange(batch, 0, -1, dtype=torch.int32),
    }


def run_in_pieces(arguments, cuts, backend, cache, **options):
    """The tokens in several calls over one cache; returns out and reads joined."""
    outs, reads = [], []
    batch = arguments["q"].shape[0]
    for start, stop in cuts:
        done = dk.fused_delta_attention_with_kvcache(
            **part(arguments, start, stop),
            **cache,
            cache_seqlens=torch.full((batch,), start, dtype=torch.int32),
            has_initial_state=torch.full((batch,), start > 0),
            backend=backend,
            **options,
        )
        outs.append(done.out)
        reads.append(done.reads)
    return torch.cat(outs, 1), torch.cat(reads, 1)


def pieces(*lengths):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(T,), (T - 6, 1, 1, 1, 1, 1, 1), (16, 17, 3, 17), (1, 20, 32)])
def test_prefill_in_pieces_equals_the_whole(backend, lengths):
    """Decode steps, drafts and chunks, over poisoned caches and recycled state slots."""
    arguments = layer()
    whole = dk.fused_delta_attention(**arguments, backend=backend)
    cache = empty_cache()
    out, reads = run_in_pieces(arguments, pieces(*lengths), backend, cache)
    torch.testing.assert_close(out, whole.out, **close(backend))
    torch.testing.assert_close(reads, whole.reads, **close(backend))
    torch.testing.assert_close(cache["state_pool"][cache["state_indices"].long()], whole.final_state, **close(backend))
    assert cache["k_cache"][:, T:].isnan().all() and cache["v_cache"][:, T:].isnan().all()
    assert cache["state_pool"][[0, B + 1]].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [1, 7, 16])
def test_paged_equals_dense(backend, page):
    arguments = layer()
    out, _ = run_in_pieces(arguments, pieces(40, 5, 1), backend, empty_cache())
    columns = -(-T // page)
    table = torch.full((B, columns + 3), 2_000_000_000, dtype=torch.int32)  # absurd past the end
    table[:, :columns] = torch.randperm(B * columns).reshape(B, columns)
    cache = empty_cache()
    for name in ("k_cache", "v_cache"):
        cache[name] = torch.full((B * columns, page, calls.HKV, calls.D), float("nan"), dtype=calls.DTYPE)
    paged, _ = run_in_pieces(arguments, pieces(40, 5, 1), backend, cache, block_table=table)
    torch.testing.assert_close(paged, out, **close(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_padded(backend):
    lengths = [T, 0, 20]
    arguments = layer()
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    padded = dk.fused_delta_attention(**arguments, token_mask=mask, backend=backend)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    packed_arguments = {
        n: torch.cat([x[mask], x[0, :2]])[None] if n in TOKENWISE else x for n, x in arguments.items()
    }  # two tokens past the last sequence
    packed = dk.fused_delta_attention(**packed_arguments, cu_seqlens=cu, max_seqlen=T, backend=backend)
    torch.testing.assert_close(packed.out[0, :-2], padded.out[mask], **close(backend))
    torch.testing.assert_close(packed.reads[0, :-2], padded.reads[mask], **close(backend))
    torch.testing.assert_close(packed.final_state, padded.final_state, **close(backend))
    assert (packed.out[0, -2:] == 0).all() and (packed.reads[0, -2:] == 0).all()
    assert (packed.lse[..., -2:] == float("-inf")).all()
    assert (padded.out[~mask] == 0).all() and (padded.reads[~mask] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [3, 20])
def test_ragged_new_tokens_by_packing_equal_a_masked_tail(backend, tokens):
    lengths = torch.tensor([tokens, 1, tokens - 1])
    arguments = layer(tokens)
    filled = torch.tensor([0, 30, 11], dtype=torch.int32)
    start = empty_cache(fill=0.0) | {
        "k_cache": torch.randn(B, S, calls.HKV, calls.D, dtype=calls.DTYPE),
        "v_cache": torch.randn(B, S, calls.HKV, calls.D, dtype=calls.DTYPE),
        "state_pool": torch.randn(B + 2, calls.H, calls.R, calls.R),
    }
    mask = torch.arange(tokens) < lengths[:, None]
    one, two = calls.clone(start), calls.clone(start)
    masked = dk.fused_delta_attention_with_kvcache(
        **arguments, **one, token_mask=mask, cache_seqlens=filled, backend=backend
    )
    packed_arguments = {n: x[mask][None] if n in TOKENWISE else x for n, x in arguments.items()}
    cu = torch.tensor([0, *lengths.cumsum(0).tolist()], dtype=torch.int32)
    packed = dk.fused_delta_attention_with_kvcache(
        **packed_arguments, **two, cu_seqlens=cu, max_seqlen=tokens, cache_seqlens=filled, backend=backend
    )
    torch.testing.assert_close(packed.out[0], masked.out[mask], **close(backend))
    torch.testing.assert_close(packed.reads[0], masked.reads[mask], **close(backend))
    for name in ("k_cache", "v_cache", "state_pool"):
        torch.testing.assert_close(two[name], one[name], **close(backend))
    assert (masked.out[~mask] == 0).all()
    assert (masked.lse.transpose(1, 2)[~mask] == float("-inf")).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_permuted_batch_is_the_permuted_result(backend, tokens):
    arguments = layer(tokens)
    cache = empty_cache() | {
        "k_cache": torch.randn(B, S, calls.HKV, calls.D, dtype=calls.DTYPE),
        "v_cache": torch.randn(B, S, calls.HKV, calls.D, dtype=calls.DTYPE),
        "state_pool": torch.randn(B + 2, calls.H, calls.R, calls.R),
        "cache_seqlens": torch.tensor([5, 40, 33], dtype=torch.int32),
    }
    order = torch.tensor([2, 0, 1])
    moved = {n: x[order] if n in (*TOKENWISE, "k_cache", "v_cache", "state_indices", "cache_seqlens") else x
             for n, x in calls.clone(arguments | cache).items()}  # fmt: skip
    a = dk.fused_delta_attention_with_kvcache(**arguments, **cache, num_splits=2, backend=backend)
    b = dk.fused_delta_attention_with_kvcache(**moved, num_splits=2, backend=backend)
    for x, y in ((a.out, b.out), (a.reads, b.reads), (a.lse, b.lse)):
        assert torch.equal(x[order], y)
    assert torch.equal(cache["state_pool"], moved["state_pool"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_delta_weights_are_plain_attention_to_the_bit(backend):
    arguments = layer()
    for name in ("delta_q", "delta_k", "delta_v"):
        arguments[name] = torch.zeros_like(arguments[name])
    plain = {n: x for n, x in arguments.items() if n in ("q", "k", "v") or "norm" in n or "rotary" in n}
    got = dk.fused_delta_attention(**arguments, backend=backend)
    want = dk.fused_delta_attention(**plain, backend=backend)
    assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)
    assert want.reads is None and want.final_state is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, MAX_DECODE_TOKENS + 1])
def test_padding_rows_touch_nothing(backend, tokens):
    arguments = layer(tokens)
    cache = empty_cache()
    cache["state_indices"] = torch.tensor([-1, 2, -7], dtype=torch.int32)
    before = calls.clone(cache)
    done = dk.fused_delta_attention_with_kvcache(
        **arguments,
        **cache,
        cache_seqlens=torch.zeros(B, dtype=torch.int32),
        has_initial_state=torch.zeros(B, dtype=torch.bool),
        backend=backend,
    )
    for row in (0, 2):
        assert (done.out[row] == 0).all() and (done.reads[row] == 0).all()
        assert cache["k_cache"][row].isnan().all() and cache["v_cache"][row].isnan().all()
    assert torch.isfinite(done.out[1]).all() and torch.isfinite(cache["state_pool"][2]).all()
    others = [slot for slot in range(B + 2) if slot != 2]
    assert torch.equal(cache["state_pool"][others].isnan(), before["state_pool"][others].isnan())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_keys_appended_before_the_call(backend, tokens):
    """k = None reads what an appending call wrote; norm and RoPE then act on q alone."""
    arguments = layer(tokens)
    cache = empty_cache() | {"has_initial_state": torch.zeros(B, dtype=torch.bool)}
    filled = torch.tensor([0, 20, 7], dtype=torch.int32)
    for name in ("k_cache", "v_cache"):
        cache[name][:, :20] = torch.randn(B, 20, calls.HKV, calls.D)
    first = dk.fused_delta_attention_with_kvcache(**arguments, **cache, cache_seqlens=filled, backend=backend)
    again = {n: x for n, x in arguments.items() if n not in ("k", "v")}
    second = dk.fused_delta_attention_with_kvcache(**again, **cache, cache_seqlens=filled + tokens, backend=backend)
    torch.testing.assert_close(second.out, first.out, **close(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_full_cache_needs_no_lengths(backend, tokens):
    function, arguments = calls.fused_delta_attention_with_kvcache(tokens=tokens)
    only = {n: arguments[n] for n in ("q", "k_cache", "v_cache")}
    filled = torch.full((calls.B,), 40, dtype=torch.int32)
    want = function(**only, cache_seqlens=filled, backend=backend)
    assert torch.equal(function(**only, backend=backend).out, want.out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_read_only_calls(backend):
    """write = False needs only queries, leaves the state, and equals beta 0, lam 1."""
    arguments = layer(1)
    cache = empty_cache() | {"state_pool": torch.randn(B + 2, calls.H, calls.R, calls.R)}
    cache |= {
        "k_cache": torch.randn(B, S, calls.HKV, calls.D, dtype=calls.DTYPE),
        "v_cache": torch.randn(B, S, calls.HKV, calls.D, dtype=calls.DTYPE),
    }
    filled = torch.full((B,), 9, dtype=torch.int32)
    gone = ("mem_k", "mem_v", "beta", "lam", "beta_bias", "lam_bias", "use_gate_in_kernel")
    only_q = {n: x for n, x in arguments.items() if n not in gone}
    one, two = calls.clone(cache), calls.clone(cache)
    a = dk.fused_delta_attention_with_kvcache(**only_q, **one, cache_seqlens=filled, write=False, backend=backend)
    held = arguments | {"beta": torch.zeros(B, 1, 1, 1).expand(B, 1, calls.H, 1), "use_gate_in_kernel": False}
    held |= {"lam": torch.ones(B, 1, calls.H, 1), "beta_bias": None, "lam_bias": None}
    b = dk.fused_delta_attention_with_kvcache(**held, **two, cache_seqlens=filled, backend=backend)
    torch.testing.assert_close(a.out, b.out, **close(backend))
    torch.testing.assert_close(a.reads, b.reads, **close(backend))
    assert torch.equal(one["state_pool"], cache["state_pool"])
    torch.testing.assert_close(two["state_pool"], cache["state_pool"], **close(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_after_each_token_rolls_a_draft_back(backend):
    """[B, T] output slots keep every intermediate state; continuing from one equals never having drafted on."""
    arguments = layer(8)
    pool = torch.zeros(1 + B * 8, calls.H, calls.R, calls.R)
    memory = {n: arguments[n] for n in ("mem_q", "mem_k", "mem_v", "beta", "lam", "beta_bias", "lam_bias",
                                        "use_qk_activation_in_kernel", "use_gate_in_kernel")}  # fmt: skip
    slots = 1 + torch.arange(B * 8, dtype=torch.int32).reshape(B, 8)
    none = torch.zeros(B, dtype=torch.bool)
    dk.delta_scan_with_state_pool(
        **memory, state_pool=pool, state_indices=torch.arange(B, dtype=torch.int32), has_initial_state=none,
        output_state_indices=slots, backend=backend,
    )  # fmt: skip
    for tokens in (1, 5, 8):
        want = dk.delta_scan(**part(memory, 0, tokens), backend=backend).final_state
        torch.testing.assert_close(pool[slots[:, tokens - 1].long()], want, **close(backend))


TRAINED = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
TRAINED += [pytest.param(*CUDA.values, torch.bfloat16, marks=CUDA.marks)]
TRAINED += [pytest.param(*TRITON.values, dtype, marks=TRITON.marks) for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("backend", "dtype"), TRAINED)
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_the_chain(backend, dtype, packed):
    """Every feature at once; against fp64, within twice the error of the reference in the same dtype."""
    batch = 1 if packed else 2
    arguments = layer(T, batch, dtype) | {"window_size": (20, 0), "softcap": 20.0}
    arguments["token_mask"] = torch.rand(batch, T) > 0.2
    if packed:
        arguments |= {"cu_seqlens": torch.tensor([0, 17, 17, 50], dtype=torch.int32), "max_seqlen": 33}
    N = 3 if packed else batch
    arguments["initial_state"] = torch.randn(N, calls.H, calls.R, calls.R)
    names = [n for n, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    cotangents = None

    def grads(given, which):
        nonlocal cotangents
        leaves = {n: given[n].clone().requires_grad_() for n in names}
        done = dk.fused_delta_attention(**given | leaves, backend=which)
        results = (done.out, done.reads, done.final_state)
        cotangents = cotangents or [torch.randn_like(x) for x in results]
        torch.autograd.backward(results, [c.to(x.dtype) for c, x in zip(cotangents, results, strict=True)])
        return {n: x.grad.double() for n, x in leaves.items()}

    got, same = grads(arguments, backend), grads(arguments, "reference")
    want = grads({n: x.double() if n in names else x for n, x in arguments.items()}, "reference")
    unit = 2.0**-24 if dtype == torch.float32 else 2.0**-9
    for name in names:
        scale = want[name].abs().max()
        budget = 2 * (same[name] - want[name]).abs().max() + 8 * unit * scale
        error = (got[name] - want[name]).abs().max()
        assert error <= budget, f"d{name}: {error:.3g} > {budget:.3g}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_sum_and_of_one_result_alone(backend):
    """Expanded cotangents, and results that nobody differentiates."""
    arguments = layer()
    for pick in (lambda r: r.out.sum(), lambda r: r.reads.sum(), lambda r: r.final_state.sum()):
        leaves = {n: x.clone().requires_grad_() for n, x in arguments.items() if n in ("q", "mem_v", "delta_q")}
        pick(dk.fused_delta_attention(**arguments | leaves, backend=backend)).backward()
        other = {n: x.clone().requires_grad_() for n, x in arguments.items() if n in ("q", "mem_v", "delta_q")}
        pick(dk.fused_delta_attention(**arguments | other, backend="reference")).backward()
        for name, x in leaves.items():
            assert (x.grad is None) == (other[name].grad is None), name
            if x.grad is not None:
                tolerance = {kind: 5 * value for kind, value in close(backend).items()}
                torch.testing.assert_close(x.grad, other[name].grad, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_one_projection(backend):
    """q, k, v and the memory's inputs as views into one packed projection, caches transposed."""
    widths = [calls.HQ * calls.D, calls.HKV * calls.D, calls.HKV * calls.D, *[calls.H * calls.R] * 5]
    packed = torch.randn(B, T, sum(widths), dtype=calls.DTYPE)
    views = packed.split(widths, -1)
    heads = [(calls.HQ, calls.D), (calls.HKV, calls.D), (calls.HKV, calls.D), *[(calls.H, calls.R)] * 5]
    names = ("q", "k", "v", "mem_q", "mem_k", "mem_v", "beta", "lam")
    arguments = layer() | {n: x.unflatten(-1, h) for n, x, h in zip(names, views, heads, strict=True)}
    dense = {n: x.contiguous() if n in names else x for n, x in arguments.items()}
    got = dk.fused_delta_attention(**arguments, backend=backend)
    want = dk.fused_delta_attention(**dense, backend=backend)
    assert torch.equal(got.out, want.out) and torch.equal(got.final_state, want.final_state)

    cache = empty_cache()
    for name in ("k_cache", "v_cache"):
        cache[name] = torch.full((B, calls.HKV, S, calls.D), float("nan"), dtype=calls.DTYPE).transpose(1, 2)
    out, _ = run_in_pieces(arguments, pieces(T - 1, 1), backend, cache)
    torch.testing.assert_close(out, want.out, **close(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, tokens", [(0, 5), (2, 0), (2, 5)])
def test_empty_and_fully_masked(backend, batch, tokens):
    arguments = layer(tokens, batch) | {"token_mask": torch.zeros(batch, tokens, dtype=torch.bool)}
    state = torch.randn(batch, calls.H, calls.R, calls.R)
    done = dk.fused_delta_attention(**arguments, initial_state=state, backend=backend)
    assert done.out.shape == (batch, tokens, calls.HQ, calls.D) and (done.out == 0).all()
    assert done.reads.shape == (batch, tokens, calls.H, calls.R) and (done.reads == 0).all()
    assert done.lse.shape == (batch, calls.HQ, tokens) and (done.lse == float("-inf")).all()
    assert (torch.equal(done.final_state, state) and done.final_state.data_ptr() != state.data_ptr()) or batch == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, tokens", [(0, 5), (2, 0)])
def test_gradients_of_empty_calls(backend, batch, tokens):
    leaves = {n: x.requires_grad_() if isinstance(x, torch.Tensor) else x for n, x in layer(tokens, batch).items()}
    done = dk.fused_delta_attention(**leaves, backend=backend)
    (done.out.sum() + done.reads.sum() + done.final_state.sum()).backward()
    for name, x in leaves.items():
        if isinstance(x, torch.Tensor):
            assert x.grad is None or (x.grad == 0).all(), name


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "cpu"])
def test_threads_change_no_bit(backend):
    arguments = layer()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            leaves = {n: x.clone().requires_grad_() for n, x in arguments.items() if isinstance(x, torch.Tensor)}
            done = dk.fused_delta_attention(**arguments | leaves, backend=backend)
            (done.out.sum() + done.reads.sum() + done.final_state.sum()).backward()
            cache = empty_cache()
            out, _ = run_in_pieces(arguments, pieces(30, 16, 1), backend, cache)
            results.append([*done, out, *[x.grad for x in leaves.values()]])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)
