"""Attention on Triton, at sizes that the interpreter finishes: tiles of 16 x 16, so that every tile has edges."""

import math

import pytest
import torch
from attention_checks import cache_inputs, check_cache
from attention_inputs import attention_args, defaults
from gradients import ints
from kernel_checks import as_fp64, call, map_tensors, same_bits
from test_reference_cache import cache_case

from deltamem_kernels import ops
from deltamem_kernels.reference import delta_attention as reference

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")


def in_order(op, args):
    """Arguments in the order of the op's schema."""
    return defaults(op, **args)


def check(got, plain, want, slack):
    """|got - want| <= 2 max |plain - want| + slack + one rounding unit; -inf (no visible key) exactly where it is."""
    for ours, theirs, exact in zip(got, plain, want, strict=True):
        nothing = exact.isneginf()
        assert ours.dtype == theirs.dtype and torch.equal(ours.isneginf(), nothing)
        ours, theirs, exact = (x.double().masked_fill(nothing, 0) for x in (ours, theirs, exact))
        allowed = 2 * (theirs - exact).abs().amax() + slack if exact.numel() else 0
        unit = torch.finfo(got[0].dtype).eps * exact.abs()
        assert ((ours - exact).abs() <= allowed + unit).all(), ((ours - exact).abs() - unit).max() / allowed
    return got


def rounded_weights(v):
    """What P rounded to a 16-bit dtype, as flash attention does, adds to |out - exact|: sum of P |v| u."""
    return 0 if v.dtype == FP32 else torch.finfo(v.dtype).eps / 2 * v.nan_to_num().abs().amax().item()


def check_forward(args):
    op = "delta_attention_fwd"
    results = (call(op, "triton", args), call(op, "reference", args), call(op, "reference", as_fp64(args)))
    return check(*results, rounded_weights(args["v"]) if args["v"].numel() else 0)


def check_backward(args):
    """dq sums keys times dout . v - delta, which cancel: their rounding in fp32 counts, however small the result."""
    op = "delta_attention_bwd"
    results = (call(op, "triton", args), call(op, "reference", args), call(op, "reference", as_fp64(args)))
    if not args["q"].numel():
        return results[0]
    largest = [args[name].nan_to_num().abs().amax().item() for name in ("dout", "v", "k")]
    terms = args["q"].shape[-1] ** 0.5 * abs(args["softmax_scale"]) * math.prod(largest)
    return check(*results, torch.finfo(FP32).eps * terms)


def fwd_args(dtype=FP32, masked=False, **options):
    args = map_tensors(attention_args(**options), lambda x: x.to(dtype) if x.is_floating_point() else x)
    if args["reads"] is not None:
        args["reads"] = args["reads"].float()
    if masked:
        args["token_mask"] = torch.rand(args["q"].shape[:2]) > 0.4
        for name in ("q", "k", "v"):
            args[name][~args["token_mask"]] = NAN
    return in_order(reference.delta_attention_fwd, args)


FEW = {"HQ": 2, "HKV": 1}  # heads, where their grouping is not the subject
FORWARD = {
    "one_token": {"T": 1, "D": 16},
    "causal": {"T": 37, "D": 16},
    "full": {"T": 40, "causal": False},
    "prologue": {"T": 37, "D": 16, "prologue": 8},
    "bf16": {"T": 37, "D": 16, "prologue": 8, "dtype": BF16},
    "fp16_one_group": {"T": 20, "D": 32, "prologue": 16, "HKV": 1, "dtype": FP16},
    "rotary_part": {"T": 21, "D": 20, "prologue": 4},
    "rotary_part_of_a_power_of_two": {"T": 21, "D": 16, "prologue": 4},
    "interleaved": {"T": 21, "D": 20, "prologue": 4, "rotary_interleaved": True},
    "window": {"T": 70, "window": (5, -1), "B": 1, **FEW},
    "band": {"T": 70, "window": (7, 3), "causal": False, "B": 1, **FEW},
    "ahead": {"T": 40, "window": (-1, 2), "causal": False, "B": 1, **FEW},
    "huge_window": {"T": 40, "window": (0, 2**62), "causal": False, "B": 1, **FEW},
    "softcap": {"T": 37, "softcap": 2.0},
    "negative_scale": {"T": 21, "softmax_scale": -0.3, "prologue": 2},
    "masked": {"T": 37, "prologue": 2, "masked": True},
    "masked_full": {"T": 37, "causal": False, "masked": True, **FEW},
    "packed": {"T": 61, "packed": (0, 20, 20, 57), "prologue": 2},
    "packed_masked_window": {"T": 61, "packed": (0, 20, 20, 57), "masked": True, "window": (9, -1), **FEW},
    "packed_nothing": {"T": 20, "packed": (0, 0), "prologue": 2},
    "no_tokens": {"T": 0},
}


