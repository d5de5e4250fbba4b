"""A few new tokens per row through the whole layer in two launches: read the state, prepare q, k, v, append, attend;
then merge and advance the state.

First launch: one program per (row, kv head, block of query columns, split of the keys); the G heads of T tokens are
the columns of one tile. Each replays the row's few tokens from the old state, corrects, norms and rotates its queries
and walks its share of the cache, found on the device from cache_seqlens. Only the last split prepares the new keys
and values: it stores them and attends to them from registers, so no program waits for another. Programs without keys
leave at once. Second launch: one program per (token, head) adds the splits in their order; one per (row, state head)
stores the state, which every program of the first launch has read by then.

Grids and splits follow from shapes and the device alone, so a captured graph replays at any length.
Floor: the row's keys and values once through HBM; partial results are 4 splits / length of that.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attention import LN2, LOG2E, visible, window
from .attention_splits import multiprocessors
from .attention_tiles import GFX, capability, small_shared
from .decode_state import replay_row, row_span, store_states
from .decode_tiles import absorb, find_page, new_rows, query_tile, slot_rows, turns_at
from .lift import columns
from .lowering import launches
from .prologue import joined_channels, pair_count
from .sequences import search_steps, sequence_of


# fmt: off
@triton.jit(do_not_specialize=["T", "HKV", "splits", "blocks", "left", "right", "stride_table", "state_heads"])
def decode_split_kernel(
    q, k, v, k_cache, v_cache, part_out, part_lse,
    mem_q, mem_k, mem_v, beta, lam, pool, state_indices, has_initial, beta_bias, lam_bias, reads,
    delta_q, delta_k, delta_v, q_norm, k_norm, cos, sin, positions,
    token_mask, cu_seqlens, cache_seqlens, leftpad, table,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_kc_b, stride_kc_t, stride_kc_h, stride_vc_b, stride_vc_t, stride_vc_h,
    stride_mq_b, stride_mq_t, stride_mq_h, stride_mk_b, stride_mk_t, stride_mk_h, stride_mv_b, stride_mv_t, stride_mv_h,
    stride_b_b, stride_b_t, stride_b_h, stride_l_b, stride_l_t, stride_l_h, stride_bb, stride_lb,
    stride_s_p, stride_s_h, stride_r_b, stride_r_t, stride_r_h, stride_dq, stride_dk, stride_dv,
    stride_c_b, stride_c_t, stride_sn_b, stride_sn_t, stride_pos, stride_mask, stride_table,
    T, HKV, splits, blocks, left, right, eps, scale, softcap, state_heads,
    RULE: tl.constexpr, WRITE: tl.constexpr, ACTIVATE: tl.constexpr, GATE: tl.constexpr,
    BETA_STEP: tl.constexpr, LAM_STEP: tl.constexpr, J: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    JC: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr,
    GATHERED: tl.constexpr, CAPPED: tl.constexpr, PAGE: tl.constexpr, MAX_T: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):
    """Partial results of one split: part_out [B T HQ, splits, D], part_lse [B T HQ, splits] in base 2."""
    pid = tl.program_id(0)
    split = pid % splits
    kv_head = (pid // splits % HKV).to(tl.int64)
    block = pid // splits // HKV % blocks
    row = (pid // splits // HKV // blocks).to(tl.int64)
    batch, start, _, count = row_span(row, T, cu_seqlens, token_mask, stride_mask, state_indices, MAX_T)
    first = tl.load(cache_seqlens + row)  # slot of the row's first token; the cache holds old_end slots
    old_end = first
    if k is None:
        first -= count
    low = 0
    if leftpad is not None:
        low = tl.load(leftpad + row)
    column = block * BM + tl.arange(0, BM)
    step = column // G
    live = step < count
    head = kv_head * G + column % G
    tokens, slots = start + step, first + step
    oldest, newest = first + block * BM // G, first + tl.minimum((block * BM + BM - 1) // G, count - 1)
    begin = tl.maximum(tl.maximum(low, oldest - left), 0) // BN * BN
    stop = tl.minimum(old_end, newest + right + 1)
    share = tl.cdiv(tl.cdiv(tl.maximum(stop - begin, 0), BN), splits) * BN
    begin += split * share
    stop = tl.minimum(stop, begin + share)
    part = ((batch * T + tokens) * (HKV * G) + head) * splits + split
    # one split of the row works even without keys: it stores the reads and, being the smallest share, appends
    leads = split == splits - 1
    if (block * BM // G >= count) | ((begin >= stop) & (leads == 0)):
        tl.store(part_lse + part, tl.full([BM], float("-inf"), tl.float32), mask=live)
        return

    if mem_q is not None:
        state, loads = row, count > 0
        if state_indices is not None:
            state = tl.load(state_indices + row).to(tl.int64)
        if has_initial is not None:
            loads = loads & (tl.load(has_initial + row) != 0)
        replay_row(
            pool, state, loads, mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, reads, batch, start, count,
            state_heads,
            stride_mq_b, stride_mq_t, stride_mq_h, stride_mk_b, stride_mk_t, stride_mk_h, stride_mv_b, stride_mv_t,
            stride_mv_h, stride_b_b, stride_b_t, stride_b_h, stride_l_b, stride_l_t, stride_l_h, stride_bb, stride_lb,
            stride_s_p, stride_s_h, stride_r_b, stride_r_t, stride_r_h,
            RULE, WRITE, ACTIVATE, GATE, BETA_STEP, LAM_STEP, R, RP,
        )
        # every program of the row stores the same bits; this one's are visible to all of its threads from here
        tl.debug_barrier()

    query = query_tile(
        q, batch, tokens, slots, head, live, stride_q_b, stride_q_t, stride_q_h, reads, stride_r_b, stride_r_t,
        stride_r_h, delta_q, stride_dq, q_norm, eps, cos, sin, positions, stride_c_b, stride_c_t, stride_sn_b,
        stride_sn_t, stride_pos, GATHERED, J, R, JC, D, HALF, INTERLEAVED, P,
    )
    acc = tl.zeros([BM, 2 * P], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    factor, cap_scale = scale * LOG2E, 0.0
    if CAPPED:
        factor, cap_scale = LOG2E, scale / softcap
    k_channels, v_channels = joined_channels(D, HALF, INTERLEAVED, P)[None, :], tl.arange(0, 2 * P)[None, :]
    k_head, v_head = k_cache + kv_head * stride_kc_h, v_cache + kv_head * stride_vc_h
    page = find_page(begin, stop, row, table, stride_table, PAGE, BN)
    for key in tl.range(begin, stop, BN):
        keys = key + tl.arange(0, BN)
        inside = (keys >= low) & (keys < stop)
        at = keys.to(tl.int64) if PAGE == 0 else keys.to(tl.int64) % PAGE
        k_at, v_at = (page * stride_kc_b + at * stride_kc_t)[:, None], (page * stride_vc_b + at * stride_vc_t)[:, None]
        page = find_page(key + BN, stop, row, table, stride_table, PAGE, BN)  # ahead, so that loads of keys can be
        k_block = tl.load(k_head + k_at + k_channels, mask=inside[:, None] & (k_channels < D), other=0.0)
        v_block = tl.load(v_head + v_at + v_channels, mask=inside[:, None] & (v_channels < D), other=0.0)
        sees = visible(slots[:, None], keys[None, :], low, stop, left, right)
        acc, total, peak = absorb(acc, total, peak, query, k_block, v_block, sees, factor, softcap, cap_scale, CAPPED)

    if k is not None:  # noqa: SIM102 (known to the compiler, the inner one is not)
        if leads:
            own_step = tl.arange(0, MAX_T)
            own_live, own, own_slots = own_step < count, start + own_step, first + own_step
            own_reads = batch * stride_r_b + own * stride_r_t
            c, s = 0.0, 0.0
            if cos is not None:
                c, s = turns_at(
                    own_slots, batch, own, own_live, cos, sin, positions, stride_c_b, stride_c_t, stride_sn_b,
                    stride_sn_t, stride_pos, GATHERED, HALF, P,
                )
            k_at = slot_rows(own_slots, row, own_live, table, stride_kc_b, stride_kc_t, stride_table, PAGE)
            v_at = slot_rows(own_slots, row, own_live, table, stride_vc_b, stride_vc_t, stride_table, PAGE)
            k_block = new_rows(
                k, batch, own, own_live, kv_head, stride_k_b, stride_k_t, stride_k_h, reads, own_reads, stride_r_h,
                delta_k, stride_dk, k_norm, eps, c, s, k_head, k_at, block == 0,
                cos is not None, J, R, JC, D, HALF, INTERLEAVED, P,
            )
            # not turned: paired as neighbours it lies in the order of its channels
            v_block = new_rows(
                v, batch, own, own_live, kv_head, stride_v_b, stride_v_t, stride_v_h, reads, own_reads, stride_r_h,
                delta_v, stride_dv, None, eps, c, s, v_head, v_at, block == 0,
                False, J, R, JC, D, 0, True, P,
            )
            sees = visible(slots[:, None], own_slots[None, :], low, first + count, left, right)
            acc, total, peak = absorb(
                acc, total, peak, query, k_block, v_block, sees, factor, softcap, cap_scale, CAPPED
            )

    sees_any = live & (total > 0)
    total = tl.where(sees_any, total, 1.0)
    rows = part_out + part[:, None] * D + v_channels
    tl.store(rows, acc / total[:, None], mask=live[:, None] & (v_channels < D))
    tl.store(part_lse + part, tl.where(sees_any, peak + tl.log2(total), float("-inf")), mask=live)


@triton.jit(do_not_specialize=["T", "N", "steps", "splits", "state_programs", "HQ", "state_heads"])
def decode_merge_kernel(
    part_out, part_lse, out, lse, reads,
    mem_k, mem_v, beta, lam, pool, state_indices, target_indices, has_initial, beta_bias, lam_bias,
    token_mask, cu_seqlens,
    stride_o_b, stride_o_t, stride_o_h, stride_e_b, stride_e_h, stride_e_t, stride_r_b, stride_r_t, stride_r_h,
    stride_mk_b, stride_mk_t, stride_mk_h, stride_mv_b, stride_mv_t, stride_mv_h,
    stride_b_b, stride_b_t, stride_b_h, stride_l_b, stride_l_t, stride_l_h, stride_bb, stride_lb,
    stride_s_p, stride_s_h, stride_mask, stride_target, T, N, steps, splits, state_programs, HQ, state_heads,
    RULE: tl.constexpr, WRITE: tl.constexpr, ACTIVATE: tl.constexpr, GATE: tl.constexpr, EACH: tl.constexpr,
    BETA_STEP: tl.constexpr, LAM_STEP: tl.constexpr, J: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    JP: tl.constexpr, D: tl.constexpr, C: tl.constexpr, MAX_T: tl.constexpr, SP: tl.constexpr, SC: tl.constexpr,
):
    """Programs 0 .. state_programs store states (EACH: after every token), the others merge one token and head."""
    pid = tl.program_id(0)
    if pid < state_programs:
        store_states(
            pid, T, mem_k, mem_v, beta, lam, pool, state_indices, target_indices, has_initial, beta_bias, lam_bias,
            token_mask, cu_seqlens, stride_mk_b, stride_mk_t, stride_mk_h, stride_mv_b, stride_mv_t, stride_mv_h,
            stride_b_b, stride_b_t, stride_b_h, stride_l_b, stride_l_t, stride_l_h, stride_bb, stride_lb,
            stride_s_p, stride_s_h, stride_mask, stride_target, state_heads,
            RULE, WRITE, ACTIVATE, GATE, EACH, BETA_STEP, LAM_STEP, R, RP, MAX_T,
        )
    else:
        item = (pid - state_programs).to(tl.int64)
        head, t, batch = item % HQ, item // HQ % T, item // HQ // T
        row, live = batch, item >= 0
        if cu_seqlens is not None:
            row, _, live = sequence_of(t, cu_seqlens, N, steps, live)
        if token_mask is not None:
            live = live & (tl.load(token_mask + batch * stride_mask + t) != 0)
        if state_indices is not None:
            live = live & (tl.load(state_indices + row, mask=live, other=-1) >= 0)
        every = tl.arange(0, SP)
        logs = tl.load(part_lse + item * splits + every, mask=live & (every < splits), other=float("-inf"))
        peak = tl.max(logs, 0)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(tl.exp2(logs - base), 0)
        column = tl.arange(0, C)
        acc = tl.zeros([SC, C], tl.float32)
        for s0 in range(0, splits, SC):
            chunk = s0 + tl.arange(0, SC)
            log = tl.load(part_lse + item * splits + chunk, mask=live & (chunk < splits), other=float("-inf"))
            found = (log > float("-inf"))[:, None] & (column < D)[None, :]
            part = tl.load(part_out + ((item * splits + chunk) * D)[:, None] + column[None, :], mask=found, other=0.0)
            acc += tl.exp2(log - base)[:, None] * part
        result = tl.sum(acc, 0) / tl.where(total > 0, total, 1.0)
        at = out + batch * stride_o_b + t * stride_o_t + head * stride_o_h + column
        tl.store(at, result.to(out.dtype.element_ty), mask=column < D)
        log_sum = tl.where(total > 0, (base + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, float("-inf"))
        tl.store(lse + batch * stride_e_b + head * stride_e_h + t * stride_e_t, log_sum)
        if reads is not None:  # those of live tokens are there already
            j = tl.arange(0, JP)
            at = reads + batch * stride_r_b + t * stride_r_t + (j // R) * stride_r_h + j % R
            tl.store(at, tl.zeros([JP], tl.float32), mask=(j < J) & (live == 0) & (head == 0))
# fmt: on


class Tile(NamedTuple):
    """BM query columns (tokens x query heads of a kv head) by BN keys."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


