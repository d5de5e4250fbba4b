"""delta_decode on Triton: the cases of test_delta_decode.py at sizes that the interpreter finishes."""

import pytest
import torch
from gradients import ints
from test_delta_decode import BF16, FP16, FP32, NAN, bits, case_of, check, run, same_bits

from deltamem_kernels.triton_ops import delta_decode as launcher

TINY = {"filled": [40, 3], "HQ": 4, "HKV": 2, "D": 16, "dtype": BF16, "memory": {"R": 4}, "num_splits": 3}
CASES = {
    "bare": {"filled": [20, 1, 0], "prologue": False, "memory": None, "dtype": BF16},
    "no keys": {"filled": [0, 5], "append": False, "prologue": False, "T": 2, "memory": None},
    "memory": {"filled": [70, 3, 33]},
    "paged": {"page": 3, "T": 2},
    "pages of a block": {"page": 16},
    "read only keys": {"append": False, "T": 3, "memory": {"rule": "no_lambda", "R": 4}},
    "q only": {"deltas": "q", "memory": {"H": 3, "R": 4, "rule": "lambda_outside"}, "dtype": FP32},
    "raw memory": {"memory": {"H": 2, "R": 5, "raw": True, "row_gates": True, "dtype": FP32}, "T": 2},
    "raw memory, one token": {"memory": {"R": 8, "raw": True}},
    "rank 12": {"memory": {"H": 2, "R": 12, "dtype": FP16}, "T": 2, "filled": [9], "num_splits": 1},
    "rank 64": {"memory": {"R": 64, "dtype": FP32}, "filled": [9], "num_splits": 1},
    "draft": {"T": 5, "memory": {"H": 2, "R": 4}, "HQ": 8},
    "ragged": {"filled": [40, 3, 9], "T": 4, "valid": [4, 0, 3]},
    "packed": {"filled": [40, 3, 9], "T": 4, "valid": [4, 0, 3], "packed": True, "page": 16},
    "leftpad": {"T": 2, "leftpad": [21, 2]},
    "blind leftpad": {"filled": [9, 4], "append": False, "leftpad": [8, 4], "T": 3},
    "not causal": {"T": 4, "causal": False, "page": 1},
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


GEOMETRIES = ((4, 4, 64, BF16), (5, 1, 96, FP32), (8, 1, 128, FP16), (16, 1, 256, BF16))


@pytest.mark.parametrize(("HQ", "HKV", "D", "dtype"), GEOMETRIES)
def test_geometries(HQ, HKV, D, dtype, monkeypatch):
    shape = {"HQ": HQ, "HKV": HKV, "D": D, "dtype": dtype, "memory": {"dtype": dtype}, "filled": [33], "num_splits": 2}
    check(case_of(**TINY | shape), "triton", monkeypatch)


@pytest.mark.parametrize(("T", "dtype"), ((6, FP32), (16, BF16)))
def test_token_counts(T, dtype, monkeypatch):
    """Up to T x G = 64 columns: several blocks of them, each with its own part of new keys."""
    sizes = {"filled": [18], "T": T, "HQ": 4, "HKV": 1, "dtype": dtype, "num_splits": 1}
    check(case_of(**TINY | sizes), "triton", monkeypatch)


def test_more_than_sixteen_tokens():
    with pytest.raises(ValueError, match="delta_decode: q must have at most 16 new tokens per row, got 17"):
        run(case_of(**TINY | {"T": 17}), "triton")


class Recorded:
    """A kernel that keeps the arguments of its last launch."""

    def __init__(self, kernel):
        self.kernel, self.args = kernel, None

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.args = args
            self.kernel[grid](*args, **options)

        return launch


def test_splits(monkeypatch):
    """They agree, and are as many parts with keys in them as 7 blocks give, and one of the new keys."""
    case = case_of(**TINY | {"filled": [112], "dtype": FP32})
    outs, merge = [], Recorded(launcher.decode_merge_kernel)
    monkeypatch.setattr(launcher, "decode_merge_kernel", merge)
    for splits, walked in ((1, 1), (2, 2), (3, 3), (5, 4), (7, 7)):
        outs.append(check(case | {"num_splits": splits}, "triton", monkeypatch)["out"])
        parts = merge.args[1]  # log-sum-exp of each
        assert parts.shape == (4, splits + 1)
        assert (parts.isfinite().sum(1) == walked + 1).all(), splits
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-5, rtol=1e-5)


