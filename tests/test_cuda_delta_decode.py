"""The one-launch decode: its list of tiles and their cuts, what its blocks hand to each other, its shapes.

Elsewhere than on a GPU the kernel runs emulated, on four multiprocessors: left to choose, it cuts a batch into four or
eight ranges. Inputs, poison and error budget are those of test_delta_decode.
"""

import os

import pytest
import torch
from gradients import ints
from kernel_checks import ON_DEVICE
from test_delta_decode import BF16, FP16, NAN, bits, case_of, check, run, same_bits

pytestmark = [pytest.mark.parametrize("backend", ["cuda"]), *ON_DEVICE]

BY_ROW = (
    "q", "k", "v", "k_cache", "v_cache", "mem_q", "mem_k", "mem_v", "beta", "lam", "token_mask", "cache_seqlens",
    "cache_leftpad", "block_table", "state_indices", "has_initial_state", "out", "lse", "reads",
)  # fmt: skip


def rows(case, order):
    """The same call over some of its rows."""
    paged = case["block_table"] is not None
    kept = {"k_cache", "v_cache"} if paged else set()
    return case | {name: x[order] for name, x in case.items() if name in BY_ROW and x is not None and name not in kept}


# ---- shapes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (5, 1), (16, 1)], ids=str)
@pytest.mark.parametrize("T", [1, 3, 16])
def test_tokens_groups_and_head_sizes(backend, T, heads, D, monkeypatch):
    """Up to 256 query columns a kv head, in blocks of 32, 24 at D = 128, or 16 at D = 256."""
    HQ, HKV = heads
    check(case_of([130, 20], T=T, HQ=HQ, HKV=HKV, D=D, memory={}, num_splits=2), backend, monkeypatch)


@pytest.mark.parametrize("R", [1, 7, 8, 9, 16, 64])
@pytest.mark.parametrize("H", [1, 3])
def test_ranks(backend, H, R, monkeypatch):
    check(case_of([70, 3], T=3, dtype=FP16, memory={"H": H, "R": R, "raw": True}), backend, monkeypatch)


@pytest.mark.parametrize("stride", [64, 65, 66, 72])
def test_rows_of_a_cache_that_are_not_aligned(backend, stride, monkeypatch):
    case = case_of([130, 5], T=2, memory={})
    for name in ("k_cache", "v_cache"):
        wide = torch.full((*case[name].shape[:3], stride), NAN, dtype=BF16)
        wide[..., :64] = case[name]
        case[name] = wide[..., :64]
    check(case, backend, monkeypatch)


def test_bad_shapes(backend):
    with pytest.raises(RuntimeError, match="delta_decode: q must have at most 16 new tokens per row, got 17"):
        run(case_of([5], T=17), backend)
    with pytest.raises(RuntimeError, match="delta_decode: q must have a head size of at most 256, got 320"):
        run(case_of([5], D=320), backend)


# ---- the list of tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [None, 5])
@pytest.mark.parametrize("num_splits", [0, 1, 3, 40])
def test_ragged_batch(backend, num_splits, page, monkeypatch):
    """Rows without keys, within a tile, over many tiles; new tokens on both sides of a tile's end."""
    filled = [0, 700, 1, 63, 64, 65, 0, 250, 127]
    case = case_of(filled, T=3, HQ=4, HKV=2, page=page, memory={}, num_splits=num_splits)
    case["state_indices"][6] = -1
    check(case, backend, monkeypatch)


def test_more_rows_than_threads(backend, monkeypatch):
    filled = [(7 * n) % 90 for n in range(150)]
    check(case_of(filled, HQ=2, HKV=1, memory={}), backend, monkeypatch)


def test_more_splits_than_lanes(backend, monkeypatch):
    """Forty splits merge, all of one row."""
    check(case_of([64 * 40 - 1], HQ=8, HKV=1, memory={}, num_splits=40), backend, monkeypatch)


