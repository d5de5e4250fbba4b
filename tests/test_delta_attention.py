"""Attention kernels without a cache, forward and backward, and what leaves their bits alone."""

import math

import pytest
import torch
from attention_checks import (
    BACKENDS,
    CASES,
    DTYPES,
    HALVES,
    NAN,
    cache_inputs,
    cases,
    check_backward,
    check_cache,
    check_forward,
    holes,
    inputs,
    prologue_inputs,
    sized,
    with_cache,
)
from attention_inputs import defaults
from gradients import ints
from kernel_checks import CUDA

from deltamem_kernels import _cpu, ops
from deltamem_kernels.reference import delta_attention as reference

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
CUDA_SHAPES = [(1, 4, 4, 64), (17, 4, 1, 128), (70, 5, 1, 64), (130, 2, 1, 64), (130, 2, 2, 128)]


# ---- over the call's own keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype", "shape"), cases(DTYPES, SHAPES, CUDA_SHAPES))
def test_forward(backend, dtype, shape):
    check_forward(backend, inputs(*shape, dtype))
    args = inputs(*shape, dtype, prologue=True, causal=False)
    if shape[3] == 1:  # RMSNorm of one channel is little but its sign: a small eps would magnify any rounding near 0
        args["norm_eps"] = 1.0
    check_forward(backend, args)


# With one token, dq = dk = 0 and no error is eager's.
@pytest.mark.parametrize(("backend", "dtype", "shape"), cases(DTYPES, SHAPES[1:], CUDA_SHAPES[1:]))
def test_backward(backend, dtype, shape):
    check_backward(backend, inputs(*shape, dtype))


