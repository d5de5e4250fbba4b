"""Attention kernels against the reference in fp64. Allowed error: twice that of eager attention in the same dtype, on
the same prepared q, plus one rounding unit of the result."""

import math

import pytest
import torch
from attention_inputs import defaults
from gradients import ints

from deltamem_kernels import _cpu, ops
from deltamem_kernels.reference import delta_attention as reference
from deltamem_kernels.reference.delta_prep import delta_prep_fwd
from deltamem_kernels.reference.rows import cached_spans, slot_index, spans

BACKENDS = ["cpu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")


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
SHAPES = [  # T, HQ, HKV, D
    (1, 4, 4, 64),
    (17, 4, 1, 20),
    (129, 5, 1, 96),
    (161, 8, 1, 64),
    (301, 4, 2, 128),
    (70, 2, 2, 256),
    (33, 3, 3, 1),
    (50, 2, 1, 7),
]


# ---- over the call's own keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(backend, dtype, shape):
    check_forward(backend, inputs(*shape, dtype))
    check_forward(backend, inputs(*shape, dtype, prologue=True, causal=False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)  # with one token, dq = dk = 0 and no error is eager's
def test_backward(backend, dtype, shape):
    check_backward(backend, inputs(*shape, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("rows", ["dense", "masked", "packed"])
def test_softmax_options(backend, dtype, options, rows):
    T = 210
    if rows == "packed":  # empty sequences in front, between and behind; tokens past the last
        options = options | {"packed": (0, 0, 1, 60, 60, 200, 200)}
    args = inputs(T, 6, 2, 48, dtype, **options)
    if rows == "masked":
        args["token_mask"] = holes(2, T)
        for name in "qkv":
            args[name][~args["token_mask"]] = NAN
    if rows == "packed":
        args["token_mask"] = torch.rand(1, T) > 0.1
    check_forward(backend, args)
    given, grads = check_backward(backend, args)
    if rows == "masked":
        hidden = ~args["token_mask"]
        assert (given["out"][hidden] == 0).all() and given["lse"].transpose(1, 2)[hidden].isneginf().all()
        assert all((grad[hidden] == 0).all() for grad in grads)
    if rows == "packed":
        assert (given["out"][0, 200:] == 0).all() and given["lse"][0, :, 200:].isneginf().all()
        assert all((grad[0, 200:] == 0).all() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_prologue(backend, positions, gathered, interleaved):
    args = inputs(90, 4, 2, 32, torch.bfloat16, rotary_interleaved=interleaved, packed=(0, 33, 33, 85))
    args |= prologue_inputs(1, 90, 4, 32, torch.bfloat16, gathered)
    if positions:
        args["positions"] = torch.randint(0, 400, (1, 90), dtype=torch.int32)
    check_forward(backend, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", ["delta_q", "q_norm_weight", "rotary_cos"])
def test_parts_of_the_prologue(backend, part):
    args = inputs(40, 4, 2, 32, prologue=True)
    together = {"delta_q": ("reads", "delta_q"), "rotary_cos": ("rotary_cos", "rotary_sin")}.get(part, (part,))
    others = ("reads", "delta_q", "q_norm_weight", "rotary_cos", "rotary_sin")
    check_forward(backend, args | {name: None for name in others if name not in together})


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    """Slices of one packed projection, heads-first storage, one row expanded over the batch."""
    T, HQ, HKV, D = 65, 4, 2, 40
    qkv = torch.randn(2, T, (HQ + 2 * HKV) * D)
    q, k, v = qkv.split([HQ * D, HKV * D, HKV * D], -1)
    sliced = {"q": q.unflatten(-1, (HQ, D)), "k": k.unflatten(-1, (HKV, D)), "v": v.unflatten(-1, (HKV, D))}
    base = inputs(T, HQ, HKV, D)
    swapped = {name: base[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    expanded = {name: base[name][:1].expand(2, -1, -1, -1) for name in "qkv"}
    for given in (sliced, swapped, expanded):
        check_forward(backend, base | given)
        check_backward(backend, base | given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_and_nan(backend):
    """Scores far apart keep their softmax; a NaN reaches every query that sees it, and no other row."""
    args = inputs(140, 2, 1, 64, B=3, softmax_scale=30.0)
    out, _ = check_forward(backend, args)
    args["v"][0, 100, 0, 3] = NAN
    args["k"][1, 50] = NAN
    broken, _ = ops.handle("delta_attention_fwd", backend)(**args)
    assert broken[0, 100:, :, 3].isnan().all() and broken[1, 50:].isnan().all()
    assert torch.equal(broken[2], out[2])


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [0, 1, 3, 16, 64])
@pytest.mark.parametrize("appended", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache(backend, page_size, appended, packed, dtype):
    case = {"page_size": page_size, "appended": appended, "packed": packed, "dtype": dtype, "prologue": True}
    check_cache(backend, cache_inputs([150, 61, 97], [31, 1, 20], **case))
    check_cache(backend, cache_inputs([150, 61, 97], [31, 1, 20], leftpad=[70, 0, 3], window_left=40, **case))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("page_size", [0, 16])
def test_cache_softmax_options(backend, options, page_size):
    check_cache(backend, cache_inputs([130, 0, 40], [40, 25, 0], page_size=page_size, HQ=5, HKV=1, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_cache_padding_rows(backend, packed):
    args = cache_inputs([30, 9, 12], [20, 20, 20], packed=packed, state_indices=ints(4, -1, 0))
    args["k_cache"][1] = args["v_cache"][1] = NAN
    args["cache_seqlens"][1] = 2**30  # a padding row's arguments mean nothing
    out, lse = check_cache(backend, args)
    padding = (out[0, 20:40], lse[0, :, 20:40]) if packed else (out[1], lse[1])
    assert (padding[0] == 0).all() and padding[1].isneginf().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_queries_than_keys(backend):
    """Keys already appended, but fewer than queries: the first queries stand before slot 0 and see nothing."""
    for causal in (True, False):
        check_cache(backend, cache_inputs([7, 40], [20, 20], appended=False, prologue=True, causal=causal))
    check_cache(backend, cache_inputs([3, 30], [20, 20], leftpad=[5, 45]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cache_strides(backend):
    """Heads-first caches, and pages that are slices of wider ones."""
    for page_size in (0, 16):
        args = cache_inputs([60, 33], [20, 18], page_size=page_size)
        args["k_cache"] = args["k_cache"].transpose(1, 2).contiguous().transpose(1, 2)
        wider = torch.full((*args["v_cache"].shape[:3], 100), NAN)
        wider[..., 20:52] = args["v_cache"]
        args["v_cache"] = wider[..., 20:52]
        check_cache(backend, args)


# ---- bits ----------------------------------------------------------------------------------------------------------


def run_everything(dtype):
    """Results of every op on one set of inputs."""
    torch.manual_seed(1)
    args = inputs(200, 10, 2, 72, dtype, prologue=True, token_mask=holes(2, 200))
    results = list(ops.handle("delta_attention_fwd", "cpu")(**args))
    given = defaults(reference.delta_attention_bwd, **args, dout=torch.randn(args["q"].shape).to(dtype))
    given["out"], given["lse"] = results
    results += ops.handle("delta_attention_bwd", "cpu")(**given)
    cache = cache_inputs([150, 61, 97], [31, 1, 20], page_size=16, dtype=dtype)
    return results + list(with_cache(ops.handle("delta_attention_with_kvcache", "cpu"), cache))


@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_count_leaves_the_bits(dtype):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run_everything(dtype)
        torch.set_num_threads(5)
        five = run_everything(dtype)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, five, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_touch_each_other(backend):
    """A permuted batch gives permuted results, packed rows those of a batch, and a row alone its own, to the bit."""
    forward, backward = (ops.handle(f"delta_attention_{way}", backend) for way in ("fwd", "bwd"))
    args = inputs(150, 6, 2, 64, torch.bfloat16, B=3)
    dout = torch.randn(args["q"].shape).bfloat16()

    def run(order, packed=False):
        rows = {name: args[name][order] for name in "qkv"}
        if packed:
            rows = {name: x.flatten(0, 1)[None] for name, x in rows.items()}
            rows["cu_seqlens"] = ints(*range(0, 150 * len(order) + 1, 150))
        given = args | rows
        out, lse = forward(**given)
        cotangent = dout[order].reshape(out.shape)
        grads = backward(**defaults(reference.delta_attention_bwd, **given, dout=cotangent, out=out, lse=lse))
        if packed:
            lse = lse[0].unflatten(1, (len(order), 150)).transpose(0, 1)
        return [x.reshape(len(order), -1) for x in (out, lse, *grads)]

    whole = run([0, 1, 2])
    for order in ([2, 0, 1], [1]):
        for packed in (False, True):
            found = run(order, packed)
            assert all(torch.equal(a, b[order]) for a, b in zip(found, whole, strict=True))

    case = cache_inputs([90, 30, 55], [25, 25, 25], page_size=16, dtype=torch.bfloat16)
    op = ops.handle("delta_attention_with_kvcache", backend)
    out, lse = with_cache(op, case)
    per_row = ("q", "cache_seqlens", "block_table")
    alone = with_cache(op, case | {name: case[name][[1]] for name in per_row})
    assert torch.equal(alone[0][0], out[1]) and torch.equal(alone[1][0], lse[1])


@pytest.mark.parametrize("isa", _cpu.supported_isas())
def test_instruction_sets(isa):
    active = _cpu.isa()
    _cpu.set_isa(isa)
    try:
        for dtype in DTYPES:
            check_forward("cpu", inputs(131, 6, 2, 40, dtype, prologue=True, token_mask=holes(2, 131)))
            window = {"causal": False, "window_left": 50, "window_right": 30}
            check_backward("cpu", inputs(131, 6, 2, 40, dtype, softcap=2.0, **window))
            check_backward("cpu", inputs(90, 4, 4, 96, dtype, causal=False, packed=(0, 20, 60, 60)))
            check_cache("cpu", cache_inputs([150, 61], [31, 20], page_size=3, dtype=dtype, prologue=True))
    finally:
        _cpu.set_isa(active)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend):
    for args in (inputs(0, 4, 2, 8), inputs(5, 4, 2, 8, B=0), inputs(5, 4, 2, 8, packed=(0,))):
        out, lse = ops.handle("delta_attention_fwd", backend)(**args)
        assert (out == 0).all() and lse.isneginf().all()
        given = defaults(reference.delta_attention_bwd, **args, dout=torch.ones_like(out), out=out, lse=lse)
        assert all((grad == 0).all() for grad in ops.handle("delta_attention_bwd", backend)(**given))
