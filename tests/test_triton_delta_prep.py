"""delta_prep on Triton: the cases of test_delta_prep.py at sizes that the interpreter finishes."""

import pytest
import torch
from kernel_checks import as_fp64, assert_within_budget, call, check_against_reference, map_tensors, same_bits
from test_delta_prep import BF16, FP16, FP32, NAN, NO_MEMORY, NO_NORM, NO_ROTARY, bwd_args, cache_args, prep_args

TINY = {"HQ": 2, "HKV": 1, "D": 16, "R": 4, "T": 5}
CASES = {
    "fp32": {"D": 64},
    "bf16": {"dtype": BF16, "R": 8, "tables": 3},
    "fp16_weights_fp32": {"dtype": FP16, "weights": FP32, "positions": True},
    "head_24_half_rotary": {"D": 24, "rotary": 0.5, "dtype": BF16},
    "head_odd": {"D": 37, "R": 3, "rotary": 0.7},
    "head_1": {"D": 1, "R": 1, "absent": (*NO_ROTARY, *NO_NORM)},
    "interleaved": {"interleaved": True, "D": 20, "rotary": 0.6},
    "many_states": {"H": 3, "R": 4},
    "packed": {"packed": (0, 3, 3, 7, 8), "T": 10},
    "only_q": {"absent": ("k", "v", "delta_k", "delta_v", "k_norm_weight")},
    "only_v": {"absent": ("q", "k", "delta_q", "delta_k", *NO_NORM)},
    "k_corrected_no_norm": {"absent": ("delta_q", "delta_v", *NO_NORM)},
    "plain": {"absent": (*NO_MEMORY, *NO_NORM, *NO_ROTARY)},
    "no_tokens": {"T": 0},
    "prefill_tile": {"B": 1, "T": 67, "HQ": 1, "D": 4, "positions": True},
}


@pytest.mark.parametrize("case", CASES)
def test_against_reference(case):
    args = prep_args(**{**TINY, **CASES[case]})
    check_against_reference("delta_prep_fwd", "triton", args)
    check_against_reference("delta_prep_bwd", "triton", bwd_args(args))


def test_chunks_of_tokens_add_up_in_order(monkeypatch):
    from deltamem_kernels.triton_ops import delta_prep_bwd

    monkeypatch.setattr(delta_prep_bwd, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(delta_prep_bwd, "BWD_ELEMENTS", 16)
    args = bwd_args(prep_args(**{**TINY, "B": 1, "T": 27, "D": 8}))
    first = check_against_reference("delta_prep_bwd", "triton", args)
    assert all(map(same_bits, first, call("delta_prep_bwd", "triton", args)))


@pytest.mark.parametrize("name", ("dq_prep", "dv_prep"))
def test_one_cotangent(name):
    args = bwd_args(prep_args(**TINY), rotary_grad=name == "dq_prep")
    for other in {"dq_prep", "dk_prep", "dv_prep"} - {name}:
        args[other] = None
    check_against_reference("delta_prep_bwd", "triton", args)


def test_any_outer_strides():
    args = prep_args(**TINY, H=2, tables=3)
    shuffled = {
        **map_tensors(args, torch.clone),
        "q": args["q"].permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
        "reads": args["reads"].transpose(1, 2).contiguous().transpose(1, 2),
        "delta_q": torch.nn.functional.pad(args["delta_q"], (2, 3))[:, 2:-3],
        "rotary_cos": args["rotary_cos"].transpose(0, 1).contiguous().transpose(0, 1),
    }
    backward = bwd_args(args)
    turned = backward["dq_prep"].transpose(0, 1).contiguous().transpose(0, 1)
    other = {**backward, **shuffled, "dq_prep": turned}
    for op, a, b in (("delta_prep_fwd", args, shuffled), ("delta_prep_bwd", backward, other)):
        assert all(map(same_bits, call(op, "triton", a), call(op, "triton", b)))


def test_rows_past_the_last_sequence_are_zero_whatever_they_hold():
    args = prep_args(**{**TINY, "T": 9}, packed=(0, 2, 6), positions=True)
    backward = bwd_args(args)
    for name in ("q", "k", "v", "reads"):
        backward[name] = args[name] = args[name].clone()
        args[name][:, 6:] = NAN
    args["positions"][:, 6:] = 1 << 30
    for name in ("dq_prep", "dk_prep", "dv_prep"):
        backward[name][:, 6:] = NAN
    for op, given in (("delta_prep_fwd", args), ("delta_prep_bwd", backward)):
        for x in check_against_reference(op, "triton", given)[:3]:
            assert (x[:, 6:] == 0).all()


CACHE_CASES = {
    "dense": {},
    "paged": {"page": 8},
    "paged_interleaved": {"page": 1, "dtype": FP16, "interleaved": True},
    "masked_paged_padding": {"mask": True, "page": 4, "padding": True},
    "packed_paged": {"packed": (0, 1, 2, 7, 12), "T": 13, "page": 16, "padding": True},
    "gathered": {"tables": 3},
}


@pytest.mark.parametrize("case", CACHE_CASES)
def test_append(case):
    """Appended rows against the reference; every other slot still holds the NaN that it held, to the bit."""
    args = cache_args(**{"D": 16, "R": 4, "HQ": 1, **CACHE_CASES[case]})
    plain, exact = map_tensors(args, torch.clone), as_fp64(args)
    before = args["k_cache"].clone()
    for name, changed in (("triton", args), ("reference", plain), ("reference", exact)):
        call("delta_prep_with_kvcache", name, changed)
    for cache in ("k_cache", "v_cache"):
        got, same, want = (x[cache] for x in (args, plain, exact))
        written = ~want.isnan()
        assert_within_budget(got[written], same[written], want[written])
        assert same_bits(got[~written], before[~written])
