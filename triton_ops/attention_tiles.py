"""Tiles of the attention kernels: a fixed table per head size, dtype and device, never timed at run time."""

import functools
from typing import NamedTuple

import torch

GFX = (0, 0)  # stands for every AMD device


class Tile(NamedTuple):
    """BM queries by BN keys."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability; GFX on AMD; None where Triton interprets."""
    if device.type != "cuda":
        return None
    return GFX if torch.version.hip else torch.cuda.get_device_capability(device)


def small_shared(capability: tuple[int, int]) -> bool:
    """99 KB of shared memory per block: sm_86, sm_89, sm_120."""
    return capability[1] in (6, 9) or capability[0] == 12


def forward_tile(
    D: int, dtype: torch.dtype, capability: tuple[int, int] | None, busy: bool = False, capped: bool = False
) -> Tile:
    """Shared memory holds q [BM, D] and num_stages blocks of k and of v [BN, D].

    The largest tiles whose accumulator [BM, D], scores [BM, BN] and slice of q fit a thread's 255 registers. busy: a
    token mask, or a page for every key, takes registers of the loop; capped: so does a softcap on Blackwell.
    """
    if capability is None:
        return Tile(16, 16, 4, 1)
    if dtype == torch.float32:  # FMA dots: registers hold slices of both operands too
        warps = 4 if D > 128 and capability == GFX else 8
        return Tile(64, 32, 8, 1) if D <= 64 else Tile(16, 32, warps, 1)
    if capability == GFX:
        return Tile(128, 64, 4, 1) if D <= 128 else Tile(64, 32, 4, 1)
    if capability[0] == 9:
        # two warpgroups of 64 queries; D = 256 leaves 64 queries, and the warpgroups halve the keys
        keys = 64 if busy else 128
        return Tile(128, 128, 8, 3) if D <= 64 else Tile(128, keys, 8, 2) if D <= 128 else Tile(64, 64, 8, 2)
    if capability[0] == 10:
        keys = 32 if busy or capped else 64
        return Tile(128, 64, 8, 3) if D <= 64 else Tile(128, keys, 8, 2) if D <= 128 else Tile(64, 64, 8, 2)
    if small_shared(capability):
        return Tile(128, 64, 4, 2) if D <= 64 else Tile(128, 32, 8, 2) if D <= 128 else Tile(32, 32, 8, 2)
    # one block of 8 warps fills the registers: shared memory has room for a third stage
    return Tile(128, 64, 4, 3) if D <= 64 else Tile(128, 64, 8, 3) if D <= 128 else Tile(32, 64, 8, 2)


def backward_tiles(D: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> tuple[Tile, Tile]:
    """(dk and dv: BN keys held, BM queries walked; dq: BM queries held, BN keys walked).

    Two accumulators [BN, D] leave dk and dv few registers for scores and their gradients: BM is small.
    """
    if capability is None:
        return Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)
    if dtype == torch.float32:
        warps = 8 if D > 128 and capability != GFX else 4
        return Tile(16, 16, warps, 1), Tile(32 if D <= 64 else 16, 16, 4, 1)
    if capability == GFX:
        return (Tile(32, 64, 4, 1), Tile(64, 32, 4, 1)) if D <= 128 else (Tile(16, 32, 4, 1), Tile(32, 32, 4, 1))
    if capability[0] in (9, 10):
        if D <= 64:
            return Tile(32, 128, 8, 2), Tile(128, 128 if capability[0] == 9 else 64, 8, 2)
        if capability[0] == 10:
            return (Tile(32, 64, 8, 1), Tile(128, 32, 8, 2)) if D <= 128 else (Tile(16, 32, 8, 1), Tile(64, 32, 8, 2))
        return (Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)) if D <= 128 else (Tile(16, 64, 8, 2), Tile(64, 32, 8, 2))
    if D <= 64:
        return Tile(32, 64, 8, 2), Tile(64, 32, 4, 2)
    return (Tile(32, 64, 8, 1), Tile(64, 32, 8, 1)) if D <= 128 else (Tile(16, 32, 8, 1), Tile(32, 16, 8, 1))
