"""A few new tokens per row through the whole layer in two launches: read the state, prepare q, k, v, append, attend;
then merge, and advance the state.

First launch: one program per (row, kv head, block of query columns, part of the keys); the G heads of T tokens are
the columns of one tile. Parts 0 .. splits - 1 share the cache as it was: each asks L2 for its first keys and values,
under that latency replays the row's few tokens from the old state, corrects, norms and rotates its queries, and then
walks its share, found on the device from cache_seqlens. One part more, where there are new keys, prepares and appends
them and attends to them from registers. Programs without keys leave at once. Second launch: one program per (token,
head) adds the parts in their order; one per (row, state head) stores the reads and advances the state.

Order: the first launch reads states and slots below cache_seqlens and writes other slots and its own partial results;
the second writes states, each by the only program that still reads it. So no program reads what another of its launch
writes, and none waits for another. Grids and splits follow from shapes and the device alone: a graph captured at one
length replays at any. A row's bits depend on its own tokens, keys and on splits.

Floor: the row's keys and values once through HBM, 4 HKV D bytes a slot in bf16: on an H200 (4.3 TB/s) at 8 heads of
128 channels 1, 8, 31 us for 1k, 8k, 32k keys. There one row is 8 x 34 programs, two to a multiprocessor, each with
96 KB of keys and values in flight (latency asks for about 40 KB a multiprocessor); the shares are 1, 4 and 16 blocks
of 64 keys. Partial results are less than 8 splits / keys of the cache's bytes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attention import LN2, LOG2E, visible, window
from .attention_splits import multiprocessors
from .attention_tiles import GFX, capability, small_shared
from .decode_state import advance_state, row_span, state_slot
from .decode_tiles import absorb, find_page, new_tokens, prefetch, query_tile
from .lowering import launches
from .prologue import joined_channels, pair_count
from .sequences import search_steps, sequence_of


# fmt: off
@triton.jit
def walk(
    acc, total, peak, query, begin, stop, low, row, slots, k_head, v_head, table, stride_kb, stride_kt, stride_vb,
    stride_vt, stride_table, left, right, factor, softcap, cap_scale,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr, CAPPED: tl.constexpr,
    PAGE: tl.constexpr, BN: tl.constexpr, FLIGHT: tl.constexpr,
):
    """Attention to the slots low or begin .. stop of the cache; begin is a multiple of BN."""
    k_channels, v_channels = joined_channels(D, HALF, INTERLEAVED, P)[None, :], tl.arange(0, 2 * P)[None, :]
    page = find_page(begin, stop, row, table, stride_table, PAGE, BN)
    for key in tl.range(begin, stop, BN, num_stages=FLIGHT):
        keys = key + tl.arange(0, BN)
        inside = (keys >= low) & (keys < stop)
        at = keys.to(tl.int64) if PAGE == 0 else keys.to(tl.int64) % PAGE
        k_at, v_at = (page * stride_kb + at * stride_kt)[:, None], (page * stride_vb + at * stride_vt)[:, None]
        page = find_page(key + BN, stop, row, table, stride_table, PAGE, BN)  # ahead, so that loads of keys can be
        k_block = tl.load(k_head + k_at + k_channels, mask=inside[:, None] & (k_channels < D), other=0.0)
        v_block = tl.load(v_head + v_at + v_channels, mask=inside[:, None] & (v_channels < D), other=0.0)
        sees = visible(slots[:, None], keys[None, :], low, stop, left, right)
        acc, total, peak = absorb(acc, total, peak, query, k_block, v_block, sees, factor, softcap, cap_scale, CAPPED)
    return acc, total, peak


@triton.jit(do_not_specialize=["T", "HKV", "splits", "parts", "blocks", "left", "right", "stride_table", "state_heads"])
def decode_split_kernel(
    q, k, v, k_cache, v_cache, part_out, part_lse,
    mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, pool, state_indices, has_initial,
    delta_q, delta_k, delta_v, q_norm, k_norm, cos, sin, positions,
    token_mask, cu_seqlens, cache_seqlens, leftpad, table,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_kc_b, stride_kc_t, stride_kc_h, stride_vc_b, stride_vc_t, stride_vc_h,
    stride_mq_b, stride_mq_t, stride_mq_h, stride_mk_b, stride_mk_t, stride_mk_h, stride_mv_b, stride_mv_t, stride_mv_h,
    stride_b_b, stride_b_t, stride_b_h, stride_l_b, stride_l_t, stride_l_h, stride_bb, stride_lb,
    stride_s_p, stride_s_h, stride_dq, stride_dk, stride_dv,
    stride_c_b, stride_c_t, stride_sn_b, stride_sn_t, stride_pos, stride_mask, stride_table,
    T, HKV, splits, parts, blocks, left, right, eps, scale, softcap, state_heads,
    RULE: tl.constexpr, WRITE: tl.constexpr, ACTIVATE: tl.constexpr, GATE: tl.constexpr,
    BETA_STEP: tl.constexpr, LAM_STEP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, TOKENS: tl.constexpr,
    MAX_T: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    P: tl.constexpr, GATHERED: tl.constexpr, CAPPED: tl.constexpr, PAGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, FLIGHT: tl.constexpr, AHEAD: tl.constexpr,
):
    """Results of one part: part_out [B T HQ, parts, D], part_lse [B T HQ, parts] in base 2."""
    pid = tl.program_id(0)
    kv_head = (pid % HKV).to(tl.int64)  # heads of a key lie side by side in memory: so do their programs
    block = pid // HKV % blocks
    split = pid // HKV // blocks % parts
    row = (pid // HKV // blocks // parts).to(tl.int64)
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
    slots = first + step
    oldest, newest = first + block * BM // G, first + tl.minimum((block * BM + BM - 1) // G, count - 1)
    low = tl.maximum(tl.maximum(low, oldest - left), 0)  # what lies before no query of the tile sees, and none reads
    begin = low // BN * BN
    stop = tl.minimum(old_end, newest + right + 1)
    share = tl.cdiv(tl.cdiv(tl.maximum(stop - begin, 0), BN), splits) * BN
    begin += split * share
    stop = tl.where(split < splits, tl.minimum(stop, begin + share), begin)
    # one base for the row: what a thread keeps of its columns' places across the walk are 32 bits
    base = (batch * T + start) * (HKV * G) * parts + split
    part = (step * (HKV * G) + (pid % HKV) * G + column % G) * parts
    if (block * BM // G >= count) | ((begin >= stop) & (split < splits)):
        tl.store(part_lse + base + part, tl.full([BM], float("-inf"), tl.float32), mask=live)
        return

    k_head, v_head = k_cache + kv_head * stride_kc_h, v_cache + kv_head * stride_vc_h
    if AHEAD > 0:
        if begin < stop:
            prefetch(
                begin, stop, low, row, k_head, v_head, table, stride_kc_b, stride_kc_t, stride_vc_b, stride_vc_t,
                stride_table, PAGE, D, P, AHEAD,
            )
    memory = (mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias)
    strides = (
        stride_mq_b, stride_mq_t, stride_mq_h, stride_mk_b, stride_mk_t, stride_mk_h, stride_mv_b, stride_mv_t,
        stride_mv_h, stride_b_b, stride_b_t, stride_b_h, stride_l_b, stride_l_t, stride_l_h, stride_bb, stride_lb,
    )
    rotary = (cos, sin, positions, stride_c_b, stride_c_t, stride_sn_b, stride_sn_t, stride_pos)
    state, loads = pool, True
    if mem_q is not None:
        slot, loads = state_slot(row, state_indices, has_initial)
        state = pool + slot * stride_s_p
    query = query_tile(
        q, batch, start, step, slots, head, count, stride_q_b, stride_q_t, stride_q_h, state, loads, memory, strides,
        state_heads, stride_s_h, delta_q, stride_dq, q_norm, eps, rotary, RULE, WRITE, ACTIVATE, GATE,
        BETA_STEP, LAM_STEP, R, RP, TOKENS, GATHERED, D, HALF, INTERLEAVED, P,
    )
    acc = tl.zeros([BM, 2 * P], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    factor, cap_scale = scale * LOG2E, 0.0
    if CAPPED:
        factor, cap_scale = LOG2E, scale / softcap
    if split < splits:
        acc, total, peak = walk(
            acc, total, peak, query, begin, stop, low, row, slots, k_head, v_head, table, stride_kc_b, stride_kc_t,
            stride_vc_b, stride_vc_t, stride_table, left, right, factor, softcap, cap_scale,
            D, HALF, INTERLEAVED, P, CAPPED, PAGE, BN, FLIGHT,
        )
    elif k is not None:
        own_step = tl.arange(0, MAX_T)
        own_slots = first + own_step
        k_block, v_block = new_tokens(
            k, v, k_head, v_head, block == 0, batch, start, own_step, own_slots, kv_head, count, row, table,
            (stride_k_b, stride_k_t, stride_k_h, stride_kc_b, stride_kc_t),
            (stride_v_b, stride_v_t, stride_v_h, stride_vc_b, stride_vc_t), stride_table,
            state, loads, memory, strides, state_heads, stride_s_h, delta_k, delta_v, stride_dk, stride_dv,
            k_norm, eps, rotary, RULE, WRITE, ACTIVATE, GATE, BETA_STEP, LAM_STEP, R, RP, TOKENS,
            GATHERED, D, HALF, INTERLEAVED, P, PAGE,
        )
        sees = visible(slots[:, None], own_slots[None, :], low, first + count, left, right)
        acc, total, peak = absorb(acc, total, peak, query, k_block, v_block, sees, factor, softcap, cap_scale, CAPPED)

    sees_any = live & (total > 0)
    total = tl.where(sees_any, total, 1.0)
    channel = tl.arange(0, 2 * P)[None, :]
    rows = part_out + base * D + part[:, None] * D
    tl.store(rows + channel, acc / total[:, None], mask=live[:, None] & (channel < D))
    tl.store(part_lse + base + part, tl.where(sees_any, peak + tl.log2(total), float("-inf")), mask=live)


@triton.jit(do_not_specialize=["T", "N", "steps", "parts", "state_programs", "HQ", "state_heads"])
def decode_merge_kernel(
    part_out, part_lse, out, lse, reads,
    mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, pool, state_indices, target_indices, has_initial,
    token_mask, cu_seqlens, stride_o_b, stride_o_t, stride_o_h, stride_e_b, stride_e_h, stride_e_t,
    stride_mq_b, stride_mq_t, stride_mq_h, stride_mk_b, stride_mk_t, stride_mk_h, stride_mv_b, stride_mv_t, stride_mv_h,
    stride_b_b, stride_b_t, stride_b_h, stride_l_b, stride_l_t, stride_l_h, stride_bb, stride_lb,
    stride_s_p, stride_s_h, stride_r_b, stride_r_t, stride_r_h, stride_mask, stride_target,
    T, N, steps, parts, state_programs, HQ, state_heads,
    RULE: tl.constexpr, WRITE: tl.constexpr, ACTIVATE: tl.constexpr, GATE: tl.constexpr, EACH: tl.constexpr,
    BETA_STEP: tl.constexpr, LAM_STEP: tl.constexpr, J: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    JP: tl.constexpr, D: tl.constexpr, C: tl.constexpr, MAX_T: tl.constexpr, SP: tl.constexpr, SC: tl.constexpr,
):
    """Programs 0 .. state_programs advance states (EACH: stored after every token), the others merge a token's head."""
    pid = tl.program_id(0)
    memory = (mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias)
    strides = (
        stride_mq_b, stride_mq_t, stride_mq_h, stride_mk_b, stride_mk_t, stride_mk_h, stride_mv_b, stride_mv_t,
        stride_mv_h, stride_b_b, stride_b_t, stride_b_h, stride_l_b, stride_l_t, stride_l_h, stride_bb, stride_lb,
    )
    if mem_q is not None:
        if pid < state_programs:
            advance_state(
                pid, T, memory, strides, pool, state_indices, target_indices, has_initial, reads, token_mask,
                cu_seqlens, stride_s_p, stride_s_h, stride_r_b, stride_r_t, stride_r_h, stride_mask, stride_target,
                state_heads, RULE, WRITE, ACTIVATE, GATE, EACH, BETA_STEP, LAM_STEP, R, RP, MAX_T,
            )
            return

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
    logs = tl.load(part_lse + item * parts + every, mask=live & (every < parts), other=float("-inf"))
    peak = tl.max(logs, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(logs - base), 0)
    column = tl.arange(0, C)
    acc = tl.zeros([SC, C], tl.float32)
    for s0 in range(0, parts, SC):
        chunk = s0 + tl.arange(0, SC)
        log = tl.load(part_lse + item * parts + chunk, mask=live & (chunk < parts), other=float("-inf"))
        found = (log > float("-inf"))[:, None] & (column < D)[None, :]
        part = tl.load(part_out + ((item * parts + chunk) * D)[:, None] + column[None, :], mask=found, other=0.0)
        acc += tl.exp2(log - base)[:, None] * part
    result = tl.sum(acc, 0) / tl.where(total > 0, total, 1.0)
    at = out + batch * stride_o_b + t * stride_o_t + head * stride_o_h + column
    tl.store(at, result.to(out.dtype.element_ty), mask=column < D)
    log_sum = tl.where(total > 0, (base + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, float("-inf"))
    tl.store(lse + batch * stride_e_b + head * stride_e_h + t * stride_e_t, log_sum)
    if reads is not None:  # those of live tokens are the state programs' work
        j = tl.arange(0, JP)
        at = reads + batch * stride_r_b + t * stride_r_t + (j // R) * stride_r_h + j % R
        tl.store(at, tl.zeros([JP], tl.float32), mask=(j < J) & (live == 0) & (head == 0))
# fmt: on


class Tile(NamedTuple):
    """BM query columns (tokens x query heads of a kv head) by BN keys; AHEAD keys asked for before the queries."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int
    FLIGHT: int | None  # stages of loads that feed no dot
    AHEAD: int


def decode_tile(columns: int, D: int, dtype: torch.dtype, capability) -> Tile:
    """Shared memory holds num_stages - 1 blocks of k and of v [BN, D], all of them in flight: 96 KB on Hopper. As much
    is asked for ahead. Wider column tiles would only spend registers: a decode step has few columns. Heads that are no
    power of two, whose pairs lie askew, take more of them; fp32, whose products are FMAs in registers, more still."""
    if dtype == torch.float32:
        BM = min(triton.next_power_of_2(columns), 4)
        flight, ahead = (None, 0) if capability in (None, GFX) else (3, 64)
        return Tile(BM, 16, 4 if BM * D <= 512 else 8, 1, flight, ahead)
    even = D <= 128 and not D & (D - 1)
    BM = 32 if columns > 16 and even else 16
    BN, warps = 64 if D <= 128 else 32, 4 if BM == 16 and even else 8
    if capability is None:
        return Tile(BM, 16, warps, 1, None, 0)
    if capability == GFX:
        return Tile(BM, BN, warps, 2, None, 0)
    stages = 2 if small_shared(capability) else 3 if capability[0] < 9 else 4
    return Tile(BM, BN, warps, stages, None, BN * triton.next_power_of_2(stages - 1))


MAX_TOKENS = 16  # new tokens of a row
SPLIT_KEYS = 64  # one block, the least that a split can walk
MAX_SPLITS = 128


def automatic_splits(programs: int, slots: int, tile: Tile, device: torch.device) -> int:
    """One wave of programs, 8 warps to a multiprocessor, over the capacity of the cache: its shape, not the lengths
    in it."""
    wave = multiprocessors(device) * 8 // tile.num_warps
    return max(1, min(wave // max(programs, 1), slots // SPLIT_KEYS, MAX_SPLITS))


def _strides(*tensors, dims):
    """The first dims strides of each, 0 of those that are absent."""
    return [stride for x in tensors for stride in ((0,) * dims if x is None else x.stride()[:dims])]


def _rotary_strides(table):
    """(batch, row) of a table [S, rotary_dim/2] or of gathered rows [B, T, rotary_dim/2]."""
    return (0, 0) if table is None else table.stride()[:2] if table.ndim == 3 else (0, table.stride(0))


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
    tokens = T if cu_seqlens is None else min(max_seqlen or MAX_TOKENS, T)
    if tokens > MAX_TOKENS:
        raise ValueError(f"delta_decode: q must have at most {MAX_TOKENS} new tokens per row, got {tokens}")
    device = device_capability or capability(q.device)
    tile = decode_tile(tokens * G, D, q.dtype, device)
    blocks = triton.cdiv(tokens * G, tile.BM)
    page = 0 if block_table is None else k_cache.shape[1]
    slots = k_cache.shape[1] if block_table is None else page * block_table.shape[1]
    splits = num_splits or automatic_splits(N * HKV * blocks, slots, tile, q.device)
    parts = splits + (k is not None)
    # shared memory lets two programs of 4 warps live side by side: to spare registers for a third would only spill
    options = {} if device in (None, GFX) else {"maxnreg": 255}
    part_out = q.new_empty((B * T * HQ, parts, D), dtype=torch.float32)
    part_lse = q.new_empty((B * T * HQ, parts), dtype=torch.float32)
    memory = (mem_q, mem_k, mem_v, beta, lam)
    tokenwise = (*_strides(*memory, dims=3), *_strides(beta_bias, lam_bias, dims=1), *_strides(state_pool, dims=2))
    scan = {
        "RULE": update_rule, "WRITE": write, "ACTIVATE": use_qk_activation_in_kernel, "GATE": use_gate_in_kernel,
        "BETA_STEP": int(beta is not None and beta.shape[-1] == R),
        "LAM_STEP": int(lam is not None and lam.shape[-1] == R), "R": R, "RP": triton.next_power_of_2(R),
        "D": D, "MAX_T": MAX_TOKENS,
    }  # fmt: skip
    if N * T:
        decode_split_kernel[(N * HKV * blocks * parts,)](
            q, k, v, k_cache, v_cache, part_out, part_lse, *memory, beta_bias, lam_bias, state_pool, state_indices,
            has_initial_state, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight, rotary_cos, rotary_sin,
            positions, token_mask, cu_seqlens, cache_seqlens, cache_leftpad, block_table,
            *_strides(q, k, v, k_cache, v_cache, dims=3), *tokenwise, *_strides(delta_q, delta_k, delta_v, dims=1),
            *_rotary_strides(rotary_cos), *_rotary_strides(rotary_sin),
            *_strides(positions, token_mask, block_table, dims=1), T, HKV, splits, parts, blocks,
            *window(causal, window_left, window_right), norm_eps, softmax_scale, softcap, H,
            **scan, TOKENS=triton.next_power_of_2(tokens), G=G, HALF=0 if rotary_cos is None else rotary_cos.shape[-1],
            INTERLEAVED=rotary_interleaved and rotary_cos is not None, P=P,
            GATHERED=rotary_cos is not None and rotary_cos.ndim == 3, CAPPED=softcap > 0, PAGE=page, **tile._asdict(),
            **options,
        )  # fmt: skip
    state_programs = 0 if mem_q is None else N * H
    if B * T * HQ + state_programs:
        targets, C = output_state_indices, triton.next_power_of_2(D)
        SP = triton.next_power_of_2(parts)
        decode_merge_kernel[(state_programs + B * T * HQ,)](
            part_out, part_lse, out, lse, reads, *memory, beta_bias, lam_bias, state_pool, state_indices, targets,
            has_initial_state, token_mask, cu_seqlens, *out.stride()[:3], *lse.stride(), *tokenwise,
            *_strides(reads, dims=3), *_strides(token_mask, targets, dims=1),
            T, N, search_steps(N), parts, state_programs, HQ, H,
            **scan, EACH=targets is not None and targets.ndim == 2, J=H * R, JP=triton.next_power_of_2(H * R), C=C,
            SP=SP, SC=min(SP, max(8192 // C, 16)), num_warps=4,
        )  # fmt: skip


LOWERED = {
    "published": {"deltas": "q"},
    "every correction": {},
    "no memory": {"H": 0},
    "page=16": {"page": 16, "deltas": "q"},
    "page=64 fp16": {"G": 8, "D": 64, "page": 64, "dtype": torch.float16},
    "read only keys": {"append": False, "deltas": "q"},
    "D=256": {"G": 8, "D": 256, "half": 32},
    "draft softcap": {"T": 5, "H": 4, "page": 64, "softcap": 30.0},
    "draft D=96": {"T": 16, "D": 96},
    "fp32": {"dtype": torch.float32},
    "draft fp32": {"T": 4, "D": 96, "dtype": torch.float32, "page": 16},
}


def lowerings(capability):
    """Every (name, kernel, signature, constexprs, options) that the launcher picks on such a device, at sizes of an
    8B model."""
    for name, case in LOWERED.items():
        yield from _lowered(name, capability, **case)


def _lowered(
    name, capability, T=1, G=4, D=128, half=None, H=1, page=0, softcap=0.0, deltas="qkv", append=True,
    dtype=torch.bfloat16,
):  # fmt: skip
    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def ints(*shape):
        return empty(*shape, dtype=torch.int32)

    B, HKV, R = 8, 8, 8
    q, cache = empty(B, T, HKV * G, D, dtype=dtype), empty(512, page or 8192, HKV, D, dtype=dtype)
    new = [empty(B, T, HKV, D, dtype=dtype) if append else None] * 2
    memory, tables = [None] * 5, [empty(40960, half or D // 2)] * 2
    pool = slots = reads = bias = None
    corrections = dict.fromkeys("qkv")
    if H:
        memory = [empty(B, T, H, R, dtype=dtype)] * 4 + [None]
        pool, slots, reads, bias = empty(64, H, R, R), ints(B), empty(B, T, H, R), empty(H, R)
        corrections |= {x: empty(HKV * (G if x == "q" else 1) * D, H * R, dtype=dtype) for x in deltas}
    norm = empty(D, dtype=dtype)
    yield from launches(
        f"{name} T={T} G={G} D={D}", delta_decode, q, cache, cache, *new, *memory, pool, slots, None, None, bias, None,
        "standard", True, True, True, *corrections.values(), norm, norm if append else None, 1e-6, *tables, False, None,
        None, None, 0, ints(B), None, ints(B, 512) if page else None,
        0.1, True, -1, -1, softcap, 32, q, reads, empty(B, HKV * G, T), capability,
    )  # fmt: skip
