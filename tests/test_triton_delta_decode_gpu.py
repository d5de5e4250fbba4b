"""delta_decode on Triton as compiled, on a GPU: budgets at real sizes, equal bits, a captured graph, two streams."""

import pytest
import torch
from test_delta_decode import BF16, FP16, FP32, MUTATED, NAN, arguments, case_of, check, run, same_bits

from deltamem_kernels import ops

pytestmark = pytest.mark.gpu
GEOMETRIES = (((32, 8), 128), ((8, 8), 64), ((15, 3), 96), ((16, 1), 256), ((4, 2), 22))
STEPS = {
    "step": {},
    "pages of 16": {"page": 16},
    "pages of 64": {"page": 64},
    "draft": {"T": 5, "memory": {"H": 4}, "page": 3},
    "ragged": {"T": 16, "valid": [16, 0, 7], "memory": {"H": 2, "R": 16}},
    "packed": {"T": 4, "valid": [4, 0, 3], "packed": True},
    "raw memory": {"T": 2, "memory": {"H": 2, "R": 5, "raw": True, "row_gates": True}},
    "read only keys": {"append": False, "T": 3, "memory": {"rule": "no_lambda"}},
    "window": {"T": 3, "window_left": 300, "leftpad": [9, 2, 130]},
    "both sides": {"T": 4, "causal": False, "window_left": 90, "window_right": 1},
    "softcap": {"softcap": 3.0},
    "no memory": {"memory": None},
    "write off": {"T": 3, "write": False},
}


def decode(args):
    ops.handle("delta_decode", "triton")(*args.values())


def results(args):
    return {name: args[name].clone() for name in MUTATED if args[name] is not None}


def overwrite(args, case):
    """Arguments of a case into tensors that a graph has captured."""
    for name, x in arguments(case).items():
        if isinstance(x, torch.Tensor):
            args[name].copy_(x)


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32), ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_steps(step, dtype, monkeypatch):
    case = case_of(**{"filled": [700, 3, 2049], "memory": {}, "dtype": dtype, "HQ": 8, "D": 128} | STEPS[step])
    got = run(case, "triton")
    check(case, "triton", monkeypatch, got)
    assert same_bits(got, run(case, "triton"))


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32), ids=str)
@pytest.mark.parametrize(("heads", "D"), GEOMETRIES)
def test_geometries(heads, D, dtype, monkeypatch):
    HQ, HKV = heads
    case = case_of([1000, 131], T=2, HQ=HQ, HKV=HKV, D=D, dtype=dtype, memory={"dtype": dtype})
    for splits in (0, 1, 5):
        check(case, "triton", monkeypatch, run(case | {"num_splits": splits}, "triton"))


def test_state_slots(monkeypatch):
    case = case_of([40, 9, 30], T=3, memory={"H": 2})
    case["state_indices"][1] = -1
    case["has_initial_state"] = torch.tensor([True, True, False])
    case["state_pool"][case["state_indices"][2].long()] = NAN
    check(case, "triton", monkeypatch, run(case, "triton"))
    used = case["state_indices"]
    free = [slot for slot in range(7) if slot not in used.tolist()]
    each = [used[0], -1, free[0], -1, -1, -1, free[1], free[2], used[2]]
    case["output_state_indices"] = torch.tensor(each, dtype=torch.int32).view(3, 3)
    check(case, "triton", monkeypatch, run(case, "triton"))


def test_a_row_does_not_see_its_neighbours():
    case = case_of([3000, 3, 900], T=2, HQ=8, D=128, memory={}, num_splits=7)
    whole = run(case, "triton")
    rows = ("q", "k", "v", "k_cache", "v_cache", "mem_q", "mem_k", "mem_v", "beta", "cache_seqlens", "state_indices")
    one = run(case | {name: case[name][2:] for name in rows}, "triton")
    for name in ("out", "lse", "reads"):
        assert torch.equal(one[name], whole[name][2:])


@pytest.mark.parametrize("page", (None, 16))
def test_a_graph_captured_at_length_1_replays_at_100000(page, monkeypatch):
    """The caches, the pool and the lengths are rewritten in place between capture and replay."""
    short, long = (case_of([n], HQ=8, D=128, memory={}, page=page) for n in (1, 100_000))
    eager = run(long, "triton")
    check(long, "triton", monkeypatch, eager)
    args = arguments(long)
    args["cache_seqlens"].fill_(1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles before the capture
        decode(args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(args)
    for _ in range(3):
        overwrite(args, long)
        graph.replay()
        assert same_bits(results(args), eager)
    case = long | {"cache_seqlens": short["cache_seqlens"]}
    overwrite(args, case)
    graph.replay()
    assert same_bits(results(args), run(case, "triton"))


def test_equal_bits_on_two_streams():
    cases = [case_of([n, 77], HQ=8, D=128, T=t, memory={"H": 2}, page=16) for n, t in ((5000, 1), (900, 4))]
    want = [run(case, "triton") for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(20):
        args = [arguments(case) for case in cases]
        torch.cuda.synchronize()
        for stream, given in zip(streams, args, strict=True):
            with torch.cuda.stream(stream):
                decode(given)
        torch.cuda.synchronize()
        for given, expected in zip(args, want, strict=True):
            assert same_bits(results(given), expected)


def test_no_synchronisation():
    args = arguments(case_of([700, 3], memory={}, T=2, page=16))
    decode(args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode(args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
