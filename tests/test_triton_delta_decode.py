"""delta_decode on Triton: the cases of test_delta_decode.py at sizes that the interpreter finishes."""

import pytest
import torch
from gradients import ints
from test_delta_decode import BF16, FP16, FP32, NAN, case_of, check, run, same_bits

# fp16: the interpreter rounds to bf16 towards zero, twice the error that the budget takes from the eager pipeline
TINY = {"filled": [40, 3], "HQ": 4, "HKV": 2, "D": 16, "dtype": FP16, "memory": {"R": 4}, "num_splits": 3}
CASES = {
    "bare": {"filled": [20, 1, 0], "prologue": False, "memory": None, "dtype": BF16},
    "no keys": {"filled": [0, 5], "append": False, "prologue": False, "T": 2, "memory": None},
    "memory": {"filled": [70, 3, 33]},
    "paged": {"page": 3, "T": 2},
    "pages of a block": {"page": 16},
    "read only keys": {"append": False, "T": 3, "memory": {"rule": "no_lambda", "R": 4}},
    "q only": {"deltas": "q", "memory": {"H": 3, "R": 4, "rule": "lambda_outside"}, "dtype": FP32},
    "raw memory": {"memory": {"H": 2, "R": 5, "raw": True, "row_gates": True, "dtype": FP32}, "T": 2},
    "draft": {"T": 5, "memory": {"H": 2, "R": 4}, "HQ": 8},
    "ragged": {"filled": [40, 3, 9], "T": 4, "valid": [4, 0, 3]},
    "packed": {"filled": [40, 3, 9], "T": 4, "valid": [4, 0, 3], "packed": True, "page": 16},
    "leftpad": {"T": 2, "leftpad": [21, 2]},
    "window": {"T": 3, "window_left": 17},
    "window both": {"T": 4, "causal": False, "window_left": 20, "window_right": 1},
    "huge window": {"window_left": 2**62, "window_right": 2**62, "causal": False},
    "softcap": {"softcap": 3.0},
    "interleaved, heads before slots": {"interleaved": True, "T": 2, "layout": "bhsd"},
    "odd head": {"D": 22, "HQ": 6, "HKV": 2},
    "one channel": {"D": 1, "prologue": False, "memory": None},
    "write off": {"T": 3, "write": False},
    "one split": {"num_splits": 1},
    "picked splits": {"num_splits": 0},
}


@pytest.mark.parametrize("name", CASES)
def test_features(name, monkeypatch):
    check(case_of(**TINY | CASES[name]), "triton", monkeypatch)


def test_a_block_of_columns_per_sixteen_queries(monkeypatch):
    """More columns than a tile holds: T x G = 40, blocks of 32 at most."""
    check(case_of(**TINY | {"T": 10, "HQ": 4, "HKV": 1}), "triton", monkeypatch)


def test_pool_indices(monkeypatch):
    """Padding rows, a recycled slot that holds NaN, a result slot of its own, and one slot per token."""
    case = case_of(**TINY | {"filled": [20, 3, 9, 5], "T": 2})
    slots = case["state_indices"]
    slots[1] = -1
    case["state_pool"][slots[2]] = NAN
    case["has_initial_state"] = torch.tensor([True, True, False, True])
    free = [i for i in range(8) if i not in slots.tolist()]
    case["output_state_indices"] = ints(slots[0], free[0], free[1], -1)
    check(case, "triton", monkeypatch)
    case["output_state_indices"] = torch.stack(
        [ints(slots[0], free[0]), ints(-1, 0), ints(free[1], slots[2]), ints(-1, free[2])]
    )
    case["output_state_indices"][1] = -1
    check(case, "triton", monkeypatch)


@pytest.mark.parametrize("splits", (1, 3))
def test_a_row_does_not_see_its_neighbours(splits):
    case = case_of(**TINY | {"filled": [37, 3, 50], "T": 2, "num_splits": splits})
    whole = run(case, "triton")
    rows = ("q", "k", "v", "k_cache", "v_cache", "mem_q", "mem_k", "mem_v", "beta", "cache_seqlens", "state_indices")
    one = run(case | {name: case[name][2:] for name in rows}, "triton")
    for name in ("out", "lse", "reads"):
        assert torch.equal(one[name], whole[name][2:])
    assert same_bits(whole, run(case, "triton"))


def test_positions_and_gathered_tables(monkeypatch):
    case = case_of(**TINY | {"T": 2})
    case["positions"] = torch.randint(0, 40, (2, 2), dtype=torch.int32)
    check(case, "triton", monkeypatch)
    angle = torch.randn(2, 2, case["rotary_cos"].shape[-1])
    case |= {"positions": None, "rotary_cos": angle.cos().to(FP16), "rotary_sin": angle.sin().to(FP16)}
    check(case, "triton", monkeypatch)