@pytest.mark.parametrize("case", FORWARD)
def test_forward(case):
    check_forward(fwd_args(**FORWARD[case]))


def test_positions_and_gathered_tables():
    args = fwd_args(T=18, prologue=2)
    args["positions"] = torch.randint(0, 40, (2, 18), dtype=torch.int32)
    by_position = check_forward(args)
    at = args["positions"].long()
    gathered = {name: args[name][at] for name in ("rotary_cos", "rotary_sin")}
    assert all(map(same_bits, by_position, call("delta_attention_fwd", "triton", {**args, **gathered})))


def test_strided_inputs():
    args = fwd_args(T=18, D=16, prologue=8)
    packed = torch.cat([args[name] for name in ("q", "k", "v")], 2)
    q, k, v = packed.split((4, 2, 2), 2)
    heads_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    reads = args["reads"][:1].expand(2, -1, -1, -1)
    check_forward({**args, "q": q, "k": heads_first, "v": v, "reads": reads})


def cached(layout, dtype, softmax, appended=True):
    """Arguments over the caches of the reference's tests: padding rows, NaN slots, absurd pages."""
    case = cache_case(layout)
    if not appended:
        case["cache_seqlens"] = ints(7, 5, 9)
        for name in ("k_cache", "v_cache"):  # the last slots of a row, filled where a page is known
            case[name] = torch.where(case[name].isnan(), 0.5, case[name])
    else:
        call("delta_prep_with_kvcache", "reference", prep_args_of(case))
    case = map_tensors(case, lambda x: x.to(dtype) if x.is_floating_point() else x)
    case["reads"] = case["reads"].float()
    batch, tokens, heads, _ = case["q"].shape
    case |= {"appended": appended, "out": torch.full_like(case["q"], NAN), **softmax}
    case["lse"] = torch.full((batch, heads, tokens), NAN)
    return in_order(reference.delta_attention_with_kvcache, case)


def prep_args_of(case):
    from deltamem_kernels.reference import delta_prep

    return in_order(delta_prep.delta_prep_with_kvcache, case)


SOFTMAX = {
    "causal": {},
    "full": {"causal": False},
    "window_softcap": {"window_left": 3, "softcap": 2.0},
    "band": {"causal": False, "window_left": 1, "window_right": 1},
    "splits": {"num_splits": 3},
}


def check_cached(args):
    results = []
    for backend, given in (("triton", args), ("reference", args), ("reference", as_fp64(args))):
        given = {**given, "out": given["out"].clone(), "lse": given["lse"].clone()}
        call_in_place(backend, given)
        results.append((given["out"], given["lse"]))
    return check(*results, rounded_weights(args["v_cache"]))


def call_in_place(backend, args):
    ops.handle("delta_attention_with_kvcache", backend)(*args.values())


@pytest.mark.parametrize("layout", ["dense", "paged", "packed"])
@pytest.mark.parametrize("softmax", SOFTMAX)
def test_cache(layout, softmax):
    check_cached(cached(layout, FP32, SOFTMAX[softmax]))


@pytest.mark.parametrize("layout", ["dense", "paged"])
def test_keys_already_in_the_cache(layout):
    check_cached(cached(layout, BF16, {}, appended=False))


@pytest.mark.parametrize("causal", (True, False))
def test_more_queries_than_keys(causal):
    """Keys already appended, but fewer than queries: the first queries stand before slot 0 and see nothing."""
    case = cache_inputs([7, 40], [20, 20], D=16, page_size=3, appended=False, prologue=True, causal=causal)
    check_cache("triton", case)


