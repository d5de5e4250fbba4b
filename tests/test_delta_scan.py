"""delta_scan: forward and backward against the official scans and the fp64 reference."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from kernel_checks import CUDA, ISAS, TRITON, call, instruction_set, map_tensors, same_bits, threads
from safetensors import safe_open
from scan_inputs import BF16, FP16, FP32, INPUTS, RULES, assert_close_as_eager, bwd_args, check_scan, ints, scan_args

BACKENDS = ["cpu", CUDA, TRITON]
GOLDEN = sorted((Path(__file__).parent / "data" / "golden" / "scan").glob("*.safetensors"))
NAN = float("nan")

CASES = {
    **{f"{rule}_{lam}": {"rule": rule, "free": lam == "free"} for rule in RULES for lam in ("free", "coupled")},
    **{f"{rule}_shared_gates": {"rule": rule, "free": True, "gate": 1} for rule in RULES},
    **{f"rank_{R}": {"R": R, "B": 1} for R in (2, 3, 4, 7, 12, 16, 24, 32, 33, 64)},
    "rank_1": {"R": 1, "B": 1, "H": 5},
    "coupled_shared_gates": {"gate": 1, "rule": "lambda_outside"},
    "zero_start": {"state": False},
    "raw": {"raw": True, "free": True},
    "raw_coupled": {"raw": True, "R": 5},
    "raw_shared_gates": {"raw": True, "gate": 1, "rule": "lambda_outside", "R": 16},
    "raw_no_lambda": {"raw": True, "free": True, "rule": "no_lambda", "mask": 0.3},
    "raw_wide": {"raw": True, "R": 40, "T": 20},
    "masked": {"mask": 0.4, "free": True, "rule": "lambda_outside", "segment_len": 16},
    "all_masked": {"mask": 1.1},
    "many_segments": {"segment_len": 9, "free": True},
    "odd_segments": {"segment_len": 1, "T": 11},
    "one_segment": {"segment_len": 1000, "T": 150},
    "default_segments": {"T": 330, "H": 1, "B": 1},
    "packed": {"packed": (0, 3, 3, 40, 66), "segment_len": 8},
    "packed_masked": {"packed": (0, 0, 33, 70), "mask": 0.2, "raw": True},
    "one_token": {"T": 1, "raw": True, "free": True},
    "half_inputs": {"dtypes": (BF16, FP16), "raw": True, "free": True},
    "bf16_packed": {"dtypes": (BF16,), "packed": (0, 40, 70)},
    "no_tokens": {"T": 0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cases(backend, case):
    check_scan(backend, scan_args(**CASES[case]))


@pytest.mark.parametrize("empty", ({"B": 0}, {"packed": (0,), "T": 3}), ids=("no_rows", "no_sequences"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend, empty):
    args = scan_args(raw=True, **empty)
    reads, final_state, tape = call("delta_scan_fwd", backend, args)
    gradients = call("delta_scan_bwd", backend, bwd_args(args, tape))
    assert not reads.any() and not final_state.numel()
    assert all(
        d.shape == args[n].shape and not d.any() for d, n in zip(gradients, INPUTS, strict=True) if args[n] is not None
    )


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem.removeprefix("scan_"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_official_scan(backend, path):
    with safe_open(path, "pt") as file:
        device = torch.get_default_device()
        golden = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
        rule = next(rule for rule in RULES if f"scan_{rule}" in path.stem)
    free = "grad_decay" in golden
    golden["lam"], golden["grad_lam"] = (golden["decay"], golden["grad_decay"]) if free else (None, None)
    golden["initial_state"], golden["grad_initial_state"] = golden["state"], golden["grad_state"]
    args = scan_args() | {"update_rule": rule, "segment_len": 16, "token_mask": golden.get("token_mask")}
    args |= {name: None if golden.get(name) is None else golden[name].float() for name in INPUTS}
    results = {}
    for kind in (backend, "reference"):
        reads, final_state, tape = call("delta_scan_fwd", kind, args)
        cotangents = {"dreads": golden["d_reads"].float(), "dfinal_state": golden["d_final_state"].float()}
        gradients = call("delta_scan_bwd", kind, bwd_args(args, tape) | cotangents)
        results[kind] = (reads, final_state, *gradients)
    for name, got, plain in zip(
        ("reads", "final_state", *(f"grad_{n}" for n in INPUTS)), *results.values(), strict=True
    ):
        if golden.get(name) is not None:
            assert_close_as_eager(got, plain, golden[name], name)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("R", (1, 4, 8, 16, 20, 64))
@pytest.mark.parametrize("raw", (False, True))
def test_instruction_sets(isa, R, raw):
    if R == 1 and raw:
        return  # l2norm leaves only the sign: the gradients are all cancellation
    with instruction_set(isa):
        check_scan("cpu", scan_args(R=R, raw=raw, free=raw, B=1, T=67, dtypes=(FP32, BF16, FP16) if raw else (FP32,)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_dtypes(backend):
    kinds = (FP32, BF16, FP16)
    for seed in range(12):
        draw = torch.randint(3, (5,), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
        check_scan(backend, scan_args(B=1, T=20, raw=seed % 2 == 0, free=True, dtypes=[kinds[i] for i in draw]))


@pytest.mark.parametrize("raw", (False, True))
@pytest.mark.parametrize("backend", BACKENDS)
def test_read_only(backend, raw):
    args = scan_args(raw=raw, mask=0.2, free=True) | {"write": False}
    reads, final_state, *_ = check_scan(backend, args)
    assert same_bits(final_state, args["initial_state"]) and final_state is not args["initial_state"]
    absent = dict.fromkeys(("mem_k", "mem_v", "beta", "lam", "beta_bias", "lam_bias"))
    assert same_bits(call("delta_scan_fwd", backend, args | absent)[0], reads)
    check_scan(backend, args | absent | {"cu_seqlens": ints(0, 20, 69), **map_tensors(
        {n: args[n] for n in ("mem_q", "token_mask")}, lambda x: x[:1])})  # fmt: skip


@pytest.mark.parametrize("cotangent", ("dreads", "dfinal_state"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_absent_cotangents(backend, cotangent):
    # Gates that remember: else what reaches dinitial_state of 70 tokens' reads alone is rounding.
    check_scan(backend, scan_args(free=True, gates=(-2.0, 3.0)), **{cotangent: False})


# With fewer rows and heads than threads, the backward pass shares out segments.
@pytest.mark.parametrize(
    "case",
    (
        {"B": 5, "R": 16, "raw": True, "mask": 0.1},
        *({"B": 1, "H": 1, "T": 150, "R": R, "raw": True, "free": True, "segment_len": 8} for R in (4, 8, 16, 20)),
        {"B": 1, "H": 2, "T": 150, "rule": "lambda_outside", "free": True, "mask": 0.2, "segment_len": 8},
        {"H": 1, "packed": (0, 3, 3, 120, 140), "T": 145, "raw": True, "segment_len": 8},
        {"B": 1, "H": 1, "T": 150, "segment_len": 8, "write": False},
    ),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_thread_counts(backend, case):
    write = case.get("write", True)
    args = scan_args(**{name: value for name, value in case.items() if name != "write"})
    if not write:
        args |= dict.fromkeys(("mem_k", "mem_v", "beta", "lam")) | {"write": False}
    cotangents = bwd_args(args, None)
    runs = []
    for count in (1, 2, 5, 8):
        with threads(count):
            forward = call("delta_scan_fwd", backend, args)
            backward = call("delta_scan_bwd", backend, cotangents | {"tape": forward[2]})
            runs.append((*forward, *backward))
    for run in runs[1:]:
        assert all(same_bits(*pair) for pair in zip(runs[0], run, strict=True) if pair[0].numel())


@pytest.mark.parametrize("R", (5, 8, 16))
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, R):
    args = scan_args(R=R, free=True, T=35, mask=0.2)
    B, T, H, _ = args["mem_q"].shape
    wide = torch.full((T, B, H, 6 * R), NAN)
    strided = dict(args)
    for i, name in enumerate(("mem_q", "mem_k", "mem_v", "beta", "lam")):
        strided[name] = wide[..., i * R : (i + 1) * R].transpose(0, 1)
        strided[name].copy_(args[name])
    strided["initial_state"] = args["initial_state"][:1].expand(B, H, R, R)
    strided["token_mask"] = args["token_mask"].t().contiguous().t()
    strided["mem_v"] = args["mem_v"][:, :1].expand(B, T, H, R)
    strided["beta"] = args["beta"][:, :, :1].expand(B, T, H, R)
    got = check_scan(backend, strided)
    want = check_scan(backend, map_tensors(strided, lambda x: x.contiguous()))
    assert all(same_bits(*pair) for pair in list(zip(got, want, strict=True))[:2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_tokens_are_not_read(backend):
    args = scan_args(packed=(0, 12, 12, 55), mask=0.3, raw=True, free=True, segment_len=8)
    unused = ~args["token_mask"]
    unused[:, 55:] = True
    poisoned = args | {n: args[n].masked_fill(unused[..., None, None], NAN) for n in INPUTS[:5]}
    backward = bwd_args(args, None)
    runs = []
    for inputs in (args, poisoned):
        reads, final_state, tape = call("delta_scan_fwd", backend, inputs)
        gradients = call("delta_scan_bwd", backend, backward | {n: inputs[n] for n in INPUTS} | {"tape": tape})
        assert not reads[unused].any() and not any(d[unused].any() for d in gradients[:5])
        runs.append((reads, final_state, *gradients))
    assert all(same_bits(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_of_0_and_1(backend, rule):
    args = scan_args(rule=rule, free=True)
    for name in ("beta", "lam"):
        args[name] = torch.randint(2, args[name].shape).float()
    check_scan(backend, args)
    check_scan(backend, args | {"lam": None})
    logits = {name: 200 * (args[name] - 0.5) for name in ("beta", "lam")}  # e^100 overflows
    reads, final_state, _ = call("delta_scan_fwd", backend, args)
    saturated = call("delta_scan_fwd", backend, args | logits | {"use_gate_in_kernel": True})
    torch.testing.assert_close(saturated[:2], (reads, final_state))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_in_pieces(backend):
    args = scan_args(T=200)
    tokens = INPUTS[:4]
    whole = call("delta_scan_fwd", backend, args | {"save_tape": False})
    for cuts in ((0, 64, 128, 200), (0, 1, 70, 200)):
        state, reads = args["initial_state"], []
        for start, stop in pairwise(cuts):
            piece = args | {n: args[n][:, start:stop] for n in tokens} | {"initial_state": state}
            part, state, _ = call("delta_scan_fwd", backend, piece)
            reads.append(part)
        torch.testing.assert_close((torch.cat(reads, 1), state), whole[:2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_padded_and_rows_are_independent(backend):
    lengths, T = (30, 0, 70, 65), 70
    args = scan_args(B=4, T=T, raw=True)
    args["token_mask"] = torch.arange(T) < torch.tensor(lengths)[:, None]
    reads, final_state, _ = call("delta_scan_fwd", backend, args)

    ends = torch.tensor((0, *lengths)).cumsum(0)
    packed = args | {n: args[n][args["token_mask"]][None] for n in INPUTS[:4]}
    packed |= {"token_mask": None, "cu_seqlens": ends.int()}
    got = call("delta_scan_fwd", backend, packed)
    assert same_bits(got[0][0], reads[args["token_mask"]]) and same_bits(got[1], final_state)

    order = torch.tensor((2, 0, 3, 1))
    permuted = args | {n: args[n][order] for n in (*INPUTS[:4], "initial_state", "token_mask")}
    got = call("delta_scan_fwd", backend, permuted)
    assert same_bits(got[0], reads[order]) and same_bits(got[1], final_state[order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_tape_changes_nothing(backend):
    args = scan_args(T=150, free=True)
    with_tape = call("delta_scan_fwd", backend, args)
    without = call("delta_scan_fwd", backend, args | {"save_tape": False})
    assert all(same_bits(*pair) for pair in zip(with_tape[:2], without[:2], strict=True)) and not without[2].numel()
    assert same_bits(with_tape[2][0], args["initial_state"][0])
