"""Launches that the scan's forward and backward share: activations, the maps of segments and of their groups."""

import torch
import triton

from .scan_activation import activate_kernel
from .scan_maps import compose_maps_kernel, segment_maps_kernel
from .scan_plan import AHEAD, FEW_LANES, MAP_VECTORS, SHORT, WARP, Plan, given, width


def gate_flags(beta, lam, update_rule, gated) -> dict:
    """The compile-time arguments that every scan kernel takes."""
    return {
        "SHARED": beta is not None and beta.shape[-1] == 1,
        "LAM_SHARED": lam is not None and lam.shape[-1] == 1,
        "RULE": update_rule,
        "COUPLED": lam is None,
        "GATE": gated,
    }


def activated(mem_q, mem_k):
    """q and k in use, fp32 and contiguous."""
    B, T, H, R = mem_q.shape
    zq, zk = (None if x is None else x.new_empty(x.shape, dtype=torch.float32) for x in (mem_q, mem_k))
    RP, total = triton.next_power_of_2(R), B * T * H
    if total:
        activate_kernel[(triton.cdiv(total, WARP),)](
            given(mem_q), given(mem_k), zq, zk, T, H, total, R=R, RP=RP, LANES=WARP,
            WQ=width(mem_q, R, RP), WK=width(mem_k, R, RP), WZ=width(zq, R, RP), num_warps=1, num_stages=1,
        )  # fmt: skip
    return zq, zk


def replay_inputs(cut: Plan, tokens, cu_seqlens, write, activation, tape_len):
    """(tokens as a replay takes them, compile-time arguments that follow): q and k activated unless it does that."""
    mem_q, mem_k, mem_v, beta, lam = tokens if write else (tokens[0], None, None, None, None)
    T, R = mem_q.shape[1::2]
    longest = T if cu_seqlens is None else -(-T // max(cu_seqlens.shape[0] - 1, 1))  # the mean: all the host knows
    short = longest <= SHORT and not cut.levels
    if activation and not short:
        mem_q, mem_k = activated(mem_q, mem_k)
    ahead = 1 if longest == 1 else AHEAD[cut.RP][-1]
    while tape_len % ahead:  # a tape's state is stored between two blocks of tokens
        ahead //= 2
    CW = cut.RP // cut.NB
    constants = {
        "ACT": activation and short,
        "SHORT": short,
        "U": ahead,
        "WQ": width(mem_q, R, CW),
        "WK": width(mem_k, R, CW),
    }
    return (mem_q, mem_k, mem_v, beta, lam), constants


def build_maps(cut: Plan, x, put, mem_k, beta, lam, beta_bias, lam_bias, token_mask, cu_seqlens, flags, reverse):
    """(maps, biases) of all levels. put: mem_v; reverse: dreads, and x is mem_q."""
    B, T, H, R = mem_k.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    RP, LANES, total = cut.RP, cut.LANES, sum(cut.slots)
    maps = mem_k.new_empty((total, H, 1 if cut.map_shared else RP, RP, RP), dtype=torch.float32)
    biases = mem_k.new_empty((total, H, RP, RP), dtype=torch.float32)
    few, many = MAP_VECTORS[RP]
    vectors = 2 if cut.map_shared else few if cut.slots[0] * H * RP <= FEW_LANES else many
    turns = 1 if cut.map_shared else -(-(RP + 1) // vectors)
    options = {"num_warps": cut.num_warps, "num_stages": 1}
    wide = reverse and x.dtype == torch.float32
    blocks = cut.blocks(cut.slots[0], H)
    segment_maps_kernel[(blocks * turns,)](
        given(x), given(put), given(mem_k), given(beta), given(lam), given(beta_bias), given(lam_bias),
        given(token_mask), cu_seqlens, maps, biases, T, N, H, cut.L, blocks,
        R=R, RP=RP, VECTORS=vectors, MAP_SHARED=cut.map_shared, **flags, REVERSE=reverse, LANES=LANES,
        U=AHEAD[RP][(vectors > 1) + wide], WX=width(x, R, RP), WK=width(mem_k, R, RP), WM=min(RP, 4), **options,
    )  # fmt: skip
    source, L = 0, cut.L
    for slots, G in zip(cut.slots[1:], (cut.group, cut.supergroup), strict=False):
        target = source + cut.slots[0] if source == 0 else cut.third
        blocks = cut.blocks(slots, H)
        compose_maps_kernel[(blocks * (1 if cut.map_shared else RP + 1),)](
            cu_seqlens, maps, biases, T, N, H, L, source, target, blocks,
            RP=RP, G=G, MAP_SHARED=cut.map_shared, REVERSE=reverse, LANES=LANES, WM=min(RP, 4), **options,
        )  # fmt: skip
        source, L = target, L * G
    return maps, biases