def long_cache(page_size):
    """70 to 90 slots behind 20 queries: several key blocks, several splits, pages wider than a block."""
    S, D = 96, 16
    args = {"q": torch.randn(2, 20, 2, D), "cache_seqlens": ints(70, 51), "cache_leftpad": ints(0, 18)}
    for name in ("k_cache", "v_cache"):
        args[name] = torch.randn(2, S, 1, D)
        args[name][0, 90:], args[name][1, 71:], args[name][1, :18] = NAN, NAN, NAN
    if page_size:
        pages = S // page_size
        table = torch.randperm(2 * pages, dtype=torch.int32).view(2, pages)
        for name in ("k_cache", "v_cache"):
            paged = torch.empty(2 * pages, page_size, 1, D)
            paged[table.long()] = args[name].unflatten(1, (pages, page_size))
            args[name] = paged
        args["block_table"] = table
    args |= {"out": torch.full((2, 20, 2, D), NAN), "lse": torch.full((2, 2, 20), NAN), "appended": True}
    return in_order(reference.delta_attention_with_kvcache, args)


@pytest.mark.parametrize("page_size", (0, 4, 16, 32))
def test_splits_agree(page_size):
    args = long_cache(page_size)
    whole = check_cached({**args, "num_splits": 1})
    for splits in (3, 9):
        parts = check_cached({**args, "num_splits": splits})
        assert torch.allclose(parts[0], whole[0], atol=1e-6)


def test_a_row_does_not_depend_on_its_neighbours():
    args = long_cache(16)
    for splits in (1, 3):
        both = check_cached({**args, "num_splits": splits})
        names = ("q", "cache_seqlens", "cache_leftpad", "block_table", "out", "lse")
        alone = check_cached({**args, **{name: args[name][1:] for name in names}, "num_splits": splits})
        assert all(same_bits(x[1:], y) for x, y in zip(both, alone, strict=True))


BACKWARD = {name: options for name, options in FORWARD.items() if "prologue" not in options} | {
    "bf16": {"T": 37, "D": 16, "dtype": BF16},
    "fp16_one_group": {"T": 20, "D": 32, "HKV": 1, "dtype": FP16},
    "odd_channels": {"T": 21, "D": 20, "HQ": 6, "HKV": 2},
    "masked": {"T": 37, "masked": True},
    "negative_scale": {"T": 21, "softmax_scale": -0.3, "softcap": 3.0},
    "packed": {"T": 61, "packed": (0, 20, 20, 57)},
    "packed_nothing": {"T": 20, "packed": (0, 0)},
}


def bwd_args(args):
    out, lse = call("delta_attention_fwd", "reference", args)
    dout = torch.randn(out.shape).to(out.dtype)
    if args["token_mask"] is not None:
        dout[~args["token_mask"]] = NAN
    return in_order(reference.delta_attention_bwd, {**args, "dout": dout, "out": out, "lse": lse.float()})


@pytest.mark.parametrize("case", BACKWARD)
def test_backward(case):
    args = bwd_args(fwd_args(**BACKWARD[case]))
    check_backward(args)


@pytest.mark.parametrize("masked", (False, True))
def test_backward_of_scores_far_below_those_of_hidden_keys(masked):
    """Keys past the end of a tile, or masked, have zeros for channels: exp(0 - lse) overflows."""
    args = fwd_args(T=20, D=16, B=1, HQ=2, causal=masked, masked=masked, softmax_scale=20.0)
    args["q"], args["k"] = (1 + torch.rand(args[name].shape) for name in ("q", "k"))
    args["k"] *= -1
    check_backward(bwd_args(args))


def test_backward_of_strided_inputs_repeats_to_the_bit():
    args = bwd_args(fwd_args(T=37, D=16))
    strided = {name: args[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v", "out")}
    dout = torch.randn(2, 1, 4, 16).expand(2, 37, 4, 16)
    first = check_backward({**args, **strided, "dout": dout})
    again = call("delta_attention_bwd", "triton", {**args, "dout": dout.contiguous()})
    assert all(map(same_bits, first, again))
