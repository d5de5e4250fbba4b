"""The scan's last pass and the preparation of k and v in one launch.

With corrections the replay is their prologue: a program replays the segments of its lanes from their true start
states and stores their reads, then prepares a group of heads of k or v for the tokens of those segments. The groups
of one block of segments replay it each for itself and store the same bits.

Without corrections k does not wait for the reads: the first programs replay while the others prepare it.

Floor: that of delta_prep for k and v, plus the scan's inputs, once per group, from L2.
"""

import triton
import triton.language as tl

from .lift import columns
from .prep_tiles import outer_strides, prep_heads, rotary_flags, rotary_strides, tile, token_angles
from .prologue import pair_count
from .scan_build import build_maps, gate_flags, replay_inputs
from .scan_plan import Plan, given, width
from .scan_replay import replay_kernel
from .scan_tokens import segment_of
from .sequences import search_steps, sequence_of

# Warps that fill the machine: as many as an H200's 132 SMs hold of 168 registers. Every further one replays its
# segments once more.
FULL_WARPS = 12 * 132
TILE = 256  # tokens x pairs that a warp prepares at a time: 8 pairs, 16 bytes of bf16, of a thread
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
    WRITE: tl.constexpr, TAPE: tl.constexpr, SHORT: tl.constexpr, LEVELS: tl.constexpr, G1: tl.constexpr,
    G2: tl.constexpr, LANES: tl.constexpr, U: tl.constexpr, WQ: tl.constexpr, WK: tl.constexpr, WS: tl.constexpr,
    WF: tl.constexpr, WT: tl.constexpr, WM: tl.constexpr,
    SEGMENTS: tl.constexpr, BT: tl.constexpr, J: tl.constexpr, JC: tl.constexpr, GATHERED: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of LANES lanes = SEGMENTS segments, groups of `group` heads: k_groups of k, then those of v)."""
    replay_kernel(
        mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, token_mask, cu_seqlens, start, None, None, maps, biases,
        final, None, tape, reads, T, N, H, L, slots, second, third, R, RP, NB, MAP_SHARED, SHARED, LAM_SHARED, RULE,
        COUPLED, ACT, GATE, WRITE, False, False, TAPE, SHORT, LEVELS, G1, G2, LANES, U, WQ, WK, WS, WF, WT, WM,
    )  # fmt: skip
    tl.debug_barrier()  # the reads that other threads of this program stored

    PACKED: tl.constexpr = cu_seqlens is not None
    ROTATES: tl.constexpr = cos_ptr is not None
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * group
    for i in range(SEGMENTS + PACKED):
        n, s, begin, length = segment_of(block * SEGMENTS + i, cu_seqlens, T, N, L)
        s = s.to(tl.int64)
        first, end, step = s * L, tl.minimum(length, (s + 1) * L), s * 0 + BT
        alive = i < SEGMENTS
        if PACKED:  # the programs' turns at the rows past the last sequence, which are 0
            if i == SEGMENTS:
                begin = tl.load(cu_seqlens + N).to(tl.int64)
                first, end, step = block * BT, T - begin, tl.num_programs(0).to(tl.int64) * BT
        b = n * (1 - PACKED)
        while first < end:
            index = first + tl.arange(0, BT)
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
            first += step


@triton.jit(do_not_specialize=["T", "N", "L", "slots", "second", "third", "blocks", "n_tokens", "steps", "heads"])
def replay_beside_prep_kernel(
    mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, token_mask, cu_seqlens, start, maps, biases, final, tape,
    reads, T, N, H, L, slots, second, third,
    x_ptr, y_ptr, norm_ptr, cos_ptr, sin_ptr, positions_ptr, blocks, n_tokens, steps, heads, eps,
    stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh, stride_cb, stride_ct, stride_sb, stride_st,
    stride_pb,
    R: tl.constexpr, RP: tl.constexpr, NB: tl.constexpr, MAP_SHARED: tl.constexpr, SHARED: tl.constexpr,
    LAM_SHARED: tl.constexpr, RULE: tl.constexpr, COUPLED: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
    WRITE: tl.constexpr, TAPE: tl.constexpr, SHORT: tl.constexpr, LEVELS: tl.constexpr, G1: tl.constexpr,
    G2: tl.constexpr, LANES: tl.constexpr, U: tl.constexpr, WQ: tl.constexpr, WK: tl.constexpr, WS: tl.constexpr,
    WF: tl.constexpr, WT: tl.constexpr, WM: tl.constexpr, GROUP: tl.constexpr, BT: tl.constexpr,
    GATHERED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The first `blocks` programs replay, the others prepare x, a tile of tokens and GROUP heads each."""
    if tl.program_id(0) < blocks:
        replay_kernel(
            mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, token_mask, cu_seqlens, start, None, None, maps,
            biases, final, None, tape, reads, T, N, H, L, slots, second, third, R, RP, NB, MAP_SHARED, SHARED,
            LAM_SHARED, RULE, COUPLED, ACT, GATE, WRITE, False, False, TAPE, SHORT, LEVELS, G1, G2, LANES, U, WQ, WK,
            WS, WF, WT, WM,
        )  # fmt: skip
    else:
        pid, n_tiles = tl.program_id(0) - blocks, tl.cdiv(n_tokens, BT)
        head = pid // n_tiles * GROUP
        token = (pid % n_tiles).to(tl.int64) * BT + tl.arange(0, BT)
        n_ok = token < n_tokens
        b, t = token // T, token % T
        index, live = t, n_ok
        if cu_seqlens is not None:
            _, index, live = sequence_of(t, cu_seqlens, N, steps, n_ok)
        cos, sin = token_angles(
            cos_ptr, sin_ptr, positions_ptr, b, t, index, live, stride_cb, stride_ct, stride_sb, stride_st, stride_pb,
            GATHERED, HALF, P,
        )  # fmt: skip
        prep_heads(
            x_ptr, y_ptr, None, norm_ptr, b * stride_xb + t * stride_xt, b * stride_yb + t * stride_yt, t, n_ok, live,
            cos, sin, head, min(head + GROUP, heads), stride_xh, stride_yh, 0, None, 0, eps, cos_ptr is not None,
            1, 1, 1, D, HALF, INTERLEAVED, P,
        )  # fmt: skip


