"""delta_prep: forward, backward and the append to a cache, against the fp64 reference."""

import pytest
import torch
from kernel_checks import (
    CUDA,
    ISAS,
    TRITON,
    as_fp64,
    assert_within_budget,
    call,
    check_against_reference,
    instruction_set,
    map_tensors,
    same_bits,
    threads,
)

BACKENDS = ["cpu", CUDA, TRITON]
NAN = float("nan")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def prep_args(
    B=2, T=7, HQ=4, HKV=2, D=64, H=1, R=8, dtype=FP32, weights=None, rotary=1.0, interleaved=False,
    tables=2, positions=False, packed=None, absent=(),
):  # fmt: skip
    """Arguments of delta_prep_fwd; q, k, v are slices of one projection. absent: names that are None."""
    B, weights = 1 if packed else B, weights or dtype
    half = max(1, int(rotary * D) // 2)
    qkv = torch.randn(B, T, (HQ + 2 * HKV) * D).to(dtype)
    q, k, v = (x.unflatten(-1, (-1, D)) for x in qkv.split([HQ * D, HKV * D, HKV * D], -1))
    angles = torch.randn(*((64,) if tables == 2 else (B, T)), half)
    args = {
        "q": q,
        "k": k,
        "v": v,
        "reads": torch.randn(B, T, H, R),
        **{
            f"delta_{x}": (0.3 * torch.randn(n * D, H * R)).to(weights)
            for x, n in zip("qkv", (HQ, HKV, HKV), strict=True)
        },
        "q_norm_weight": (1 + 0.3 * torch.randn(D)).to(weights),
        "k_norm_weight": (1 + 0.3 * torch.randn(D)).to(weights),
        "norm_eps": 1e-6,
        "rotary_cos": angles.cos().to(weights),
        "rotary_sin": angles.sin().to(weights),
        "rotary_interleaved": interleaved,
        "positions": torch.randint(0, 64, (B, T), dtype=torch.int32) if positions else None,
        "cu_seqlens": ints(*packed) if packed else None,
    }
    for name in absent:
        args[name] = None
    return args


NO_MEMORY = ("reads", "delta_q", "delta_k", "delta_v")
NO_NORM = ("q_norm_weight", "k_norm_weight")
NO_ROTARY = ("rotary_cos", "rotary_sin")
CASES = {
    "fp32": {},
    "bf16": {"dtype": BF16},
    "fp16": {"dtype": FP16},
    "bf16_weights_fp32": {"dtype": BF16, "weights": FP32},
    "fp32_weights_fp16": {"weights": FP16},
    "head_128": {"D": 128, "R": 16, "dtype": BF16},
    "head_256": {"D": 256, "H": 4},
    "head_256_one_state": {"D": 256, "dtype": BF16},
    "head_96_half_rotary": {"D": 96, "rotary": 0.5, "dtype": BF16, "weights": FP32},
    "head_odd": {"D": 37, "R": 3, "rotary": 0.7},
    # with one channel the norm's gradient is all cancellation
    "head_1": {"D": 1, "R": 1, "absent": (*NO_ROTARY, *NO_NORM)},
    "head_2": {"D": 2, "R": 1, "H": 3},
    "interleaved": {"interleaved": True},
    "interleaved_partial": {"interleaved": True, "D": 80, "rotary": 0.6, "dtype": FP16},
    "gathered_tables": {"tables": 3, "T": 70},
    "positions": {"positions": True},
    "many_states": {"H": 4, "R": 16},
    "one_token": {"B": 1, "T": 1, "dtype": BF16},
    "many_tokens": {"B": 3, "T": 50, "HQ": 2, "HKV": 1},
    # the CUDA backward's parts have two chunks of tokens each
    "long": {"B": 1, "T": 8300, "HQ": 1, "HKV": 1, "D": 8, "tables": 3},
    "long_generic": {"B": 1, "T": 8300, "HQ": 1, "HKV": 1, "D": 4, "R": 2, "tables": 3, "absent": NO_NORM},
    "packed": {"packed": (0, 3, 3, 11, 12), "T": 15},
    "packed_full": {"packed": (0, 20, 41), "T": 41, "interleaved": True},
    "packed_empty": {"packed": (0, 0), "T": 3},
    "packed_positions": {"packed": (0, 4, 9), "T": 12, "positions": True},
    "only_q": {"absent": ("k", "v", "delta_k", "delta_v", "k_norm_weight")},
    "only_k_v": {"absent": ("q", "delta_q", "q_norm_weight")},
    "only_v": {"absent": ("q", "k", "delta_q", "delta_k", *NO_NORM)},
    "k_corrected": {"absent": ("delta_q", "delta_v")},
    "no_memory": {"absent": NO_MEMORY},
    "no_norm": {"absent": NO_NORM},
    "no_rotary": {"absent": NO_ROTARY},
    "plain": {"absent": (*NO_MEMORY, *NO_NORM, *NO_ROTARY)},
    "no_tokens": {"T": 0},
}  # fmt: skip


def cotangents(args):
    return {f"d{x}_prep": None if args[x] is None else torch.randn(args[x].shape).to(args[x].dtype) for x in "qkv"}


def bwd_args(args, rotary_grad=None):
    with_tables = args["rotary_cos"] is not None
    return {**cotangents(args), **args, "rotary_grad": with_tables if rotary_grad is None else rotary_grad}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend, case):
    check_against_reference("delta_prep_fwd", backend, prep_args(**CASES[case]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward(backend, case):
    check_against_reference("delta_prep_bwd", backend, bwd_args(prep_args(**CASES[case])))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16))
