"""Attention kernels against the reference in fp64. Allowed error: twice that of eager attention in the same dtype, on
the same prepared q, plus one rounding unit of the result."""

import itertools
import math

import pytest
import torch
from attention_inputs import defaults
from gradients import ints
from kernel_checks import CUDA, TRITON

from deltamem_kernels import ops
from deltamem_kernels.reference import delta_attention as reference
from deltamem_kernels.reference.delta_prep import delta_prep_fwd
from deltamem_kernels.reference.rows import cached_spans, slot_index, spans

BACKENDS = ["cpu", CUDA, TRITON]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]  # what the CUDA kernels take
NAN = float("nan")


def cases(dtypes, choices, cuda_choices):
    """Parameters (backend, dtype, choice). The CUDA kernels take heads of 64 and 128; emulated, few tokens."""
    found = []
    for backend in BACKENDS:
        its_dtypes, its_choices = (HALVES, cuda_choices) if backend is CUDA else (dtypes, choices)
        name, marks = (backend, ()) if isinstance(backend, str) else (*backend.values, backend.marks)
        for dtype, choice in itertools.product(its_dtypes, its_choices):
            found.append(pytest.param(name, dtype, choice, marks=marks, id=f"{name}-{str(dtype)[6:]}-{choice}"))
    return found


def sized(backend, T, HQ, HKV, D, dtype=torch.float32):
    """One size of a test, as the backend covers it."""
    return (min(T, 150), min(HQ, 2 * HKV), HKV, 64, torch.bfloat16) if backend == "cuda" else (T, HQ, HKV, D, dtype)


# ---- inputs ----------------------------------------------------------------------------------------------------