def joins(cut: Plan, T: int, H: int) -> bool:
    """Whether replay can be a prologue: programs hold whole segments, and one of few lanes or of a whole sequence
    would have more to prepare than fits beside the others."""
    lanes = H * cut.RP * cut.NB
    return cut.L <= T and lanes <= MOST_LANES and lanes & (lanes - 1) == 0


def _replay(
    cut: Plan, tokens, biases, initial_state, token_mask, cu_seqlens, update_rule, write, activation, gated, tape_len,
    reads, final_state, tape, may_be_short,
):  # fmt: skip
    """Arguments of a replay, the compile-time ones apart, behind the launches that it needs."""
    B, T, H, R = tokens[0].shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    flags, CW = gate_flags(*tokens[3:], update_rule, gated), cut.RP // cut.NB
    tokens, inputs = replay_inputs(cut, tokens, cu_seqlens, write, activation, tape_len, may_be_short)
    maps = map_biases = None
    if cut.levels:
        _, mem_k, mem_v, beta, lam = tokens
        maps, map_biases = build_maps(cut, None, mem_v, mem_k, beta, lam, *biases, token_mask, cu_seqlens, flags, False)
    arguments = (
        *map(given, (*tokens, *biases)), given(token_mask), cu_seqlens, given(initial_state), maps, map_biases,
        given(final_state), tape if tape_len else None, given(reads), T, N, H, cut.L, cut.slots[0], cut.second,
        cut.third,
    )  # fmt: skip
    constants = dict(
        R=R, RP=cut.RP, NB=cut.NB, MAP_SHARED=cut.map_shared, **flags, **inputs, WRITE=write, TAPE=tape_len,
        LEVELS=cut.levels, G1=cut.group, G2=cut.supergroup, WS=width(initial_state, R, CW),
        WF=width(final_state, R, CW), WT=width(tape if tape_len else None, R, CW), WM=min(cut.RP, 4), num_stages=1,
    )  # fmt: skip
    return arguments, constants


