"""The scan's last pass as the prologue of k and v: one launch in place of two.

A program replays the segments of its lanes from their true start states and stores their reads, then prepares a
group of heads of k or v for the tokens of those segments. The groups of one block of segments replay it each for
itself and store the same bits: a replay is a chain of dependent steps which a machine full of programs waits for
once, while reads handed from program to program would cost it a barrier. Floor: that of delta_prep for k and v,
plus the scan's inputs once per group, from L2.
"""

import triton
import triton.language as tl

from .lift import columns
from .prep_tiles import outer_strides, prep_heads, rotary_strides, token_angles
from .prologue import pair_count
from .scan_build import build_maps, gate_flags
from .scan_plan import AHEAD, Plan, given, width
from .scan_replay import replay_kernel
from .scan_tokens import segment_of

# Warps that fill the machine: two for each of an H200's 528 schedulers, so that one loads while the other computes.
# Every further one replays its segments once more.
FULL_WARPS = 1056
TILE = 512  # tokens x pairs that a warp prepares at a time: 16 pairs of a thread, loads of 16 bytes
MOST_LANES = 128


@triton.jit(do_not_specialize=["T", "N", "L", "slots", "second", "third", "group", "k_groups", "HKV"])
def replay_prep_kernel(
    mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, token_mask, cu_seqlens, start, maps, biases, final, tape,
    reads, T, N, H, L, slots, second, third,
    k_ptr, v_ptr, k_out, v_out, delta_k, delta_v, k_norm, cos_ptr, sin_ptr, positions_ptr, group, k_groups, HKV, eps,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_kob, stride_kot, stride_koh, stride_vob, stride_vot, stride_voh, stride_dk, stride_dv,
    stride_cb, stride_ct, stride_sb, stride_st, stride_pb,
    R: tl.constexpr, RP: tl.constexpr, NB: tl.constexpr, MAP_SHARED: tl.constexpr, SHARED: tl.constexpr,
    LAM_SHARED: tl.constexpr, RULE: tl.constexpr, COUPLED: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
    WRITE: tl.constexpr, TAPE: tl.constexpr, LEVELS: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr,
    LANES: tl.constexpr, U: tl.constexpr, WQ: tl.constexpr, WK: tl.constexpr, WS: tl.constexpr, WM: tl.constexpr,
    SEGMENTS: tl.constexpr, GATHERED: tl.constexpr, BT: tl.constexpr, J: tl.constexpr, JC: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of LANES lanes = SEGMENTS segments, groups of `group` heads: k_groups of k, then those of v)."""
    replay_kernel(
        mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, token_mask, cu_seqlens, start, None, None, maps, biases,
        final, None, tape, reads, T, N, H, L, slots, second, third, R, RP, NB, MAP_SHARED, SHARED, LAM_SHARED, RULE,
        COUPLED, ACT, GATE, WRITE, False, False, TAPE, False, LEVELS, G1, G2, LANES, U, WQ, WK, WS, WM,
    )  # fmt: skip
    tl.debug_barrier()  # the reads that other threads of this program stored

    PACKED: tl.constexpr = cu_seqlens is not None
    ROTATES: tl.constexpr = cos_ptr is not None
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * group
    for i in range(SEGMENTS + PACKED):
        n, s, begin, length = segment_of(block * SEGMENTS + i, cu_seqlens, T, N, L)
        first, end, step = s * L, tl.minimum(length, (s + 1) * L), s * 0 + BT
        alive = i < SEGMENTS
        if PACKED:  # the programs' turns at the rows past the last sequence, which are 0
            if i == SEGMENTS:
                begin = tl.load(cu_seqlens + N).to(tl.int64)
                first, end, step = block * BT, T - begin, tl.num_programs(0).to(tl.int64) * BT
        b = n * (1 - PACKED)
        for tile in range(first, end, step):
            index = tile + tl.arange(0, BT)
            t, n_ok = begin + index, index < end
            live = n_ok & alive
            read_at = b * reads[1] + t * reads[2]
            if tl.program_id(1) < k_groups:
                if k_ptr is not None:
                    cos, sin = token_angles(
                        cos_ptr, sin_ptr, positions_ptr, b, t, index, live, stride_cb, stride_ct, stride_sb, stride_st,
                        stride_pb, GATHERED, HALF, P,
                    )  # fmt: skip
                    prep_heads(
                        k_ptr, k_out, delta_k, k_norm, b * stride_kb + t * stride_kt, b * stride_kob + t * stride_kot,
                        read_at, n_ok, live, cos, sin, head, min(head + group, HKV), stride_kh, stride_koh, stride_dk,
                        reads[0], reads[3], eps, ROTATES, J, R, JC, D, HALF, INTERLEAVED, P,
                    )  # fmt: skip
            elif v_ptr is not None:
                v_head = head - k_groups * group
                prep_heads(
                    v_ptr, v_out, delta_v, None, b * stride_vb + t * stride_vt, b * stride_vob + t * stride_vot,
                    read_at, n_ok, live, 0.0, 0.0, v_head, min(v_head + group, HKV), stride_vh, stride_voh, stride_dv,
                    reads[0], reads[3], eps, False, J, R, JC, D, HALF, INTERLEAVED, P,
                )  # fmt: skip


def joins(cut: Plan, T: int, H: int) -> bool:
    """Whether segments give programs to join to: whole sequences in few lanes would leave them too few, and a
    program holds whole segments."""
    lanes = H * cut.RP * cut.NB
    return bool(cut.slots[0]) and cut.L <= T and lanes <= MOST_LANES and lanes & (lanes - 1) == 0


def scan_prep(
    cut: Plan, tokens, biases, initial_state, token_mask, cu_seqlens, update_rule, write, activation, gated, tape_len,
    k, v, delta_k, delta_v, k_norm_weight, norm_eps, cos, sin, interleaved, positions,
    reads, final_state, tape, k_prep, v_prep,
):  # fmt: skip
    """Fills reads, final_state, tape (a state every tape_len tokens; 0: none), and k_prep, v_prep of k, v given."""
    mem_q, mem_k, mem_v, beta, lam = tokens
    B, T, H, R = mem_q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    CW, lanes = cut.RP // cut.NB, H * cut.RP * cut.NB
    flags = gate_flags(beta, lam, update_rule, activation, gated)
    maps = map_biases = None
    if cut.levels:
        maps, map_biases = build_maps(cut, None, mem_v, mem_k, beta, lam, *biases, token_mask, cu_seqlens, flags, False)
    ahead = AHEAD[cut.RP][1]
    while tape_len % ahead:  # a tape's state is stored between two blocks of tokens
        ahead //= 2
    HKV, D = (v if k is None else k).shape[2:]
    heads = HKV * ((k is not None) + (v is not None))
    cut, P = cut._replace(LANES=max(cut.LANES, lanes)), pair_count(D)
    blocks, warps = cut.blocks(cut.slots[0], H), cut.num_warps
    group = min(HKV, triton.cdiv(blocks * heads * warps, FULL_WARPS))
    k_groups, v_groups = (0 if x is None else triton.cdiv(HKV, group) for x in (k, v))
    replay_prep_kernel[blocks, k_groups + v_groups](
        given(mem_q), *map(given, (mem_k, mem_v, beta, lam) if write else (None,) * 4), *map(given, biases),
        given(token_mask), cu_seqlens, given(initial_state), maps, map_biases, given(final_state),
        tape if tape_len else None, given(reads), T, N, H, cut.L, cut.slots[0], cut.second, cut.third,
        k, v, k_prep, v_prep, delta_k, delta_v, k_norm_weight, cos, sin, positions, group, k_groups, HKV, norm_eps,
        *(stride for x in (k, v, k_prep, v_prep) for stride in outer_strides(x)),
        *outer_strides(delta_k, 1), *outer_strides(delta_v, 1), *rotary_strides(cos), *rotary_strides(sin),
        *outer_strides(positions, 1),
        R=R, RP=cut.RP, NB=cut.NB, MAP_SHARED=cut.map_shared, **flags, WRITE=write, TAPE=tape_len, LEVELS=cut.levels,
        G1=cut.group, G2=cut.supergroup, LANES=cut.LANES, U=ahead, WQ=width(mem_q, R, CW), WK=width(mem_k, R, CW),
        WS=width(initial_state, R, min(CW, 4)), WM=min(cut.RP, 4), SEGMENTS=cut.LANES // lanes,
        GATHERED=cos is not None and cos.ndim == 3, BT=min(max(1, TILE * warps // P), 64),
        J=H * R, JC=columns(H * R), D=D, HALF=0 if cos is None else cos.shape[-1],
        INTERLEAVED=interleaved and cos is not None, P=P, num_warps=warps, num_stages=1,
    )  # fmt: skip
