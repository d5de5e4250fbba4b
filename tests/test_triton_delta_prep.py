"""delta_prep on Triton: the cases of test_delta_prep.py at sizes that the interpreter finishes."""

import calls
import pytest
import torch
from kernel_checks import as_fp64, assert_within_budget, call, check_against_reference, map_tensors, same_bits
from scan_inputs import assert_close_as_eager, scan_args
from test_delta_prep import BF16, FP16, FP32, NAN, NO_MEMORY, NO_NORM, NO_ROTARY, bwd_args, cache_args, ints, prep_args

from deltamem_kernels import explain, ops

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
    monkeypatch.setattr(delta_prep_bwd, "WARP_TILE", 16)
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


# ---- with the scan -----------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Segments as soon as there are two, groups of two of them and of two groups, in few wide programs: the
    interpreter's time goes by programs. Gives the names of the kernels launched."""
    from deltamem_kernels.triton_ops import delta_prep, delta_scan, scan_build, scan_plan, scan_prep

    for name, value in {
        "WARP": 128,
        "GROUP": 2,
        "SUPERGROUP": 2,
        "SEQUENTIAL_SEGMENTS": 1,
        "FULL_LANES": 1 << 30,
        "PACKED_TOKENS": 0,
    }.items():
        monkeypatch.setattr(scan_plan, name, value)
    names = []

    class Recorded:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for module in (delta_prep, delta_scan, scan_build, scan_prep):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            if (module, name) != (scan_prep, "replay_kernel"):  # which is part of others there
                monkeypatch.setattr(module, name, Recorded(getattr(module, name), name))
    return names


def joined_args(scan=None, **prep):
    """Arguments of delta_scan_prep_fwd. By default 5 segments, 3 groups, 2 supergroups."""
    scan = scan_args(**{"B": 1, "H": 1, "R": 4, "T": 14, "segment_len": 3, **(scan or {})})
    B, T, H, R = scan["mem_q"].shape
    prep = prep_args(**{"HQ": 2, "HKV": 2, "D": 16, **prep, "B": B, "T": T, "H": H, "R": R})
    names = ("k", "v", "delta_k", "delta_v", "k_norm_weight", "norm_eps", *NO_ROTARY, "rotary_interleaved", "positions")
    return scan | {name: prep[name] for name in names}


def check_joined(args):
    """Against the reference: the scan's results by its measure, k', v' by theirs. Rows of the tape that belong to no
    segment of a packed batch hold nothing."""
    got, plain = (call("delta_scan_prep_fwd", backend, args) for backend in ("triton", "reference"))
    want = call("delta_scan_prep_fwd", "reference", as_fp64(args))
    used = (0, 1) if args["cu_seqlens"] is not None else (0, 1, 2)
    for i in used:
        assert_close_as_eager(got[i], plain[i], want[i], f"result {i}")
    for i in (3, 4):
        assert_within_budget(got[i], plain[i], want[i], f"result {i}")
    return got


MAPS = ["segment_maps_kernel", "compose_maps_kernel", "compose_maps_kernel"]
BESIDE, APART = ["replay_beside_prep_kernel"], ["replay_kernel", "prep_kernel"]
ALONE = ("v", "delta_k", "delta_v")  # absent where k does not wait for the reads
JOINED = {
    "rank_8": {"scan": {"R": 8, "T": 9, "segment_len": 2, "dtypes": (BF16,)}, "dtype": BF16, "HKV": 1, "absent": ALONE},
    "rank_5": {
        "scan": {"R": 5, "mask": 0.3, "raw": True, "free": True, "T": 9, "segment_len": 2},
        "interleaved": True,
        "absent": ALONE,
    },
    "rank_16": {"scan": {"R": 16, "T": 5, "segment_len": 1, "gate": 1}, "HKV": 1, "tables": 3, "absent": ALONE},
    "states": {"scan": {"B": 2, "H": 2, "T": 13}, "absent": ALONE, "positions": True},
    "packed": {"scan": {"packed": (0, 2, 2, 12, 16), "T": 18, "mask": 0.2}, "absent": ALONE},
    "corrected": {"scan": {"packed": (0, 12), "T": 14}, "absent": ("delta_v",)},
    "values": {"absent": ("k", "delta_k", "k_norm_weight", *NO_ROTARY)},
}


@pytest.mark.parametrize("case", JOINED)
def test_joined_with_the_scan(case, launched):
    args = joined_args(**JOINED[case])
    results = check_joined(args)
    waits = args["v"] is not None or args["delta_k"] is not None
    activation = ["activate_kernel"] if args["use_qk_activation_in_kernel"] else []
    assert launched == [*activation, *MAPS, *(APART if waits else BESIDE)]
    if args["cu_seqlens"] is not None:
        assert all((x[:, args["cu_seqlens"][-1] :] == 0).all() for x in results[3:] if x.numel())


def test_joined_equals_scan_then_prep(launched):
    """To the bit; and where k waits for its correction that is what runs."""
    args = joined_args(absent=ALONE)
    scan = {name: x for name, x in args.items() if name in scan_args()}
    reads, final_state, tape = call("delta_scan_fwd", "triton", scan)
    prep = {**dict.fromkeys(("q", "k", "v", "reads", "delta_q", "delta_k", "delta_v", "q_norm_weight")), **args}
    prep = {name: prep[name] for name in prep_args()} | {"reads": reads}
    _, k, _ = call("delta_prep_fwd", "triton", prep)
    launched.clear()
    joined = check_joined(args)
    assert launched == [*MAPS, *BESIDE]
    assert all(map(same_bits, joined, (reads, final_state, tape, k)))
    launched.clear()
    check_joined(joined_args({"T": 3, "segment_len": 4}))
    assert launched == APART


