"""delta_scan on Triton as a GPU runs it: real lengths, streams, graphs, equal bits in every run."""

import pytest
import torch
from kernel_checks import as_fp64, call, map_tensors, same_bits
from scan_inputs import BF16, FP16, FP32, INPUTS, RULES, assert_close_as_eager, bwd_args, check_scan, scan_args
from test_delta_scan_state_pool import check_pool, pool_args

pytestmark = pytest.mark.gpu
LONG = 131072


def on_gpu(args):
    return map_tensors(args, torch.Tensor.cuda)


def forward_and_backward(args, backward):
    reads, final_state, tape = call("delta_scan_fwd", "triton", args)
    return reads, final_state, tape, *call("delta_scan_bwd", "triton", backward | {"tape": tape})


CASES = {
    **{f"rank_{R}": {"R": R, "B": 1, "H": 1} for R in (1, 3, 4, 8, 16, 24, 32, 64)},
    **{f"{rule}_{lam}": {"rule": rule, "free": lam == "free"} for rule in RULES for lam in ("free", "coupled")},
    **{f"{dtype}": {"dtypes": (dtype,), "raw": True, "free": True} for dtype in (BF16, FP16, FP32)},
    "mixed_dtypes": {"dtypes": (BF16, FP16, FP32), "mask": 0.2},
    "shared_gates": {"gate": 1, "raw": True, "free": True, "rule": "lambda_outside"},
    "packed": {"packed": (0, 2, 2, 400, 2900), "T": 3000, "raw": True, "free": True, "mask": 0.1},
    "many_rows": {"B": 1500, "H": 1, "T": 70, "raw": True},
    "three_levels": {"B": 1, "H": 1, "T": 9000, "R": 4},
    "one_token": {"T": 1, "raw": True},
    "decode": {"T": 7, "raw": True, "free": True},
}


@pytest.mark.parametrize("case", CASES)
def test_cases(case):
    check_scan("triton", on_gpu(scan_args(**{"T": 333} | CASES[case])))


@pytest.mark.parametrize("R", (8, 16))
def test_long_sequence(R):
    """Every segment of the tape follows, in fp64, from the one before it; so does every read."""
    args = on_gpu(scan_args(B=1, T=LONG, H=1, R=R, raw=True, dtypes=(BF16,)))
    reads, final_state, tape = call("delta_scan_fwd", "triton", args)
    rows = {n: args[n].view(len(tape), -1, 1, R) for n in ("mem_q", "mem_k", "mem_v", "beta")}
    rows = args | rows | {"initial_state": tape, "save_tape": False}
    ends = torch.cat((tape[1:], final_state))
    plain, want = call("delta_scan_fwd", "reference", rows), call("delta_scan_fwd", "reference", as_fp64(rows))
    assert_close_as_eager(reads.view_as(plain[0]), plain[0], want[0], "reads")
    assert_close_as_eager(ends, plain[1], want[1], "states", roundings=8)  # a tape's state comes of rounded maps
    assert same_bits(tape[:1], args["initial_state"])


def test_long_sequence_backward(monkeypatch):
    """In segments and as one chain of 131072 tokens: two orders of the same sums."""
    from deltamem_kernels.triton_ops import scan_plan

    args = on_gpu(scan_args(B=1, T=LONG, H=1, raw=True, dtypes=(FP32,)))
    backward = on_gpu(bwd_args(args, None))
    segments = forward_and_backward(args, backward)
    monkeypatch.setattr(scan_plan, "FULL_LANES", 0)
    chain = forward_and_backward(args, backward)
    for name, x, y in zip(("reads", "final_state", "tape", *INPUTS), segments, chain, strict=True):
        assert x.shape == y.shape, name
        if y.numel():
            assert (x - y).abs().max() <= 64 * torch.finfo(FP32).eps * y.abs().max(), name


@pytest.mark.parametrize("case", ("packed", "shared_gates", "rank_64", "three_levels"))
def test_equal_bits_in_every_run(case):
    args = on_gpu(scan_args(**{"T": 2000, "raw": True} | CASES[case]))
    backward = on_gpu(bwd_args(args, None))
    first, *others = (forward_and_backward(args, backward) for _ in range(5))
    packed = args["cu_seqlens"] is not None  # its tape has slots of no segment
    for run in others:
        assert all(same_bits(*pair) for i, pair in enumerate(zip(first, run, strict=True)) if not (packed and i == 2))


def test_side_stream():
    args = scan_args(T=2000, raw=True, dtypes=(BF16,))
    backward = bwd_args(args, None)
    want = forward_and_backward(on_gpu(args), on_gpu(backward))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what another stream launched would run before the inputs are there
        args, backward = on_gpu(args), on_gpu(backward)
        got = forward_and_backward(args, backward)
    stream.synchronize()
    assert all(same_bits(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("T", (1, 4, 600))
def test_pool_step_in_a_graph(T):
    """Replays advance the pool as calls do, from whatever the inputs then hold."""
    args = on_gpu(pool_args(B=3, T=T, H=1, raw=True, indices=(5, -1, 2), dtypes=(BF16,)))
    tokens = [[torch.randn_like(args[n]) for n in INPUTS[:4]] for _ in range(3)]
    start = args["state_pool"].clone()

    def step():
        call("delta_scan_with_state_pool", "triton", args)

    def advance(run):
        args["state_pool"].copy_(start)
        found = []
        for values in tokens:
            for name, value in zip(INPUTS, values, strict=False):
                args[name].copy_(value)
            run()
            found.append(args["reads"].clone())
        return *found, args["state_pool"].clone()

    want = advance(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert all(same_bits(*pair) for pair in zip(advance(graph.replay), want, strict=True))


POOL = {
    "decode": {"T": 1, "B": 200, "P": 256, "H": 1, "raw": True, "indices": tuple(range(255, 55, -1))},
    "snapshots": {"T": 3, "indices": (5, 0), "outputs": ((1, 5, 6), (-1, 2, 0))},
    "prompt": {"T": 700, "H": 1, "indices": (5, 3), "outputs": (3, -1), "fresh": (0,)},
    "packed": {"packed": (0, 1, 2, 900, 905), "T": 906, "H": 1, "indices": (5, 0, 2, -1), "raw": True},
}


@pytest.mark.parametrize("case", POOL)
def test_pool(case):
    check_pool("triton", on_gpu(pool_args(**POOL[case])))