@pytest.mark.parametrize("right", [-1, 5])
def test_pages_before_a_window_are_not_looked_up(backend, right, monkeypatch):
    options = {"window_left": 90, "window_right": right, "causal": right < 0}
    case = case_of([500, 70], T=4, page=16, memory={}, num_splits=2, **options)
    got = check(case, backend, monkeypatch)
    table = case["block_table"].clone()
    table[0, : (500 - 90) // 16] = 2**31 - 1
    assert same_bits(run(case | {"block_table": table}, backend), got)


@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_bits_do_not_depend_on_neighbours(backend, num_splits):
    case = case_of([300, 5, 900, 64], T=2, HQ=8, HKV=2, page=16, memory={"H": 2}, num_splits=num_splits)
    together = run(case, backend)
    for order in ([2], [3, 0], [1, 3, 0, 2]):
        order = torch.tensor(order)
        got = run(rows(case, order), backend)
        for name in ("out", "lse", "reads"):
            assert torch.equal(bits(got[name]), bits(together[name][order])), name
        for b in order.tolist():
            slot = case["state_indices"][b]
            assert torch.equal(bits(got["state_pool"][slot]), bits(together["state_pool"][slot]))


# ---- what blocks hand to each other ---------------------------------------------------------------------------


@pytest.mark.skipif(bool(ON_DEVICE), reason="a GPU has a schedule of its own")
@pytest.mark.parametrize("num_splits", [0, 3])
@pytest.mark.parametrize("schedule", ["random:1", "random:2", "random:3", "priority:1", "priority:2", "priority:3"])
def test_no_order_of_threads_shows(backend, schedule, num_splits, monkeypatch):
    """Nor does a second call: counters are zero again."""
    case = case_of([300, 40, 0], T=5, HQ=8, HKV=2, page=16, memory={"H": 2}, num_splits=num_splits, valid=[5, 2, 4])
    case["output_state_indices"] = torch.tensor([i for i in range(7) if i not in case["state_indices"]])[:3].int()
    first = run(case, backend)
    monkeypatch.setitem(os.environ, "DELTAMEM_EMULATION_SCHEDULE", schedule)
    for _ in range(2):
        assert same_bits(run(case, backend), first)


@pytest.mark.parametrize("num_splits", [0, 4])
def test_every_state_argument(backend, num_splits, monkeypatch):
    """The state goes elsewhere than it came from; recycled slots and those of no row hold NaN, to the bit."""
    case = case_of([260, 9, 130, 0], T=3, HQ=4, HKV=2, memory={"H": 2}, num_splits=num_splits, valid=[3, 1, 0, 2])
    source = case["state_indices"]
    free = [slot for slot in range(8) if slot not in source.tolist()]
    case["has_initial_state"] = torch.tensor([True, False, True, False])
    for b in (1, 3):
        case["state_pool"][source[b].long()] = NAN
    for targets in (ints(free[0], source[1], -1, free[1]), ints(free[0], free[1], free[2], source[3])):
        check(case | {"output_state_indices": targets}, backend, monkeypatch)
    per_token = torch.tensor([[free[0], free[1], source[0]], [-1, -1, source[1]], [free[2], -1, -1], [-1, free[3], -1]])
    check(case | {"output_state_indices": per_token.int()}, backend, monkeypatch)
    check(
        case | {"write": False, "has_initial_state": None, "state_pool": torch.randn(8, 2, 8, 8)}, backend, monkeypatch
    )


def test_rows_may_use_the_slots_of_their_numbers(backend, monkeypatch):
    case = case_of([70, 3], memory={})
    case["state_indices"] = None
    case["state_pool"] = torch.randn(2, 1, 8, 8)
    check(case, backend, monkeypatch)


def test_tokens_past_the_last_packed_row(backend, monkeypatch):
    case = case_of([200, 3, 70, 0], T=6, valid=[6, 0, 3, 2], packed=True, memory={}, HQ=8, HKV=2)
    got = check(case, backend, monkeypatch)
    assert not got["out"][:, 11:].any() and not got["reads"][:, 11:].any() and got["lse"][..., 11:].isneginf().all()