def test_permuted_batch():
    case = case_of(**TINY | {"filled": [30, 5], "page": 4, "memory": {"H": 2, "R": 4}})
    order = torch.tensor([1, 0])
    rows = ("q", "k", "v", "mem_q", "mem_k", "mem_v", "beta", "cache_seqlens", "block_table", "state_indices")
    got = run(case, "triton")
    permuted = run(case | {name: case[name][order] for name in rows}, "triton")
    for name in ("out", "reads", "lse"):
        assert torch.equal(permuted[name], got[name][order])
    for name in ("k_cache", "v_cache", "state_pool"):
        assert torch.equal(bits(permuted[name]), bits(got[name]))


def test_zero_deltas_are_plain_attention():
    case = case_of(**TINY)
    case |= {f"delta_{name}": torch.zeros_like(case[f"delta_{name}"]) for name in "qkv"}
    bare = {name: x for name, x in case.items() if not name.startswith(("mem_", "delta_", "state_", "beta", "lam"))}
    with_memory, without = run(case, "triton"), run(bare, "triton")
    assert torch.equal(with_memory["out"], without["out"]) and torch.equal(with_memory["lse"], without["lse"])


def test_no_tokens():
    case = case_of(**TINY | {"T": 2, "valid": [0, 0]})
    got = run(case, "triton")
    assert not got["out"].any() and not got["reads"].any() and got["lse"].isneginf().all()
    for name in ("k_cache", "v_cache", "state_pool"):
        assert torch.equal(bits(got[name]), bits(case[name]))


def test_empty_batches():
    rows = ("q", "k", "v", "mem_q", "mem_k", "mem_v", "beta", "cache_seqlens", "state_indices")
    case = case_of(**TINY)
    assert run(case | {name: case[name][:0] for name in rows}, "triton")["out"].shape[0] == 0
    got = run(case | {name: case[name][:, :0] for name in rows[:7]}, "triton")
    assert torch.equal(bits(got["state_pool"]), bits(case["state_pool"]))


def test_layouts(monkeypatch):
    """Slices of one projection; memory whose tokens lie apart; fewer rows than the table and the pool have."""
    case = case_of(**TINY | {"T": 2, "page": 3})
    for name in ("q", "k", "v"):
        case[name] = torch.cat([case[name], case[name] * NAN], 2)[:, :, : case[name].shape[2]]
    case["mem_q"] = case["mem_q"].transpose(0, 1).contiguous().transpose(0, 1)
    case["beta"] = case["beta"][..., :1]
    case["lam"] = case["beta"][:1, :1].expand(2, 2, 1, 1)
    check(case, "triton", monkeypatch)


def test_writes_off_want_no_operands(monkeypatch):
    case = case_of(**TINY | {"T": 2, "write": False})
    check(case | dict.fromkeys(("mem_k", "mem_v", "beta")), "triton", monkeypatch)


@pytest.mark.parametrize("page", (None, 3, 16))
def test_what_a_window_hides_is_not_read(page):
    """Slots before the window of every query hold NaN, or lie in pages that are none."""
    case = case_of(**TINY | {"T": 2, "page": page, "window_left": 5})
    for row, filled in enumerate(case["cache_seqlens"].tolist()):
        hidden = torch.arange(max(0, filled - 5))
        if page is None:
            case["k_cache"][row, hidden] = case["v_cache"][row, hidden] = NAN
        else:
            case["block_table"][row, : len(hidden) // page] = -(2**31)
    got = run(case, "triton")
    assert got["out"].isfinite().all() and got["lse"].isfinite().all()


def test_packed_rows_of_unknown_length(monkeypatch):
    """No bound on the host, and together more tokens than a row may have."""
    rows = {"filled": [3, 0, 9], "T": 6, "valid": [6, 6, 5], "packed": True, "HQ": 1, "HKV": 1, "num_splits": 1}
    case = case_of(**TINY | rows)
    assert case["q"].shape[1] == 18
    got = check(case, "triton", monkeypatch)
    assert same_bits(got, run(case | {"max_seqlen": 6}, "triton"))


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
