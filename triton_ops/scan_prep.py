"""The scan's last pass beside the preparation of k, in one launch: without corrections k does not wait for the reads,
and the first programs replay while the others prepare it.

With corrections these stay two launches. Every group of heads would have to replay its tokens' segments first: compiled
for sm_90, for k and v of 8 heads of 128 channels, that came to 186 instructions of a warp a row in place of 115 at
T = 8192, in one warp a scheduler in place of three, and to 127 in place of 115 at T = 131072, to spare one launch.

Floor: that of delta_prep for k.
"""

import triton
import triton.language as tl

from .prep_tiles import outer_strides, prep_heads, rotary_flags, rotary_strides, tile, token_angles
from .scan_build import build_maps, gate_flags, replay_inputs
from .scan_plan import Plan, given, width
from .scan_replay import replay_kernel
from .sequences import search_steps, sequence_of


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


def scan_beside_prep(
    cut: Plan, tokens, biases, initial_state, token_mask, cu_seqlens, update_rule, write, activation, gated, tape_len,
    reads, final_state, tape, k, k_prep, k_norm_weight, norm_eps, cos, sin, interleaved, positions,
):  # fmt: skip
    """Fills reads, final_state, tape (a state every tape_len tokens; 0: none), and k_prep."""
    B, T, H, R = tokens[0].shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    flags, CW = gate_flags(*tokens[3:], update_rule, gated), cut.RP // cut.NB
    tokens, inputs = replay_inputs(cut, tokens, cu_seqlens, write, activation, tape_len)
    maps = map_biases = None
    if cut.levels:
        _, mem_k, mem_v, beta, lam = tokens
        maps, map_biases = build_maps(cut, None, mem_v, mem_k, beta, lam, *biases, token_mask, cu_seqlens, flags, False)
    tape = tape if tape_len else None
    heads, D = k.shape[2:]
    BT, group, warps = tile(B * T, D, 1)
    cut = cut._replace(LANES=cut.LANES * warps)
    blocks = cut.blocks(cut.slots[0], H)
    replay_beside_prep_kernel[(blocks + triton.cdiv(B * T, BT) * triton.cdiv(heads, group),)](
        *map(given, (*tokens, *biases)), given(token_mask), cu_seqlens, given(initial_state), maps, map_biases,
        given(final_state), tape, given(reads), T, N, H, cut.L, cut.slots[0], cut.second, cut.third,
        k, k_prep, k_norm_weight, cos, sin, positions, blocks, B * T,
        search_steps(0 if cu_seqlens is None else N), heads, norm_eps,
        *outer_strides(k), *outer_strides(k_prep), *rotary_strides(cos), *rotary_strides(sin),
        *outer_strides(positions, 1),
        R=R, RP=cut.RP, NB=cut.NB, MAP_SHARED=cut.map_shared, **flags, **inputs, WRITE=write, TAPE=tape_len,
        LEVELS=cut.levels, G1=cut.group, G2=cut.supergroup, WS=width(initial_state, R, CW),
        WF=width(final_state, R, CW), WT=width(tape, R, CW), WM=min(cut.RP, 4), LANES=cut.LANES, GROUP=group, BT=BT,
        **rotary_flags(cos, interleaved, D), num_warps=warps, num_stages=1,
    )  # fmt: skip
