"""delta_scan on Triton, at sizes that the interpreter finishes; the cases beyond are test_delta_scan.py's."""

import os

import pytest
import torch
from kernel_checks import call, same_bits
from scan_inputs import BF16, FP16, FP32, INPUTS, RULES, bwd_args, check_scan, ints, scan_args
from test_delta_scan_state_pool import check_pool, pool_args, run

NAN = float("nan")
MAPS = ("segment_maps_kernel", "compose_maps_kernel")
ACTIVATION = ("activate_kernel", "activation_gradient_kernel")
KERNELS = (*MAPS, *ACTIVATION, "replay_kernel", "reverse_kernel", "copy_states_kernel")


@pytest.fixture(autouse=True)
def wide_programs(monkeypatch):
    """The interpreter's time goes by programs and tokens, whatever the lanes."""
    from deltamem_kernels.triton_ops import scan_plan

    if os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr(scan_plan, "WARP", 128)


@pytest.fixture
def segmented(monkeypatch, launched):
    """Segments as soon as there are two, groups of two of them, and groups of two groups."""
    from deltamem_kernels.triton_ops import scan_plan

    monkeypatch.setattr(scan_plan, "GROUP", 2)
    monkeypatch.setattr(scan_plan, "SUPERGROUP", 2)
    monkeypatch.setattr(scan_plan, "SEQUENTIAL_SEGMENTS", 1)
    monkeypatch.setattr(scan_plan, "FULL_LANES", 1 << 30)
    monkeypatch.setattr(scan_plan, "PACKED_TOKENS", 0)
    for RP in scan_plan.AHEAD:  # what a segment of three tokens can use
        monkeypatch.setitem(scan_plan.AHEAD, RP, (2, 2, 2, 2))
    monkeypatch.setitem(scan_plan.MAP_VECTORS, 4, (3, 5))
    return launched


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels launched, in order."""
    from deltamem_kernels.triton_ops import delta_scan, delta_scan_bwd, scan_build

    names = []

    class Recorded:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for module in (delta_scan, delta_scan_bwd, scan_build):
        for name in KERNELS:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Recorded(getattr(module, name), name))
    return names


WHOLE = {
    "one_token": {"T": 1, "raw": True, "free": True},
    "short": {"T": 5, "mask": 0.3, "raw": True},
    "tape": {"T": 13, "segment_len": 4, "free": True, "R": 4},
    "odd_tape": {"T": 7, "segment_len": 3, "R": 4, "B": 1},
    "checkpoints": {"T": 37, "R": 2, "H": 1, "free": True},
    "raw": {"T": 18, "raw": True, "free": True, "B": 1, "R": 4},
    "rank_1": {"R": 1, "H": 3, "T": 6},
    "rank_5": {"R": 5, "T": 6, "raw": True, "free": True},
    "rank_16": {"R": 16, "B": 1, "H": 1, "T": 4, "raw": True},
    "rank_24": {"R": 24, "B": 1, "H": 1, "T": 3, "raw": True, "free": True},
    "rank_64": {"R": 64, "B": 1, "H": 1, "T": 3, "raw": True},
    "shared_gates": {"T": 6, "gate": 1, "rule": "lambda_outside", "raw": True, "free": True},
    "half_inputs": {"T": 5, "dtypes": (BF16, FP16, FP32), "raw": True, "free": True},
    "packed": {"T": 12, "R": 4, "packed": (0, 0, 3, 9), "mask": 0.2},
    "no_tokens": {"T": 0},
}


@pytest.mark.parametrize("case", WHOLE)
def test_whole_sequences(case, launched):
    args = scan_args(**WHOLE[case])
    check_scan("triton", args)
    before, after = ([name] if args["use_qk_activation_in_kernel"] else [] for name in ACTIVATION)
    short = args["mem_q"].shape[1] <= 16  # activated by the replay itself
    forward = ([] if short else before) + ["replay_kernel"]
    assert launched == [*forward, *before, "reverse_kernel", *after] or case == "no_tokens"


@pytest.mark.parametrize("empty", ({"B": 0}, {"packed": (0,), "T": 3}), ids=("no_rows", "no_sequences"))
def test_nothing_to_do(empty):
    args = scan_args(raw=True, R=4, **empty)
    reads, final_state, tape = call("delta_scan_fwd", "triton", args)
    gradients = call("delta_scan_bwd", "triton", bwd_args(args, tape))
    assert not reads.any() and not final_state.numel()
    assert all(
        d.shape == args[n].shape and not d.any() for d, n in zip(gradients, INPUTS, strict=True) if args[n] is not None
    )


SMALL = {"B": 1, "H": 2, "R": 4, "T": 23, "segment_len": 3}  # 8 segments, 4 groups, 2 supergroups
LEVELS = 3  # of maps: theirs
SEGMENTED = {
    **{f"{rule}_{lam}": {"rule": rule, "free": lam == "free"} for rule in RULES for lam in ("free", "coupled")},
    "remembering": {"gates": (-2.0, 3.0), "free": True, "rule": "lambda_outside"},
    "shared_gates": {"gate": 1, "free": True, "rule": "lambda_outside"},
    "rows": {"B": 2, "H": 1, "T": 17},
    "raw": {"raw": True, "free": True, "mask": 0.3, "H": 1},
    "raw_shared_gates": {"raw": True, "gate": 1, "R": 3},
    "rank_1": {"R": 1},
    "rank_16": {"R": 16, "H": 1, "gate": 1, "T": 5, "segment_len": 1},
    "packed": {"packed": (0, 2, 2, 16, 22), "mask": 0.2},
    "packed_shared_gates": {"packed": (0, 20), "gate": 1, "state": False},
    "even_segments": {"segment_len": 4, "T": 20, "H": 1},
}


@pytest.mark.parametrize("case", SEGMENTED)
def test_segments(case, segmented):
    """A state, or its gradient, reaches a segment through a map of each level, and each rounds it to fp32 once more
    than a loop over the tokens does: a unit a level. Where gates forget, little of it is left to count beside what the
    segment itself adds, and one unit is enough."""
    args = scan_args(**SMALL | SEGMENTED[case])
    check_scan("triton", args, roundings=LEVELS if case == "remembering" else 1)
    before, after = ([name] if args["use_qk_activation_in_kernel"] else [] for name in ACTIVATION)
    levels = [*before, "segment_maps_kernel", "compose_maps_kernel", "compose_maps_kernel"]
    assert segmented == [*levels, "replay_kernel", *levels, "reverse_kernel", *after]


@pytest.mark.parametrize("R, T, vectors, composed", ((8, 3, 3, 2), (16, 2, 6, 0)))
def test_larger_maps(R, T, vectors, composed, segmented, monkeypatch):
    """On fewer levels: the others are as for smaller ones. A map of rank 16 is too large to be fetched ahead."""
    from deltamem_kernels.triton_ops import scan_plan

    monkeypatch.setitem(scan_plan.MAP_VECTORS, R, (vectors, vectors))
    check_scan("triton", scan_args(B=1, H=1, R=R, T=T, segment_len=1, dtypes=(BF16,)))
    assert segmented.count("segment_maps_kernel") == 2 and segmented.count("compose_maps_kernel") == composed


def test_several_vectors_a_lane_and_joined_segments(segmented, monkeypatch):
    from deltamem_kernels.triton_ops import scan_build, scan_plan

    monkeypatch.setattr(scan_build, "FEW_LANES", 0)
    monkeypatch.setattr(scan_plan, "REVERSE_LANES", 16)
    monkeypatch.setattr(scan_plan, "WARP", 32)
    monkeypatch.setitem(scan_plan.AHEAD, 4, (8, 8, 8, 8))
    check_scan("triton", scan_args(**SMALL | {"T": 19}))
    assert segmented.count("segment_maps_kernel") == 2


@pytest.mark.parametrize("segment_len", (4, 64))
def test_read_only(segment_len):
    args = scan_args(T=11, R=4, raw=True, mask=0.2, free=True, segment_len=segment_len) | {"write": False}
    reads, final_state, *_ = check_scan("triton", args)
    assert same_bits(final_state, args["initial_state"]) and final_state is not args["initial_state"]
    absent = dict.fromkeys(("mem_k", "mem_v", "beta", "lam", "beta_bias", "lam_bias"))
    assert same_bits(call("delta_scan_fwd", "triton", args | absent)[0], reads)
    packed = {n: args[n][:1] for n in ("mem_q", "token_mask")} | {"cu_seqlens": ints(0, 6, 9)}
    check_scan("triton", args | absent | packed)


@pytest.mark.parametrize("cotangent", ("dreads", "dfinal_state"))
def test_absent_cotangents(cotangent, segmented):
    # Gates that remember: else what reaches dinitial_state through 23 tokens' reads alone is rounding.
    check_scan("triton", scan_args(**SMALL, free=True, gates=(-2.0, 3.0)), **{cotangent: False})


def test_unused_tokens_are_not_read(segmented):
    args = scan_args(**SMALL, packed=(0, 5, 5, 19), mask=0.3, raw=True, free=True)
    unused = ~args["token_mask"]
    unused[:, 19:] = True
    poisoned = args | {n: args[n].masked_fill(unused[..., None, None], NAN) for n in INPUTS[:5]}
    backward = bwd_args(args, None)
    runs = []
    for inputs in (args, poisoned):
        reads, final_state, tape = call("delta_scan_fwd", "triton", inputs)
        gradients = call("delta_scan_bwd", "triton", backward | {n: inputs[n] for n in INPUTS} | {"tape": tape})
        assert not reads[unused].any() and not any(d[unused].any() for d in gradients[:5])
        runs.append((reads, final_state, *gradients))
    assert all(same_bits(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("R", (3, 4))
def test_strided_inputs(R, segmented):
    args = scan_args(**SMALL | {"R": R, "B": 2, "H": 1, "T": 10}, free=True, mask=0.2)
    B, T, H, _ = args["mem_q"].shape
    wide = torch.full((T, B, H, 5 * R + 1), NAN)
    strided = dict(args)
    for i, name in enumerate(("mem_q", "mem_k", "mem_v", "beta", "lam")):
        strided[name] = wide[..., i * R : (i + 1) * R].transpose(0, 1)
        strided[name].copy_(args[name])
    strided["initial_state"] = args["initial_state"][:1].expand(B, H, R, R)
    strided["beta"] = args["beta"][:, :1].expand(B, T, H, R)
    check_scan("triton", strided)


def test_batch_order_and_packing_change_no_bit(segmented):
    args = scan_args(**SMALL | {"B": 3, "H": 1, "T": 12})
    reads, final_state, _ = call("delta_scan_fwd", "triton", args)
    order = torch.tensor((2, 0, 1))
    got = call("delta_scan_fwd", "triton", args | {n: args[n][order] for n in (*INPUTS[:4], "initial_state")})
    assert same_bits(got[0], reads[order]) and same_bits(got[1], final_state[order])
    packed = {n: args[n].flatten(0, 1)[None] for n in INPUTS[:4]} | {"cu_seqlens": ints(0, 12, 24, 36)}
    got = call("delta_scan_fwd", "triton", args | packed)
    assert same_bits(got[0].view_as(reads), reads) and same_bits(got[1], final_state)


POOL = {
    "slots_of_rows": {"P": 3},
    "padding": {"B": 4, "indices": (5, -1, 2, -7)},
    "other_outputs": {"B": 3, "indices": (5, 0, 2), "outputs": (1, 0, -1)},
    "fresh": {"B": 3, "indices": (5, 0, 2), "fresh": (0, 2)},
    "each_token": {"T": 3, "indices": (5, 0), "outputs": ((1, 5, 6), (-1, 2, 0))},
    "each_token_padding": {"T": 2, "indices": (-1, 0), "outputs": ((1, 3), (2, -1)), "mask": 0.5},
    "packed": {"packed": (0, 1, 1, 5, 7), "T": 9, "indices": (5, 0, 2, -1), "raw": True},
    "packed_each_token": {"packed": (0, 1, 1, 3), "T": 4, "indices": (5, 0, 2), "outputs": ((1, 2, 3, 6),)},
    "one_token": {"T": 1, "B": 5, "H": 1, "raw": True},
    "wide": {"T": 2, "R": 24, "H": 1},
    "read_only": {"write": False, "indices": (5, 3), "outputs": (4, 3)},
    "no_tokens": {"T": 0, "indices": (5, 3), "outputs": (4, -1), "fresh": (0,)},
}


@pytest.mark.parametrize("case", POOL)
def test_pool(case):
    check_pool("triton", pool_args(**{"T": 4, "R": 4} | POOL[case]))


LONG_POOL = {
    "padding": {"B": 3, "indices": (5, -1, 2), "outputs": (1, 0, -1)},
    "fresh": {"B": 2, "indices": (5, 0), "fresh": (0,), "gate": 1},
    "packed": {"packed": (0, 7, 7, 13), "indices": (5, 0, 2), "fresh": (2,)},
    "read_only": {"write": False, "indices": (5, 3), "fresh": (1,)},
}


@pytest.mark.parametrize("case", LONG_POOL)
def test_pool_in_segments(case, segmented, monkeypatch):
    from deltamem_kernels.triton_ops import scan_plan

    monkeypatch.setattr(scan_plan, "SEGMENT_LEN", 3)
    args = pool_args(**{"T": 14, "R": 4, "H": 1} | LONG_POOL[case])
    check_pool("triton", args)
    assert args["write"] == ("copy_states_kernel" in segmented)


def test_unused_slots_are_not_read():
    args = pool_args(B=4, T=3, R=4, indices=(5, -1, 2, 0), fresh=(0,), mask=0.2)
    pool = args["state_pool"].clone()
    pool[[1, 3, 4, 5, 6]] = NAN  # 5 belongs to a row that starts fresh
    reads, after = run("triton", args, state_pool=pool)
    want_reads, want = run("triton", args)
    assert same_bits(reads, want_reads) and not reads[1].any()
    assert same_bits(after[[0, 2, 5]], want[[0, 2, 5]])
    assert same_bits(after[[1, 3, 4, 6]], pool[[1, 3, 4, 6]])


def test_strided_pool_and_reads():
    args = pool_args(T=3, B=3, R=4, indices=(5, 0, 2))
    want = run("triton", args)
    pages = torch.full((7, 3, 2, 4, 4), NAN)  # this layer's states inside a page of several layers
    pool = pages[:, 1]
    pool.copy_(args["state_pool"])
    wide = torch.full((3, 3, 2, 7), NAN)
    reads = wide[..., :4].transpose(0, 1)
    call("delta_scan_with_state_pool", "triton", args | {"state_pool": pool, "reads": reads})
    assert same_bits(reads, want[0]) and same_bits(pool, want[1])
    assert wide[..., 4:].isnan().all() and pages[:, 0].isnan().all()