@pytest.mark.parametrize("D", (24, 64, 96, 128, 256))
def test_instruction_sets(isa, dtype, D):
    args = prep_args(D=D, dtype=dtype, R=8 if D < 128 else 12, interleaved=D in (24, 128), B=1)
    with instruction_set(isa):
        check_against_reference("delta_prep_fwd", "cpu", args)
        check_against_reference("delta_prep_bwd", "cpu", bwd_args(args))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_cotangent(backend):
    for name in ("dq_prep", "dk_prep", "dv_prep"):
        args = bwd_args(prep_args(), rotary_grad=name == "dq_prep")
        for other in ("dq_prep", "dk_prep", "dv_prep"):
            args[other] = args[other] if other == name else None
        check_against_reference("delta_prep_bwd", backend, args)


@pytest.mark.parametrize("T", (1, 6, 300))
def test_threads_do_not_change_bits(T):
    args = prep_args(B=1, T=T, HQ=8, D=128, dtype=BF16, tables=3)
    backward = bwd_args(args)
    with threads(1):
        one = (*call("delta_prep_fwd", "cpu", args), *call("delta_prep_bwd", "cpu", backward))
    with threads(5):
        five = (*call("delta_prep_fwd", "cpu", args), *call("delta_prep_bwd", "cpu", backward))
    assert all(map(same_bits, one, five))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_does_not_see_its_neighbours(backend):
    args = prep_args(B=1, T=40, dtype=BF16, positions=True)
    whole = call("delta_prep_fwd", backend, args)
    tokens = ("q", "k", "v", "reads", "positions")
    for t in (0, 17, 39):
        one = call("delta_prep_fwd", backend, {**args, **{n: args[n][:, t : t + 1] for n in tokens}})
        assert all(same_bits(a, b[:, t : t + 1]) for a, b in zip(one, whole, strict=True))


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_weights_correct_nothing(backend, dtype):
    args = prep_args(dtype=dtype, D=80)
    zero = {**args, **{n: torch.zeros_like(args[n]) for n in ("delta_q", "delta_k", "delta_v")}}
    none = {**args, **dict.fromkeys(NO_MEMORY)}
    assert all(map(same_bits, *(call("delta_prep_fwd", backend, x) for x in (zero, none))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_outer_strides(backend):
    args = prep_args(H=3, T=9, tables=3)
    shuffled = {
        **map_tensors(args, torch.clone),
        "q": args["q"].permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
        "k": args["k"].transpose(1, 2).contiguous().transpose(1, 2),
        "reads": args["reads"].transpose(1, 2).contiguous().transpose(1, 2),
        "delta_q": torch.nn.functional.pad(args["delta_q"], (2, 3))[:, 2:-3],
        "rotary_cos": args["rotary_cos"].transpose(0, 1).contiguous().transpose(0, 1),
    }
    backward = bwd_args(args)
    same_backward = {
        **backward,
        **shuffled,
        "dq_prep": backward["dq_prep"].transpose(0, 1).contiguous().transpose(0, 1),
    }
    for op, a, b in (("delta_prep_fwd", args, shuffled), ("delta_prep_bwd", backward, same_backward)):
        assert all(map(same_bits, call(op, backend, a), call(op, backend, b)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs(backend):
    args = prep_args(B=3)
    args = {**args, **{n: args[n][:1].expand(3, -1, -1, -1) for n in ("q", "reads")}}
    check_against_reference("delta_prep_fwd", backend, args)
    args = bwd_args(args)
    args["dq_prep"] = args["dq_prep"][:, :1].expand(-1, 7, -1, -1)
    check_against_reference("delta_prep_bwd", backend, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_past_the_last_sequence_are_zero_whatever_they_hold(backend):
    args = prep_args(packed=(0, 2, 6), T=11, positions=True)
    backward = bwd_args(args)
    for name in ("q", "k", "v", "reads"):
        backward[name] = args[name] = args[name].clone()
        args[name][:, 6:] = NAN
    args["positions"][:, 6:] = 1 << 30
    for name in ("dq_prep", "dk_prep", "dv_prep"):
        backward[name][:, 6:] = NAN
    for x in check_against_reference("delta_prep_fwd", backend, args):
        assert (x[:, 6:] == 0).all()
    for x in check_against_reference("delta_prep_bwd", backend, backward)[:4]:
        assert (x[:, 6:] == 0).all()


# ---- with a cache ------------------------------------------------------------------------------------------


def cache_args(B=3, T=4, HKV=2, D=64, dtype=BF16, page=0, mask=False, padding=False, packed=None, **options):
    rows = len(packed) - 1 if packed else B
    prep = prep_args(B=B, T=T, HKV=HKV, D=D, dtype=dtype, packed=packed, **options)
    lengths = ints(*[5, 0, 17, 9][:rows])
    table = None
    if page:
        pages = 32 // page
        table = torch.randperm(rows * pages + 2, dtype=torch.int32)[: rows * pages].view(rows, pages).clone()
        shape = (rows * pages + 2, page, HKV, D)
    else:
        shape = (rows, 32, HKV, D)
    # [.., 2, ..]: keys and values side by side in one allocation, heads before slots
    both = torch.full((shape[0], 2, HKV, shape[1], D), NAN).to(dtype)
    k_cache, v_cache = (both[:, i].transpose(1, 2) for i in range(2))
    token_mask = None
    if mask:
        token_mask = torch.arange(T).expand(prep["k"].shape[0], T) < ints(4, 2, 0)[:B, None]
    return {
        "k": prep["k"],
        "v": prep["v"],
        "k_cache": k_cache,
        "v_cache": v_cache,
        **{n: prep[n] for n in ("reads", "delta_k", "delta_v", "k_norm_weight", "norm_eps", *NO_ROTARY)},
        "rotary_interleaved": prep["rotary_interleaved"],
        "positions": prep["positions"],
        "token_mask": token_mask,
        "cu_seqlens": prep["cu_seqlens"],
        "cache_seqlens": lengths,
        "block_table": table,
        "state_indices": ints(2, -1, 0, 1)[:rows] if padding else None,
    }


CACHE_CASES = {
    "dense": {},
    "dense_fp32": {"dtype": FP32, "weights": BF16},
    "paged": {"page": 8},
    "paged_fp16": {"page": 1, "dtype": FP16, "D": 80, "interleaved": True},
    "masked": {"mask": True},
    "masked_paged_padding": {"mask": True, "page": 4, "padding": True},
    "padding": {"padding": True, "positions": True},
    "packed": {"packed": (0, 3, 3, 8), "T": 10},
    "packed_paged": {"packed": (0, 1, 2, 7, 12), "T": 13, "page": 16, "padding": True},
    "gathered": {"tables": 3},
    "only_k": {"absent": ("delta_v",)},
    "plain": {"absent": (*NO_MEMORY, *NO_NORM, *NO_ROTARY)},
    "long": {"B": 1, "T": 30, "page": 16, "packed": (0, 15, 30)},
}


@pytest.mark.parametrize("case", CACHE_CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_append(backend, case):
    """Appended rows against the reference; every other slot still holds the NaN that it held, to the bit."""
    args = cache_args(**CACHE_CASES[case])
    plain, exact = map_tensors(args, torch.clone), as_fp64(args)
    before = args["k_cache"].clone()
    for name, changed in ((backend, args), ("reference", plain), ("reference", exact)):
        call("delta_prep_with_kvcache", name, changed)
    for cache in ("k_cache", "v_cache"):
        got, same, want = (x[cache] for x in (args, plain, exact))
        written = ~want.isnan()
        assert_within_budget(got[written], same[written], want[written])
        assert same_bits(got[~written], before[~written])


@pytest.mark.parametrize("isa", ISAS)
def test_append_stores_what_the_forward_pass_returns(isa):
    args = cache_args(T=6)
    prep = {name: args.get(name) for name in prep_args()}
    prep["positions"] = args["cache_seqlens"][:, None] + torch.arange(6, dtype=torch.int32)
    with instruction_set(isa):
        call("delta_prep_with_kvcache", "cpu", args)
        _, k, v = call("delta_prep_fwd", "cpu", prep)
    for b, length in enumerate(args["cache_seqlens"]):
        assert same_bits(args["k_cache"][b, length : length + 6], k[b])
        assert same_bits(args["v_cache"][b, length : length + 6], v[b])