def prologue_inputs(B, T, HQ, D, dtype, gathered=False):
    """What prepares q; half of the channels rotate, or as many as pair up."""
    H, R = 2, 4
    angle = torch.randn(*((B, T) if gathered else (400,)), D // 4)
    return {
        "reads": torch.randn(B, T, H, R),
        "delta_q": 0.3 * torch.randn(HQ * D, H * R).to(dtype),
        "q_norm_weight": (1 + 0.2 * torch.randn(D)).to(dtype),
        "rotary_cos": angle.cos().to(dtype) if D >= 4 else None,
        "rotary_sin": angle.sin() if D >= 4 else None,
    }


def inputs(T, HQ, HKV, D, dtype=torch.float32, B=2, prologue=False, packed=None, **options):
    B = 1 if packed else B
    args = {name: torch.randn(B, T, heads, D).to(dtype) for name, heads in (("q", HQ), ("k", HKV), ("v", HKV))}
    if prologue:
        args |= prologue_inputs(B, T, HQ, D, dtype)
    if packed:
        args["cu_seqlens"] = ints(*packed)
    options = {"softmax_scale": 1.3 / math.sqrt(D)} | options
    return defaults(reference.delta_attention_fwd, **args | options)


def holes(B, T):
    """A mask with holes, whose first row starts masked."""
    mask = torch.rand(B, T) > 0.3
    mask[0, : T // 3] = False
    return mask


def wide(args):
    return {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in args.items()}


def softmax_of(args):
    return [args[name] for name in ("causal", "window_left", "window_right")], args["softmax_scale"], args["softcap"]


def prepared(args):
    prep = defaults(delta_prep_fwd, **args) | dict.fromkeys(("k", "v", "delta_k", "delta_v"))
    return delta_prep_fwd(**prep)[0]


# ---- eager, and the budget --------------------------------------------------------------------------------------


def eager_attention(q, k, v, sees, scale, softcap):
    """One row in plain torch, every product in the inputs' dtype, the softmax in fp32: [Tq, HQ, D], [HQ, Tq]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = torch.einsum("ihd,jhd->hij", q, k) * scale
    s = softcap * torch.tanh(s / softcap) if softcap > 0 else s
    s = s.float().masked_fill(~sees, -torch.inf)
    lse = torch.logsumexp(s, -1)
    weights = torch.softmax(s.masked_fill(lse.isneginf()[..., None], 0), -1).masked_fill(~sees, 0)
    return torch.einsum("hij,jhd->ihd", weights.to(q.dtype), v), lse


def eager_forward(args):
    """(out, lse) over the call's own tokens; differentiable in q, k, v."""
    q, mask, (window, *softmax) = prepared(args), args["token_mask"], softmax_of(args)
    out, lse = torch.zeros_like(q), torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    for span in spans(*q.shape[:2], args["cu_seqlens"]):
        b, where = span.tokens
        slots = torch.arange(span.length)
        sees = reference.visible(slots, slots, *window)
        if mask is not None:
            sees &= mask[b, where] & mask[b, where, None]
        row = (torch.nan_to_num(x[b, where]) for x in (q, args["k"], args["v"]))
        out[b, where], lse[b, :, where] = eager_attention(*row, sees, *softmax)
    return out, lse


def assert_within_budget(got, eager, want, name=""):
    assert got.dtype == eager.dtype and got.shape == want.shape, name
    infinite = want.isinf()
    assert torch.equal(got[infinite].double(), want[infinite]), name
    unit = torch.finfo(got.dtype).eps / 2
    got, eager, want = (x[~infinite].double() for x in (got, eager.detach(), want))
    if want.numel():
        allowed = 2 * (eager - want).abs().max() + unit * want.abs()
        error = (got - want).abs()
        assert bool((error <= allowed).all()), f"{name}: error {error.max():.2e}, allowed {allowed.min():.2e}"


def check_forward(backend, args):
    want = reference.delta_attention_fwd(**wide(args))
    got = ops.handle("delta_attention_fwd", backend)(**args)
    for name, *x in zip(("out", "lse"), got, eager_forward(args), want, strict=True):
        assert_within_budget(*x, name)
    return got


def check_backward(backend, args):
    """args without a prologue: the backward pass takes prepared tensors."""
    args = args | {"dout": torch.randn(args["q"].shape).to(args["q"].dtype)}
    mask = args["token_mask"]
    if mask is not None:
        args["dout"][~mask] = NAN
    forward = defaults(reference.delta_attention_fwd, **args)
    eager = eager_gradients(args, forward)
    exact = dict(zip(("out", "lse"), reference.delta_attention_fwd(**wide(forward)), strict=True))
    want = reference.delta_attention_bwd(**defaults(reference.delta_attention_bwd, **wide(args), **exact))
    out, lse = ops.handle("delta_attention_fwd", backend)(**forward)
    given = defaults(reference.delta_attention_bwd, **args, out=out, lse=lse)
    got = ops.handle("delta_attention_bwd", backend)(**given)
    for name, x, other, target in zip(("dq", "dk", "dv"), got, eager, want, strict=True):
        worst = max(other, key=lambda grad, target=target: (grad - target).abs().max())
        assert_within_budget(x, worst, target, name)
    return given, got


def eager_gradients(args, forward):
    """dq, dk, dv each in both of eager's ways: autograd through the softmax, and P recomputed from a rounded lse."""
    leaves = {name: torch.nan_to_num(args[name]).requires_grad_() for name in ("q", "k", "v")}
    out, _ = eager_forward(forward | leaves)
    autograd = torch.autograd.grad(out, list(leaves.values()), torch.nan_to_num(args["dout"]))
    saved = dict(zip(("out", "lse"), reference.delta_attention_fwd(**forward), strict=True))
    recomputed = reference.delta_attention_bwd(**defaults(reference.delta_attention_bwd, **args, **saved))
    return zip(autograd, recomputed, strict=True)


CASES = {
    "causal": {},
    "not_causal": {"causal": False},
    "window": {"window_left": 37},
    "two_sided_window": {"causal": False, "window_left": 20, "window_right": 45},
    "future_only": {"causal": False, "window_left": 0, "window_right": 2**62},
    "softcap": {"softcap": 1.5},
    "softcap_window": {"causal": False, "softcap": 0.7, "window_left": 3},
    "negative_scale": {"softmax_scale": -0.2},
}


# ---- over a cache ---------------------------------------------------------------------------------------------------


def cache_inputs(lengths, new, *, T=None, HQ=4, HKV=2, D=32, dtype=torch.float32, page_size=0, leftpad=None,
                 packed=False, appended=True, prologue=False, **options):  # fmt: skip
    """Rows with `lengths` slots filled before their `new` tokens. Unused slots are NaN, unused pages absurd."""
    B, T = len(lengths), T or max(new)
    leftpad = leftpad or [0] * B
    end = [a + b if appended else a for a, b in zip(lengths, new, strict=True)]
    slots = max(end) + 5
    dense = {name: torch.full((B, slots, HKV, D), NAN).to(dtype) for name in ("k_cache", "v_cache")}
    for cache in dense.values():
        for b in range(B):
            cache[b, leftpad[b] : end[b]] = torch.randn(end[b] - leftpad[b], HKV, D).to(dtype)
    args = {"cache_seqlens": ints(*lengths), "appended": appended} | dense
    if any(leftpad):
        args["cache_leftpad"] = ints(*leftpad)
    if page_size:
        pages = -(-slots // page_size)
        table = torch.randperm(B * pages, dtype=torch.int32).view(B, pages)
        for name, cache in dense.items():
            padded = torch.full((B, pages * page_size, HKV, D), NAN).to(dtype)
            padded[:, :slots] = cache
            args[name] = torch.empty(B * pages, page_size, HKV, D, dtype=dtype)
            args[name][table.long()] = padded.unflatten(1, (pages, page_size))
        for b in range(B):
            table[b, -(-end[b] // page_size) :] = 2**31 - 1
            table[b, : leftpad[b] // page_size] = -(2**31)
        args["block_table"] = table
    if packed:
        starts = [sum(new[:b]) for b in range(B + 1)]
        args["cu_seqlens"], B, T = ints(*starts), 1, starts[-1] + 3
    elif min(new) < T:
        args["token_mask"] = torch.arange(T) < ints(*new)[:, None]
    args["q"] = torch.randn(B, T, HQ, D).to(dtype)
    if prologue:
        args |= prologue_inputs(B, T, HQ, D, dtype)
    return args | {"softmax_scale": 1.2 / math.sqrt(D)} | options


def with_cache(op, args):
    q = args["q"]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    results = {"out": torch.full_like(q, NAN)}
    results["lse"] = torch.full((q.shape[0], q.shape[2], q.shape[1]), NAN, dtype=lse_dtype)
    op(**defaults(reference.delta_attention_with_kvcache, **args, **results))
    return results["out"], results["lse"]


def eager_with_cache(args):
    args = defaults(reference.delta_attention_with_kvcache, **args)
    window, *softmax = softmax_of(args)
    shape = args["q"].shape
    found = cached_spans(*shape[:2], args["token_mask"], args["cu_seqlens"], args["state_indices"])
    lengths = args["cache_seqlens"].tolist()
    first = {span.row: lengths[span.row] - (0 if args["appended"] else span.length) for span in found}
    if args["positions"] is None:
        args["positions"] = torch.zeros(shape[:2], dtype=torch.int32)
        for span in found:
            where = first[span.row] + torch.arange(span.length)
            args["positions"][span.tokens] = where.clamp_min(0).int()
    q = prepared(args)
    out, lse = torch.zeros_like(q), torch.full((shape[0], shape[2], shape[1]), -torch.inf)
    for span in found:
        b, where = span.tokens
        begin = 0 if args["cache_leftpad"] is None else int(args["cache_leftpad"][span.row])
        keys = torch.arange(begin, max(begin, first[span.row] + span.length))
        index = slot_index(args["k_cache"], args["block_table"], span.row, keys)
        sees = reference.visible(first[span.row] + torch.arange(span.length), keys, *window)
        out[b, where], lse[b, :, where] = eager_attention(
            q[b, where], args["k_cache"][index], args["v_cache"][index], sees, *softmax
        )
    return out, lse


def check_cache(backend, args):
    want = with_cache(reference.delta_attention_with_kvcache, wide(args))
    got = with_cache(ops.handle("delta_attention_with_kvcache", backend), args)
    for name, *x in zip(("out", "lse"), got, eager_with_cache(args), want, strict=True):
        assert_within_budget(*x, name)
    return got
