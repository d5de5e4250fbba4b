"""How a scan is cut: lanes, segments, groups, and the width of loads. Decided on the host from shapes alone.

threads     a warp per program: even T = 8192 fills 128 SMs' worth of programs
R <= 16     a row of S per lane. R = 32, 64: a row over 2, 4 lanes, 16 channels each
segments    `segment_len` tokens (64: at R = 8 the map of a segment is then 1/8 of the states it stands for)
"""

from typing import NamedTuple

import torch
import triton

from deltamem_kernels.ops import SEGMENT_LEN

WARP = 64 if torch.version.hip else 32

# Segments per group and groups per supergroup. A lane applies at most 7 + 15 maps itself, one after another, each
# about 150 cycles with the next in flight; a level costs a launch, about 1 us in a graph.
GROUP, SUPERGROUP = 8, 16

# Segments are worth their maps (RP + 1 vectors a row, 2 where gates are shared, besides the replay) while the
# rows alone leave the machine idle. An H200 issues for 132 * 4 * 32 = 16896 lanes; a sequential lane waits on
# its own chain about two cycles in three.
SEQUENTIAL_SEGMENTS = 4  # below, launches outweigh what parallel segments save
FULL_LANES = 40 * 1024  # rows times vectors: above, a lane per row keeps the machine busy by itself
PACKED_TOKENS = 8  # a sequence, in the mean: above, a packed batch is not drafts alone but has a prompt among them

# RP -> tokens in flight ahead, half of a lane's registers at most, in: maps of one vector a lane; of several, or with
# fp32 q beside k; with both; replays
AHEAD = {
    **dict.fromkeys((1, 2, 4), (8, 8, 8, 8)),
    8: (8, 4, 4, 4),
    16: (4, 2, 1, 2),
    **dict.fromkeys((32, 64), (1, 1, 1, 2)),
}

# RP -> vectors of a map per lane when rows are few, and when they are many (more share one token's loads)
MAP_VECTORS = {1: (1, 2), 2: (1, 3), 4: (1, 5), 8: (1, 3), 16: (1, 3)}
FEW_LANES = 4096


# RP -> tokens that the backward makes states of at a time, and uses at a time. It leaves one state in memory for each
# of the latter: at 2, half of the history of the segments at work, and one replay of every other token. Where a lane
# holds 16 channels two tokens are more than its registers.
BLOCKS = {1: (4, 2), 2: (4, 2), 4: (4, 2), 8: (4, 2), 16: (2, 1), 32: (2, 1), 64: (2, 1)}

# Lanes from which the backward joins segments: a warp for each of an H200's 528 schedulers. It bounds the states that
# it leaves in memory, and its maps.
REVERSE_LANES = 16 * 1024

# Tokens a row up to which lanes activate q and k themselves: one launch is then worth more than the arithmetic.
SHORT = 16


class Plan(NamedTuple):
    """RP, NB, LANES as in scan_tokens; L tokens a segment; levels of maps (0: whole sequences)."""

    RP: int
    NB: int
    LANES: int
    L: int
    levels: int
    group: int
    supergroup: int
    slots: tuple[int, ...]  # of each level, [0] the segments
    map_shared: bool

    @property
    def second(self) -> int:
        """Where the groups' maps begin."""
        return self.slots[0]

    @property
    def third(self) -> int:
        return sum(self.slots[:2])

    @property
    def num_warps(self) -> int:
        return max(1, self.LANES // WARP)

    def blocks(self, slots: int, H: int) -> int:
        return -(-slots * H * self.RP * self.NB // self.LANES)


def slots_of(B: int, T: int, cu_seqlens: torch.Tensor | None, L: int) -> int:
    """Slots that segments of L tokens take."""
    if cu_seqlens is None:
        return B * max(1, -(-T // L))
    return T // L + max(1, cu_seqlens.shape[0] - 1)


def lanes(R: int) -> tuple[int, int]:
    """(RP, NB) of rank R."""
    RP = triton.next_power_of_2(R)
    return RP, max(1, RP // 16)


def is_shared(beta, lam, R: int) -> bool:
    """Do all rows of a state have the same gates, hence the same map?"""
    if beta is None or R == 1:
        return False
    return beta.shape[-1] == 1 and (lam is None or lam.shape[-1] == 1)


def plan(mem_q, beta, lam, cu_seqlens, update_rule, write, segment_len, whole=False, reverse=False) -> Plan:
    """whole: every sequence in one lane per row. reverse: for the backward, whose programs hold whole states."""
    B, T, H, R = mem_q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    RP, NB = lanes(R)
    L = segment_len or SEGMENT_LEN
    shared = is_shared(beta, lam, R)
    vectors = 2 if shared else RP + 1
    if not write:  # segments know their state: no maps
        parallel, levels = T > L, 0
    else:
        idle = N * H * RP * vectors <= FULL_LANES if cu_seqlens is None else T > N * PACKED_TOKENS
        parallel, levels = idle and RP <= 16 and T > SEQUENTIAL_SEGMENTS * L, 1
    if whole or not parallel:
        L, levels = T + 1, 0
    elif reverse:
        while slots_of(B, T, cu_seqlens, 2 * L) * H * RP >= REVERSE_LANES:
            L *= 2
    segments = -(-T // L)
    if levels:
        levels += (segments > GROUP) + (segments > GROUP * SUPERGROUP)
    lengths = (L, L * GROUP, L * GROUP * SUPERGROUP)[: max(levels, 1)]
    slots = tuple(slots_of(B, T, cu_seqlens, length) for length in lengths)
    LANES = max(WARP, RP * NB) if reverse else WARP
    return Plan(RP, NB, LANES, L, levels, GROUP, SUPERGROUP, slots, shared)


def width(x: torch.Tensor | None, R: int, CW: int) -> int:
    """Channels of one load of x: 16 bytes where address, strides and R allow."""
    if x is None or R & (R - 1):
        return 1
    found = min(CW, 16 // x.element_size())
    strides = [s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    while found > 1 and (x.data_ptr() % (found * x.element_size()) or any(s % found for s in strides)):
        found //= 2
    return found


def given(x: torch.Tensor | None):
    """x as kernels take it: its pointer and the strides of all dimensions but the last."""
    return None if x is None else (x, *x.stride()[:-1])