@pytest.mark.parametrize(("backend", "dtype", "case"), cases([torch.float32, torch.bfloat16], CASES, CASES))
@pytest.mark.parametrize("rows", ["dense", "masked", "packed"])
def test_softmax_options(backend, dtype, case, rows):
    options = CASES[case]
    shape = (130, 2, 1, 64) if backend == "cuda" else (210, 6, 2, 48)
    T = 210 if rows == "packed" else shape[0]
    if rows == "packed":  # empty sequences in front, between and behind; tokens past the last
        options = options | {"packed": (0, 0, 1, 60, 60, 200, 200)}
    args = inputs(T, *shape[1:], dtype, **options)
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
    T, HQ, HKV, D, dtype = sized(backend, 90, 4, 2, 32, torch.bfloat16)
    args = inputs(T, HQ, HKV, D, dtype, rotary_interleaved=interleaved, packed=(0, 33, 33, 85))
    args |= prologue_inputs(1, T, HQ, D, dtype, gathered)
    if positions:
        args["positions"] = torch.randint(0, 400, (1, 90), dtype=torch.int32)
    check_forward(backend, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", ["delta_q", "q_norm_weight", "rotary_cos"])
def test_parts_of_the_prologue(backend, part):
    args = inputs(*sized(backend, 40, 4, 2, 32), prologue=True)
    together = {"delta_q": ("reads", "delta_q"), "rotary_cos": ("rotary_cos", "rotary_sin")}.get(part, (part,))
    others = ("reads", "delta_q", "q_norm_weight", "rotary_cos", "rotary_sin")
    check_forward(backend, args | {name: None for name in others if name not in together})


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    """Slices of one packed projection, at an odd address, heads-first storage, one row expanded over the batch."""
    T, HQ, HKV, D, dtype = sized(backend, 65, 4, 2, 40)
    qkv = torch.randn(2, T, (HQ + 2 * HKV) * D + 1).to(dtype)[..., 1:]
    q, k, v = qkv.split([HQ * D, HKV * D, HKV * D], -1)
    sliced = {"q": q.unflatten(-1, (HQ, D)), "k": k.unflatten(-1, (HKV, D)), "v": v.unflatten(-1, (HKV, D))}
    base = inputs(T, HQ, HKV, D, dtype)
    swapped = {name: base[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    expanded = {name: base[name][:1].expand(2, -1, -1, -1) for name in "qkv"}
    for given in (sliced, swapped, expanded):
        check_forward(backend, base | given)
        check_backward(backend, base | given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_and_nan(backend):
    """Scores far apart keep their softmax; a NaN reaches every query that sees it, and no other row."""
    args = inputs(*sized(backend, 140, 2, 1, 64), B=3, softmax_scale=30.0)
    out, _ = check_forward(backend, args)
    args["v"][0, 100, 0, 3] = NAN
    args["k"][1, 50] = NAN
    broken, _ = ops.handle("delta_attention_fwd", backend)(**args)
    assert broken[0, 100:, :, 3].isnan().all() and broken[1, 50:].isnan().all()
    assert torch.equal(broken[2], out[2])


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
    args = inputs(*sized(backend, 150, 6, 2, 64, torch.bfloat16), B=3)
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

    case = cache_inputs([90, 30, 55], [25, 25, 25], D=64, page_size=16, dtype=torch.bfloat16)
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
    heads, dtype = sized(backend, 5, 4, 2, 8)[1:4], torch.bfloat16
    for args in (inputs(0, *heads, dtype), inputs(5, *heads, dtype, B=0), inputs(5, *heads, dtype, packed=(0,))):
        out, lse = ops.handle("delta_attention_fwd", backend)(**args)
        assert (out == 0).all() and lse.isneginf().all()
        given = defaults(reference.delta_attention_bwd, **args, dout=torch.ones_like(out), out=out, lse=lse)
        assert all((grad == 0).all() for grad in ops.handle("delta_attention_bwd", backend)(**given))


# ---- the CUDA kernels -----------------------------------------------------------------------------------------------


def forward_and_backward(args):
    out, lse = ops.handle("delta_attention_fwd", "cuda")(**args)
    dout = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    given = defaults(reference.delta_attention_bwd, **args, dout=dout, out=out, lse=lse)
    return [out, lse, *ops.handle("delta_attention_bwd", "cuda")(**given)]


@pytest.mark.parametrize("backend", [CUDA])
@pytest.mark.parametrize("half", [1, 5, 6, 64])
@pytest.mark.parametrize("HR", [(1, 8), (1, 5), (3, 4)])
def test_prologue_in_vectors_or_not(backend, half, HR):
    """Rotated channels that a lane's share divides, or not; weights of eight columns at a time, and what is left."""
    T, HQ, D, dtype = 9, 3, 128, torch.float16
    args = inputs(T, HQ, 1, D, dtype) | prologue_inputs(2, T, HQ, D, dtype)
    angle = torch.randn(400, half)
    args |= {"rotary_cos": angle.cos(), "rotary_sin": angle.sin().to(dtype)}
    args["reads"] = torch.randn(2, T, 2 * HR[0], HR[1])[:, :, ::2]
    args["delta_q"] = 0.3 * torch.randn(HQ * D, math.prod(HR))
    check_forward(backend, args)


@pytest.mark.parametrize("backend", [CUDA])
@pytest.mark.parametrize("dtype", HALVES)
def test_zero_correction_is_plain_attention(backend, dtype):
    args = inputs(70, 4, 2, 64, dtype)
    plain = ops.handle("delta_attention_fwd", backend)(**args)
    zeros = {"reads": torch.randn(2, 70, 1, 8), "delta_q": torch.zeros(4 * 64, 8)}
    corrected = ops.handle("delta_attention_fwd", backend)(**args | zeros)
    assert all(torch.equal(a, b) for a, b in zip(plain, corrected, strict=True))


@pytest.mark.parametrize("backend", [CUDA])
@pytest.mark.parametrize("schedule", ["order", "random:1", "random:2", "priority:3", "priority:4"])
def test_schedules_leave_the_bits(backend, schedule, monkeypatch):
    """Two runs are equal to the bit, in whichever order threads run; on a device the schedule means nothing."""
    args = inputs(130, 2, 1, 64, torch.bfloat16, token_mask=holes(2, 130))
    cache = cache_inputs([150, 61, 97], [31, 1, 20], D=64, page_size=16, dtype=torch.bfloat16, prologue=True)

    def run():
        return forward_and_backward(args) + list(with_cache(ops.handle("delta_attention_with_kvcache", backend), cache))

    monkeypatch.setenv("DELTAMEM_EMULATION_SCHEDULE", "order")
    first = run()
    monkeypatch.setenv("DELTAMEM_EMULATION_SCHEDULE", schedule)
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("backend", [CUDA])
@pytest.mark.parametrize("options", [{"D": 96, "dtype": torch.float16}, {"D": 64, "dtype": torch.float32}], ids=str)
def test_what_the_kernels_are_not_built_for(backend, options):
    with pytest.raises((RuntimeError, NotImplementedError), match="delta_attention_fwd: q must"):
        ops.handle("delta_attention_fwd", backend)(**inputs(5, 2, 1, **options))