def decode_tile(columns: int, D: int, dtype: torch.dtype, capability) -> Tile:
    """Shared memory holds num_stages - 1 blocks of k and of v [BN, D], all of them in flight: two programs of 96 KB on
    a multiprocessor of 227 KB. Wider column tiles would only spend registers: a decode step has few columns."""
    BM = 16 if columns <= 16 or D > 128 else 32
    BN, warps = 64 if D <= 128 else 32, 4 if BM == 16 and D <= 128 else 8
    if capability is None:
        return Tile(BM, 16, warps, 1)
    if dtype == torch.float32:  # FMA dots: registers hold both operands' slices
        return Tile(BM, 32 if D <= 64 else 16, warps, 1)
    if capability == GFX:
        return Tile(BM, BN, warps, 1)
    return Tile(BM, BN, warps, 2 if small_shared(capability) else 3 if capability[0] < 9 else 4)


# Keys that one split should have at least: what its prologue costs.
SPLIT_KEYS = 128
MAX_SPLITS = 128


def automatic_splits(programs: int, slots: int, device: torch.device) -> int:
    """Two programs per multiprocessor over the capacity of the cache: its shape, not the lengths in it."""
    return max(1, min(2 * multiprocessors(device) // max(programs, 1), slots // SPLIT_KEYS, MAX_SPLITS))


def _strides(x, count):
    return (0,) * count if x is None else x.stride()[:count]


def _rotary_strides(table):
    if table is None:
        return 0, 0
    return table.stride()[:2] if table.ndim == 3 else (0, table.stride(0))


def delta_decode(
    q, k_cache, v_cache, k, v, mem_q, mem_k, mem_v, beta, lam, state_pool,
    state_indices, output_state_indices, has_initial_state, beta_bias, lam_bias,
    update_rule, write, use_qk_activation_in_kernel, use_gate_in_kernel, delta_q, delta_k, delta_v,
    q_norm_weight, k_norm_weight, norm_eps, rotary_cos, rotary_sin, rotary_interleaved, positions,
    token_mask, cu_seqlens, max_seqlen, cache_seqlens, cache_leftpad, block_table,
    softmax_scale, causal, window_left, window_right, softcap, num_splits, out, reads, lse, device_capability=None,
):  # fmt: skip
    B, T, HQ, D = q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    HKV = k_cache.shape[2]
    G, P = HQ // HKV, max(8, pair_count(D))
    H, R = (1, 1) if mem_q is None else mem_q.shape[2:]
    row_tokens = T if cu_seqlens is None or not max_seqlen else min(T, max_seqlen)
    tile = decode_tile(row_tokens * G, D, q.dtype, device_capability or capability(q.device))
    blocks = triton.cdiv(row_tokens * G, tile.BM)
    page = 0 if block_table is None else k_cache.shape[1]
    slots = k_cache.shape[1] if block_table is None else page * block_table.shape[1]
    splits = num_splits or automatic_splits(N * HKV * blocks, slots, q.device)
    left, right = window(causal, window_left, window_right)
    parts = q.new_empty((B * T * HQ, splits, D), dtype=torch.float32)
    part_lse = q.new_empty((B * T * HQ, splits), dtype=torch.float32)
    scan = {
        "RULE": update_rule, "WRITE": write, "ACTIVATE": use_qk_activation_in_kernel, "GATE": use_gate_in_kernel,
        "BETA_STEP": int(beta is not None and beta.shape[-1] == R),
        "LAM_STEP": int(lam is not None and lam.shape[-1] == R), "J": H * R, "R": R, "RP": triton.next_power_of_2(R),
        "D": D, "MAX_T": triton.next_power_of_2(max(row_tokens, 16)),
    }  # fmt: skip
    if N * T:
        decode_split_kernel[(N * HKV * blocks * splits,)](
            q, k, v, k_cache, v_cache, parts, part_lse,
            mem_q, mem_k, mem_v, beta, lam, state_pool, state_indices, has_initial_state, beta_bias, lam_bias, reads,
            delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight, rotary_cos, rotary_sin, positions,
            token_mask, cu_seqlens, cache_seqlens, cache_leftpad, block_table,
            *(stride for x in (q, k, v, k_cache, v_cache, mem_q, mem_k, mem_v, beta, lam) for stride in _strides(x, 3)),
            *_strides(beta_bias, 1), *_strides(lam_bias, 1), *_strides(state_pool, 2), *_strides(reads, 3),
            *(stride for x in (delta_q, delta_k, delta_v) for stride in _strides(x, 1)),
            *_rotary_strides(rotary_cos), *_rotary_strides(rotary_sin),
            *(stride for x in (positions, token_mask, block_table) for stride in _strides(x, 1)),
            T, HKV, splits, blocks, left, right, norm_eps, softmax_scale, softcap, H,
            **scan, JC=columns(H * R), G=G, HALF=0 if rotary_cos is None else rotary_cos.shape[-1],
            INTERLEAVED=rotary_interleaved and rotary_cos is not None, P=P,
            GATHERED=rotary_cos is not None and rotary_cos.ndim == 3, CAPPED=softcap > 0, PAGE=page,
            BM=tile.BM, BN=tile.BN, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    state_programs = 0 if mem_q is None else N * H
    if B * T * HQ + state_programs:
        targets = output_state_indices
        decode_merge_kernel[(state_programs + B * T * HQ,)](
            parts, part_lse, out, lse, reads,
            mem_k, mem_v, beta, lam, state_pool, state_indices, targets, has_initial_state, beta_bias, lam_bias,
            token_mask, cu_seqlens, *out.stride()[:3], *lse.stride(), *_strides(reads, 3),
            *(stride for x in (mem_k, mem_v, beta, lam) for stride in _strides(x, 3)),
            *_strides(beta_bias, 1), *_strides(lam_bias, 1), *_strides(state_pool, 2),
            *_strides(token_mask, 1), *_strides(targets, 1),
            T, N, search_steps(N), splits, state_programs, HQ, H,
            **scan, EACH=targets is not None and targets.ndim == 2, JP=triton.next_power_of_2(H * R),
            C=triton.next_power_of_2(D), SP=triton.next_power_of_2(splits), SC=16, num_warps=4,
        )  # fmt: skip


def lowerings(capability):
    """Every (name, kernel, signature, constexprs, options) that the launcher picks on such a device, at sizes of an
    8B model."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def ints(*shape):
        return empty(*shape, dtype=torch.int32)

    for dtype in (torch.bfloat16, torch.float32):
        for T, G, D, half, J, page, softcap in (
            (1, 4, 128, 64, 8, 0, 0.0),
            (1, 4, 128, 64, 8, 16, 0.0),
            (1, 8, 64, 32, 8, 64, 0.0),
            (5, 4, 128, 64, 32, 64, 30.0),
            (16, 4, 96, 48, 8, 0, 0.0),
            (1, 8, 256, 32, 8, 0, 0.0),
        ):
            B, HKV, slots = 8, 8, 8192
            q, kv = empty(B, T, HKV * G, D, dtype=dtype), empty(B, T, HKV, D, dtype=dtype)
            cache = empty(*((512, page) if page else (B, slots)), HKV, D, dtype=dtype)
            memory = empty(B, T, J // 8, 8, dtype=dtype)
            deltas = [empty(heads * D, J, dtype=dtype) for heads in (HKV * G, HKV, HKV)]
            name = f"T={T} G={G} D={D} J={J}{f' page={page}' if page else ''}{' softcap' if softcap else ''}"
            yield from launches(
                name, delta_decode, q, cache, cache, kv, kv, *[memory] * 5, empty(64, J // 8, 8, 8),
                ints(B), None, None, empty(J // 8, 8), empty(J // 8, 8), "standard", True, True, True, *deltas,
                empty(D, dtype=dtype), empty(D, dtype=dtype), 1e-6, empty(40960, half), empty(40960, half), False, None,
                None, None, 0, ints(B), None, ints(B, 512) if page else None,
                0.1, True, -1, -1, softcap, 32, q, empty(B, T, J // 8, 8), empty(B, HKV * G, T), capability,
            )  # fmt: skip
