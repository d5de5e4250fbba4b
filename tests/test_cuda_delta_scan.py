"""The CUDA scan where it cuts sequences: segments, groups and supergroups forced, and orders of threads and blocks.

One token a segment: a sequence of 140 tokens is then 140 segments, 18 groups of 8 (R = 16: of 4) and 2 supergroups of
16, so that the last segments start behind a map of each level.
"""

import re
from pathlib import Path

import pytest
import torch
from kernel_checks import CUDA, call, same_bits
from scan_inputs import BF16, FP16, FP32, INPUTS, RULES, bwd_args, check_scan, ints, scan_args

PLAN = (Path(__file__).parent.parent / "csrc" / "cuda" / "delta_scan_plan.h").read_text()
SUPERGROUP = int(re.search(r"kSupergroup = (\d+)", PLAN)[1])
GROUPS = {8: 8, 16: 4}

CUTS = {
    **{f"{rule}_{R}": {"rule": rule, "free": True, "R": R} for rule in RULES for R in (8, 16)},
    **{f"shared_gates_{R}": {"rule": "lambda_outside", "free": True, "gate": 1, "R": R} for R in (8, 16)},
    "coupled_shared_gates": {"gate": 1},
    "raw": {"raw": True, "free": True, "mask": 0.3, "dtypes": (FP32, BF16, FP16)},
    "raw_16": {"raw": True, "R": 16, "gate": 1},
    "narrow": {"R": 3, "raw": True, "state": False},
    "uneven": {"R": 11, "free": True, "mask": 0.2},
    "packed": {"packed": (0, 3, 3, 139, 150), "T": 155, "B": 1},
    "packed_raw": {"packed": (0, 0, 140), "T": 140, "B": 1, "raw": True, "mask": 0.2, "R": 16},
}


def cut(**case):
    return scan_args(**{"B": 2, "H": 2, "T": 140, "segment_len": 1} | case)


def test_what_these_cases_force():
    for R, group in GROUPS.items():
        assert f"padded_rank == 8 ? {GROUPS[8]} : {GROUPS[16]}" in PLAN
        assert group * SUPERGROUP < 140, R


@pytest.mark.parametrize("case", CUTS)
@pytest.mark.parametrize("backend", [CUDA])
def test_segments(backend, case):
    # A start state comes through three maps, each with a rounding of its own.
    check_scan(backend, cut(**CUTS[case], gates=(0.0, 1.0)), roundings=4)


@pytest.mark.parametrize("R", (8, 16))
@pytest.mark.parametrize("backend", [CUDA])
def test_segments_are_the_whole(backend, R):
    args = cut(R=R, free=True, gates=(-1.0, 2.0))
    whole = call("delta_scan_fwd", backend, args | {"segment_len": 140})
    for length in (1, 2, 6, 16):
        got = call("delta_scan_fwd", backend, args | {"segment_len": length})
        assert not same_bits(got[1], whole[1])  # through maps
        torch.testing.assert_close(got[:2], whole[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [CUDA])
def test_a_row_does_not_know_its_neighbours(backend):
    args = cut(raw=True, free=True)
    results = call("delta_scan_fwd", backend, args)
    gradients = call("delta_scan_bwd", backend, (cotangents := bwd_args(args, results[2])))
    for row in range(2):
        alone = args | {n: args[n][row : row + 1] for n in INPUTS[:6]}
        reads, final_state, tape = call("delta_scan_fwd", backend, alone)
        assert same_bits(reads[0], results[0][row]) and same_bits(final_state[0], results[1][row])
        back = bwd_args(alone, tape) | {n: cotangents[n][row : row + 1] for n in ("dreads", "dfinal_state")}
        got = call("delta_scan_bwd", backend, back)
        assert all(same_bits(a[0], b[row]) for a, b in zip(got[:6], gradients[:6], strict=True))


@pytest.mark.parametrize("case", ({}, {"R": 16, "gate": 1}, {"packed": (0, 3, 140), "T": 143}, {"R": 40, "T": 20}))
@pytest.mark.parametrize("backend", [CUDA])
def test_schedules(backend, case, monkeypatch):
    """Emulated, threads and blocks run in another order each time; on a device it is one more run."""
    args = cut(**{"B": 1, "H": 2, "raw": True, "free": True, "mask": 0.1} | case)
    cotangents = bwd_args(args, None)
    runs = []
    for schedule in ("order", "order", "random:1", "random:2", "priority:1", "priority:2"):
        monkeypatch.setenv("DELTAMEM_EMULATION_SCHEDULE", schedule)
        forward = call("delta_scan_fwd", backend, args)
        backward = call("delta_scan_bwd", backend, cotangents | {"tape": forward[2]})
        used = forward if args["cu_seqlens"] is None else forward[:2]  # a packed tape has slots of no segment
        runs.append((*used, *backward))
    for run in runs[1:]:
        assert all(same_bits(*pair) for pair in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("T", (300, 530))
@pytest.mark.parametrize("backend", [CUDA])
def test_pool_through_maps(backend, T):
    """In place: the last segment stores to the slot that the first one starts from."""
    args = scan_args(B=2, H=1, T=T, raw=True, mask=0.1)
    reads, final_state, _ = call("delta_scan_fwd", backend, args)
    pool = torch.full((4, 1, 8, 8), float("nan"))
    pool[[3, 1]] = args["initial_state"]
    out = torch.empty_like(reads)
    tokens = [args[n] for n in INPUTS[:5]]
    options = [args[n] for n in ("token_mask", "cu_seqlens", "beta_bias", "lam_bias")]
    args = (*tokens, pool, ints(3, 1), None, None, *options, "standard", True, True, True, out)
    call("delta_scan_with_state_pool", backend, dict(enumerate(args)))
    assert same_bits(out, reads) and same_bits(pool[[3, 1]], final_state) and pool[[0, 2]].isnan().all()