@pytest.mark.parametrize("corrected", (True, False))
def test_joined_reads_one_state(corrected, launched):
    args = joined_args({"T": 9, "segment_len": 2}, absent=() if corrected else ALONE)
    args |= {"write": False, "save_tape": False} | dict.fromkeys(("mem_k", "mem_v", "beta", "lam"))
    check_joined(args)
    assert launched == (APART if corrected else BESIDE)


@pytest.mark.parametrize("scan", ({"T": 1}, {"T": 70, "R": 2, "packed": (0, 4, 66)}), ids=("one_token", "two_tiles"))
def test_joined_beside_whole_sequences(scan):
    check_joined(joined_args(scan | {"segment_len": 0}, D=4, HKV=1, positions=True, absent=ALONE))


def test_joined_tells_compilers_the_truth():
    args = joined_args({"T": 4, "segment_len": 2}, absent=ALONE)
    torch.library.opcheck(ops.handle("delta_scan_prep_fwd", "triton"), tuple(args.values()))


def test_chain_joins(launched, monkeypatch, capsys):
    """fused_delta_attention and its gradients in segments of two tokens, against the reference; explain names the op
    that ran."""
    from deltamem_kernels.triton_ops import delta_prep, delta_scan, delta_scan_bwd, scan_plan

    for module in (ops, delta_prep, delta_scan, delta_scan_bwd, scan_plan):
        if hasattr(module, "SEGMENT_LEN"):
            monkeypatch.setattr(module, "SEGMENT_LEN", 2)
    function, arguments = calls.fused_delta_attention()
    arguments |= dict.fromkeys(ALONE[1:])
    results = {}
    for backend in ("triton", "reference"):
        given = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        leaves = [x.requires_grad_() for x in given.values() if isinstance(x, torch.Tensor)]
        out, reads, final_state, _ = function(**given, backend=backend)
        (out.square().sum() + reads.square().sum() + final_state.sum()).backward()
        results[backend] = (out, reads, final_state, *(x.grad for x in leaves))
    for got, want in zip(*results.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert launched[:4] == ["activate_kernel", *MAPS[:2], *BESIDE] and "replay_kernel" not in launched
    explain(function, **arguments, backend="triton")
    told = [line.split("::")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  deltamem::")]
    assert told == ["delta_scan_prep_fwd.triton", "delta_attention_fwd.triton"]


# ---- on a GPU ----------------------------------------------------------------------------------------------

LONG = {"B": 1, "T": 8192, "HQ": 32, "HKV": 8, "D": 128, "tables": 3}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
def test_long_rows(dtype):
    args = prep_args(**LONG, dtype=dtype)
    for op, given in (("delta_prep_fwd", args), ("delta_prep_bwd", bwd_args(args))):
        first = check_against_reference(op, "triton", given)
        assert all(map(same_bits, first, call(op, "triton", given)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
@pytest.mark.parametrize("R", (8, 16, 5))
@pytest.mark.parametrize("packed", (None, (0, 3000, 3001, 8000)), ids=("dense", "packed"))
@pytest.mark.parametrize("corrected", (True, False))
def test_long_joined(dtype, R, packed, corrected):
    absent = () if corrected else ALONE
    scan = {"T": 8192, "R": R, "packed": packed, "dtypes": (dtype,), "segment_len": 0}
    args = joined_args(scan, **LONG, dtype=dtype, absent=absent)
    first = check_joined(args)
    again = call("delta_scan_prep_fwd", "triton", args)
    used = (0, 1, 3, 4) if packed else range(5)  # a packed tape has rows that nothing fills
    assert all(same_bits(first[i], again[i]) for i in used)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32))
def test_long_append(dtype):
    """Long prompts into pages, twice."""
    ends = (0, 3000, 3001, 8000)
    args = prep_args(T=8192, HQ=1, HKV=8, D=128, dtype=dtype, packed=ends, tables=3)
    prep = {name: args[name] for name in ("reads", "delta_k", "delta_v", "k_norm_weight", "norm_eps", *NO_ROTARY)}
    pages = torch.randperm(3 * 512, dtype=torch.int32).view(3, 512)
    caches = []
    for _ in range(2):
        k_cache, v_cache = (torch.full((3 * 512, 16, 8, 128), NAN, dtype=dtype) for _ in range(2))
        call(
            "delta_prep_with_kvcache", "triton",
            {"k": args["k"], "v": args["v"], "k_cache": k_cache, "v_cache": v_cache, **prep, "interleaved": False,
             "positions": None, "token_mask": None, "cu_seqlens": ints(*ends), "cache_seqlens": ints(5, 0, 17),
             "block_table": pages, "state_indices": None},
        )  # fmt: skip
        caches.append((k_cache, v_cache))
    assert all(map(same_bits, *caches))
    _, k, v = call("delta_prep_fwd", "triton", args)
    for cache, want in zip(caches[0], (k, v), strict=True):
        for row, (begin, end, filled) in enumerate(zip(ends, ends[1:], (5, 0, 17), strict=False)):
            slots = cache[pages[row].long()].flatten(0, 1)
            assert same_bits(slots[filled : filled + end - begin], want[0, begin:end])
            assert slots[:filled].isnan().all() and slots[filled + end - begin :].isnan().all()