def scan_prep(
    cut: Plan, tokens, biases, initial_state, token_mask, cu_seqlens, update_rule, write, activation, gated, tape_len,
    reads, final_state, tape, k, v, k_prep, v_prep, delta_k, delta_v, k_norm_weight, norm_eps,
    cos, sin, interleaved, positions,
):  # fmt: skip
    """Fills reads, final_state, tape (a state every tape_len tokens; 0: none), and k_prep, v_prep of k, v given."""
    arguments, constants = _replay(
        cut, tokens, biases, initial_state, token_mask, cu_seqlens, update_rule, write, activation, gated, tape_len,
        reads, final_state, tape, False,
    )  # fmt: skip
    H, R = reads.shape[2:]
    HKV, D = (v if k is None else k).shape[2:]
    heads, lanes = HKV * ((k is not None) + (v is not None)), H * cut.RP * cut.NB
    cut = cut._replace(LANES=max(cut.LANES, lanes))
    blocks, warps = cut.blocks(cut.slots[0], H), cut.num_warps
    group = min(HKV, triton.cdiv(blocks * heads * warps, FULL_WARPS))
    k_groups, v_groups = (0 if x is None else triton.cdiv(HKV, group) for x in (k, v))
    replay_prep_kernel[blocks, k_groups + v_groups](
        *arguments,
        k, v, k_prep, v_prep, delta_k, delta_v, k_norm_weight, cos, sin, positions, group, k_groups, HKV, norm_eps,
        *(stride for x in (k, v, k_prep, v_prep) for stride in outer_strides(x)),
        *outer_strides(delta_k, 1), *outer_strides(delta_v, 1), *rotary_strides(cos), *rotary_strides(sin),
        *outer_strides(positions, 1),
        **constants, LANES=cut.LANES, SEGMENTS=cut.LANES // lanes, BT=min(max(1, TILE * warps // pair_count(D)), 64),
        J=H * R, JC=columns(H * R), **rotary_flags(cos, interleaved, D), num_warps=warps,
    )  # fmt: skip


def scan_beside_prep(
    cut: Plan, tokens, biases, initial_state, token_mask, cu_seqlens, update_rule, write, activation, gated, tape_len,
    reads, final_state, tape, k, v, k_prep, v_prep, delta_k, delta_v, k_norm_weight, norm_eps,
    cos, sin, interleaved, positions,
):  # fmt: skip
    """The same where reads correct nothing, and v, which nothing else changes, is None."""
    arguments, constants = _replay(
        cut, tokens, biases, initial_state, token_mask, cu_seqlens, update_rule, write, activation, gated, tape_len,
        reads, final_state, tape, True,
    )  # fmt: skip
    B, T, heads, D = k.shape
    N = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    BT, group, warps = tile(B * T, D, 1)
    cut = cut._replace(LANES=cut.LANES * warps)
    blocks = cut.blocks(cut.slots[0], reads.shape[2])
    replay_beside_prep_kernel[(blocks + triton.cdiv(B * T, BT) * triton.cdiv(heads, group),)](
        *arguments,
        k, k_prep, k_norm_weight, cos, sin, positions, blocks, B * T, search_steps(N), heads, norm_eps,
        *outer_strides(k), *outer_strides(k_prep), *rotary_strides(cos), *rotary_strides(sin),
        *outer_strides(positions, 1),
        **constants, LANES=cut.LANES, GROUP=group, BT=BT, **rotary_flags(cos, interleaved, D),
        num_warps=warps,
    )  # fmt: skip
