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


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def automatic_splits(programs: int, slots: int, multiprocessors: int) -> int:
    """Splits of the keys: one wave of programs, where each split still has 512 slots to walk."""
    return max(1, min(multiprocessors // max(programs, 1), slots // 512, 32))


def small_shared(capability: tuple[int, int]) -> bool:
    """99 KB of shared memory per block: sm_86, sm_89, sm_120."""
    return capability[1] in (6, 9) or capability[0] == 12


def forward_tile(D: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> Tile:
    """Shared memory holds q [BM, D] and num_stages blocks of k and of v [BN, D]."""
    if capability is None:
        return Tile(16, 16, 4, 1)
    if dtype == torch.float32:  # FMA dots: registers hold both operands' slices
        return Tile(64, 32, 8, 1) if D <= 64 else Tile(32, 32, 8, 1) if D <= 128 else Tile(16, 32, 8, 1)
    if capability == GFX:
        return Tile(128, 64, 4, 1) if D <= 128 else Tile(64, 32, 4, 1)
    if capability[0] in (9, 10):
        # two warpgroups of 64 queries: 64 accumulator and 64 score registers per thread at D = 128
        return Tile(128, 128, 8, 3) if D <= 64 else Tile(128, 128, 8, 2) if D <= 128 else Tile(128, 64, 8, 2)
    if small_shared(capability):
        return Tile(128, 64, 4, 2) if D <= 64 else Tile(128, 32, 8, 2) if D <= 128 else Tile(64, 32, 8, 1)
    return Tile(128, 64, 4, 3) if D <= 64 else Tile(128, 64, 8, 2) if D <= 128 else Tile(64, 64, 8, 2)
