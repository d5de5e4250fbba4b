"""Flash attention over k, v as they lie (the call's own, packed, or in a cache), the preparation of q fused.

One program per query tile and head, heavy tiles first, heads of a group side by side so that they share K and V
in L2. It prepares its tile of q in fp32 (correction, RMSNorm, RoPE; prologue.py), rounds it once and keeps it in
shared memory; scores, the accumulator [BM, D] and the running maximum and sum stay in registers. Key blocks that
every query of the tile sees whole take a loop without masks, those at the edges a masked one. Over a cache the
keys of a tile may be split: partial results go through fp32 memory and are merged in the order of the splits.

Floor: 4 D flops per visible (query, key) and head; q, k, v, out once through HBM.
"""

import functools

import torch
import triton
import triton.language as tl

from .attention import (
    LN2,
    LOG2E,
    count_unmasked,
    find_tile,
    load_rows,
    owned,
    past_full,
    product,
    tanh,
    tile_count,
    visible,
    window,
)
from .attention_splits import automatic_splits, merge, multiprocessors
from .attention_tiles import backward_tiles, capability, forward_tile
from .delta_attention_bwd import delta_attention_bwd
from .lowering import launches
from .prologue import joined, joined_channels, pair_count, prepared_pairs


# fmt: off
@triton.jit
def query_tile(
    q, stride_t, live, tokens, slots, head, row, batch,
    reads, stride_reads_b, stride_reads_t, stride_reads_h, delta_q, stride_delta, weight, eps,
    cos, sin, stride_cos_b, stride_cos_t, stride_sin_b, stride_sin_t, positions, stride_positions, scale,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    GATHERED: tl.constexpr, P: tl.constexpr,
):
    """q' [BM, 2 P] of the tokens [BM] at q, in q's dtype, with the sign of scale."""
    live = live[:, None]
    at = tokens[:, None].to(tl.int64)
    read_rows = reads
    if reads is not None:
        read_rows = reads + batch * stride_reads_b + at * stride_reads_t
    cos_rows = cos
    sin_rows = sin
    if cos is not None:
        table_row = at
        if not GATHERED:
            # a query before slot 0 sees nothing, yet its rotation must be a row of the table
            table_row = tl.maximum(slots, 0)[:, None].to(tl.int64)
            if positions is not None:
                table_row = tl.load(positions + batch * stride_positions + at, mask=live, other=0).to(tl.int64)
        cos_rows = cos + batch * stride_cos_b + table_row * stride_cos_t
        sin_rows = sin + batch * stride_sin_b + table_row * stride_sin_t
    a, b = prepared_pairs(
        q + at * stride_t, live, read_rows, stride_reads_h, delta_q, stride_delta, head, weight, eps,
        cos_rows, sin_rows, H, R, D, HALF, INTERLEAVED, P,
    )
    dtype = q.dtype.element_ty
    sign = tl.where(scale < 0, -1.0, 1.0)
    return joined((a * sign).to(dtype), (b * sign).to(dtype), INTERLEAVED)


@triton.jit
def key_rows(first, table, inside, BN: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr):
    """(page, slot within it) of the slots first .. first + BN; a block within one page looks it up once."""
    keys = first + tl.arange(0, BN)
    page = 0
    if PAGE > 0 and PAGE % BN == 0:
        page = tl.load(table + first // PAGE).to(tl.int64)
        keys = first % PAGE + tl.arange(0, BN)
    elif PAGE > 0:
        if MASKED:
            page = tl.load(table + keys // PAGE, mask=inside, other=0).to(tl.int64)
        else:
            page = tl.load(table + keys // PAGE).to(tl.int64)
        keys = keys % PAGE
    return page, keys


@triton.jit
def attend(
    acc, total, peak, q, begin, full_begin, full_stop, stop, k, v, table, shown, slots, low, high, left, right,
    scale, softcap, stride_k_b, stride_k_t, stride_v_b, stride_v_t, k_columns, v_columns,
    EVEN: tl.constexpr, CAPPED: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):
    """Online softmax over the key blocks of full_begin .. full_stop, or MASKED the others of begin .. stop.

    scale is not negative; total and peak [BM].
    """
    for step in tl.range(begin if MASKED else full_begin, stop - (full_stop - full_begin) if MASKED else full_stop, BN):
        first = tl.multiple_of(past_full(step, full_begin, full_stop, MASKED), BN)
        keys = first + tl.arange(0, BN)
        inside = (keys >= low) & (keys < high)
        if shown is not None:
            inside = tl.load(shown + keys, mask=inside, other=0).to(tl.int1)
        page, rows = key_rows(first, table, inside, BN, PAGE, MASKED)
        if PAGE > 0 and PAGE % BN != 0:
            k_block = load_rows(k, rows, stride_k_t, page, stride_k_b, k_columns, inside, MASKED, EVEN)
            v_block = load_rows(v, rows, stride_v_t, page, stride_v_b, v_columns, inside, MASKED, EVEN)
        else:
            k_block = load_rows(k + page * stride_k_b, rows, stride_k_t, None, 0, k_columns, inside, MASKED, EVEN)
            v_block = load_rows(v + page * stride_v_b, rows, stride_v_t, None, 0, v_columns, inside, MASKED, EVEN)
        scores = product(q, tl.trans(k_block))  # [BM, BN]
        factor = scale * LOG2E
        if CAPPED:
            scores = softcap * tanh(scores * (scale / softcap))
            factor = LOG2E
        if MASKED:
            sees = visible(slots[:, None], keys[None, :], low, high, left, right) & inside[None, :]
            scores = tl.where(sees, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        base = new_peak
        if MASKED:  # -inf for a query that has seen no key
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(scores * factor - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, 1)
        acc = product(p.to(v_block.dtype), v_block, acc * shrink[:, None])
        peak = new_peak
    return acc, total, peak
# fmt: on


# fmt: off
@triton.jit(do_not_specialize=["T", "N", "splits", "stride_out_s", "stride_lse_s", "stride_lse_b", "stride_lse_h",
                               "left", "right", "stride_table"])
def attention_fwd_kernel(
    q, k, v, out, lse, reads, delta_q, weight, cos, sin, positions,
    token_mask, cu_seqlens, cache_seqlens, leftpad, block_table, state_indices,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_out_s, stride_out_b, stride_out_t, stride_out_h, stride_lse_s, stride_lse_b, stride_lse_h,
    stride_reads_b, stride_reads_t, stride_reads_h, stride_delta,
    stride_cos_b, stride_cos_t, stride_sin_b, stride_sin_t, stride_positions, stride_mask, stride_table,
    eps, scale, softcap, left, right, T, N, splits,
    HQ: tl.constexpr, G: tl.constexpr, H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, GATHERED: tl.constexpr, P: tl.constexpr, PAGE: tl.constexpr,
    APPENDED: tl.constexpr, CAPPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    """out, lse of N rows; with splits, of one of the shares of a tile's keys."""
    pid = tl.program_id(0)
    head = (pid % HQ).to(tl.int64)
    split = (pid // HQ) % splits
    tile = (tl.num_programs(0) - 1 - pid) // (HQ * splits)
    row, batch, start, length, at = find_tile(tile, cu_seqlens, N, T, BM)
    if at >= length:
        return
    row, batch = row.to(tl.int64), tl.cast(batch, tl.int64)
    step = at + tl.arange(0, BM)
    tokens = start + step
    count = owned(row, length, cu_seqlens, N)
    low, end = 0, length
    if cache_seqlens is not None:
        if token_mask is not None:
            count = count_unmasked(token_mask + batch * stride_mask + start, count)
        if state_indices is not None:
            count = tl.where(tl.load(state_indices + row, mask=row < N, other=-1) < 0, 0, count)
        end = tl.load(cache_seqlens + row, mask=row < N, other=0)
        if APPENDED:
            end += count
        if leftpad is not None:
            low = tl.load(leftpad + row, mask=row < N, other=0)
    live = step < count
    first = 0
    if cache_seqlens is not None:
        first = end - count
    elif token_mask is not None:
        live = tl.load(token_mask + batch * stride_mask + tokens, mask=live, other=0).to(tl.int1)
    slots = first + step

    query = query_tile(
        q + batch * stride_q_b + head * stride_q_h, stride_q_t, live, tokens, slots, head, row, batch,
        reads, stride_reads_b, stride_reads_t, stride_reads_h, delta_q, stride_delta, weight, eps,
        cos, sin, stride_cos_b, stride_cos_t, stride_sin_b, stride_sin_t, positions, stride_positions, scale,
        H, R, D, HALF, INTERLEAVED, GATHERED, P,
    )

    # begin .. stop: blocks with a visible key; full_begin .. full_stop of them are seen whole by every query
    last = tl.minimum(at + BM, count) - 1
    begin = tl.maximum(low, first + at - left) // BN * BN
    stop = tl.where(at < count, tl.minimum(end, first + last + right + 1), 0)
    stop = begin + tl.cdiv(tl.maximum(stop - begin, 0), BN) * BN
    full_begin = tl.minimum(tl.cdiv(tl.maximum(low, first + last - left), BN) * BN, stop)
    full_stop = tl.maximum(tl.minimum(end, first + at + right + 1), 0) // BN * BN
    full_stop = tl.maximum(tl.minimum(full_stop, stop), full_begin)
    share = tl.cdiv((stop - begin) // BN, splits) * BN
    begin = tl.minimum(begin + split * share, stop)
    stop = tl.minimum(begin + share, stop)

    k_base, v_base = k + head // G * stride_k_h, v + head // G * stride_v_h
    table, shown = block_table, token_mask
    if PAGE > 0:
        table = block_table + row * stride_table
    elif cache_seqlens is None:
        k_base += batch * stride_k_b + tl.cast(start, tl.int64) * stride_k_t
        v_base += batch * stride_v_b + tl.cast(start, tl.int64) * stride_v_t
        if token_mask is not None:
            shown = token_mask + batch * stride_mask + start
    else:
        k_base += row * stride_k_b
        v_base += row * stride_v_b
    if cache_seqlens is not None:
        shown = None
    channels = joined_channels(D, HALF, INTERLEAVED, P)
    column = tl.arange(0, 2 * P)
    k_columns, v_columns = (channels, channels < D), (column, column < D)
    acc = tl.zeros([BM, 2 * P], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    size = tl.abs(scale)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), stop)
    full_stop = tl.minimum(tl.maximum(full_stop, full_begin), stop)
    if shown is not None:
        full_stop = full_begin
    if shown is None:
        acc, total, peak = attend(
            acc, total, peak, query, begin, full_begin, full_stop, stop, k_base, v_base, table, None, slots, low, end,
            left, right, size, softcap, stride_k_b, stride_k_t, stride_v_b, stride_v_t, k_columns, v_columns,
            D == 2 * P, CAPPED, PAGE, BN, False,
        )
    acc, total, peak = attend(
        acc, total, peak, query, begin, full_begin, full_stop, stop, k_base, v_base, table, shown, slots, low, end,
        left, right, size, softcap, stride_k_b, stride_k_t, stride_v_b, stride_v_t, k_columns, v_columns,
        D == 2 * P, CAPPED, PAGE, BN, True,
    )

    sees = live & (total != 0)
    total = tl.where(sees, total, 1.0)
    result = tl.where(sees[:, None], acc / total[:, None], 0.0).to(out.dtype.element_ty)
    split = split.to(tl.int64)
    out_rows = out + split * stride_out_s + batch * stride_out_b + head * stride_out_h
    out_rows += tokens[:, None].to(tl.int64) * stride_out_t
    inside = step < length
    tl.store(out_rows + column[None, :], result, mask=inside[:, None] & (column < D)[None, :])
    log_sum = tl.where(sees, (peak + tl.log2(total)) * LN2, float("-inf"))
    tl.store(lse + split * stride_lse_s + batch * stride_lse_b + head * stride_lse_h + tokens, log_sum, mask=inside)
# fmt: on


def _strides(x: torch.Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()[:count]


def _table_strides(x: torch.Tensor | None) -> tuple[int, int]:
    """(batch, row) strides of a table [S, rotary_dim/2] or gathered rows [B, T, rotary_dim/2]."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1)) if x.dim() == 3 else (0, x.stride(0))


def _launch(q, k, v, out, lse, prologue, rows, cache, state_indices, appended, softmax, splits, tile):
    """Attention of every row into out, lse; with splits > 1 these have a leading dimension for them."""
    reads, delta_q, weight, eps, cos, sin, interleaved, positions = prologue
    token_mask, cu_seqlens, _ = rows
    cache_seqlens, leftpad, block_table = cache
    scale, causal, left, right, softcap = softmax
    B, T, HQ, D = q.shape
    H, R = (1, 1) if reads is None else reads.shape[2:]
    tiles = tile_count(B, T, cu_seqlens, tile.BM)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out_strides, lse_strides = (((0,) * 5 + x.stride())[-n:-1] for x, n in ((out, 5), (lse, 4)))
    attention_fwd_kernel[(tiles * HQ * splits,)](
        q, k, v, out, lse, reads if delta_q is not None else None, delta_q, weight, cos, sin, positions,
        token_mask, cu_seqlens, cache_seqlens, leftpad, block_table, state_indices,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out_strides, *lse_strides,
        *_strides(reads, 3), *_strides(delta_q, 1), *_table_strides(cos), *_table_strides(sin),
        *_strides(positions, 1), *_strides(token_mask, 1), *_strides(block_table, 1),
        eps, scale, softcap, *window(causal, left, right), T, N, splits,
        HQ=HQ, G=HQ // k.shape[2], H=H, R=R, D=D, HALF=0 if cos is None else cos.shape[-1],
        INTERLEAVED=interleaved and cos is not None, GATHERED=cos is not None and cos.dim() == 3,
        P=max(8, pair_count(D)), PAGE=0 if block_table is None else k.shape[1], APPENDED=appended,
        CAPPED=softcap > 0, **tile._asdict(),
    )  # fmt: skip


def delta_attention_fwd(
    q, k, v, reads, delta_q, q_norm_weight, norm_eps, rotary_cos, rotary_sin, rotary_interleaved, positions,
    token_mask, cu_seqlens, max_seqlen, softmax_scale, causal, window_left, window_right, softcap, *, tile=None
):  # fmt: skip
    """(out [B, T, HQ, D], lse [B, HQ, T]) over the call's own, prepared, k and v."""
    B, T, HQ, D = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, HQ, T), dtype=torch.float32)
    if out.numel():
        prologue = (reads, delta_q, q_norm_weight, norm_eps, rotary_cos, rotary_sin, rotary_interleaved, positions)
        rows = (token_mask, cu_seqlens, max_seqlen)
        softmax = (softmax_scale, causal, window_left, window_right, softcap)
        tile = tile or forward_tile(D, q.dtype, capability(q.device), token_mask is not None, softcap > 0)
        _launch(q, k, v, out, lse, prologue, rows, (None, None, None), None, False, softmax, 1, tile)
    return out, lse


def small_pages(k_cache, block_table) -> bool:
    """Whether a block of keys can span pages."""
    return block_table is not None and k_cache.shape[1] % 128 != 0


def delta_attention_with_kvcache(
    q, k_cache, v_cache, reads, delta_q, q_norm_weight, norm_eps, rotary_cos, rotary_sin, rotary_interleaved,
    positions, token_mask, cu_seqlens, max_seqlen, cache_seqlens, cache_leftpad, block_table, state_indices,
    appended, softmax_scale, causal, window_left, window_right, softcap, num_splits, out, lse, *, tile=None
):  # fmt: skip
    """Into out, lse: attention over a cache, dense or paged, whose lengths stay on the device."""
    if not out.numel():
        return
    B, T, HQ, D = q.shape
    tile = tile or forward_tile(D, q.dtype, capability(q.device), small_pages(k_cache, block_table), softcap > 0)
    slots = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    programs = HQ * tile_count(B, T, cu_seqlens, tile.BM)
    splits = num_splits or automatic_splits(programs, slots, multiprocessors(q.device))
    prologue = (reads, delta_q, q_norm_weight, norm_eps, rotary_cos, rotary_sin, rotary_interleaved, positions)
    rows = (token_mask, cu_seqlens, max_seqlen)
    softmax = (softmax_scale, causal, window_left, window_right, softcap)
    cache = (cache_seqlens, cache_leftpad, block_table)
    if splits == 1:
        _launch(
            q, k_cache, v_cache, out, lse, prologue, rows, cache, state_indices, appended, softmax, 1, tile
        )  # fmt: skip
        return
    part_out = q.new_empty((splits, B, T, HQ, D), dtype=torch.float32)
    part_lse = q.new_empty((splits, B, HQ, T), dtype=torch.float32)
    _launch(
        q, k_cache, v_cache, part_out, part_lse, prologue, rows, cache, state_indices, appended, softmax, splits, tile
    )  # fmt: skip
    merge(part_out, part_lse, out, lse)


def lowerings(device: tuple[int, int] = (9, 0)):
    """Every (name, kernel, signature, constexprs, options) that a device's launchers pick: 32/8 heads, T = 8192."""
    cases = {
        "causal": {},
        "packed": {"packed": True},
        "masked": {"masked": True},
        "window": {"left": 1024},
        "softcap": {"softcap": 50.0},
        "interleaved": {"interleaved": True},
        "paged": {"page": 128},
        "small pages": {"page": 16},
        "dense cache": {"page": 0},
    }
    for D in (64, 96, 128, 256):
        for dtype in (torch.bfloat16, torch.float32):
            for case, options in cases.items():
                if case == "causal" or (D == 128 and dtype == torch.bfloat16):
                    yield from _lowered(f"D={D} {case}", D, dtype, device, **options)


def _lowered(name, D, dtype, device, packed=False, masked=False, left=-1, softcap=0.0, interleaved=False, page=None):
    T, HQ, HKV = 8192, 32, 8

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v, lse = meta(1, T, HQ, D), meta(1, T, HKV, D), meta(1, T, HKV, D), meta(1, HQ, T, dtype=torch.float32)
    table = meta(T, D // 2)
    prologue = (meta(1, T, 1, 8, dtype=torch.float32), meta(HQ * D, 8), meta(D), 1e-6, table, table, interleaved, None)
    mask = meta(1, T, dtype=torch.bool) if masked else None
    rows = (mask, meta(9, dtype=torch.int32) if packed else None, 0)
    softmax = (D**-0.5, True, left, -1, softcap)
    forward = functools.partial(delta_attention_fwd, tile=forward_tile(D, dtype, device, masked, softcap > 0))
    if page is None:
        yield from launches(name, forward, q, k, v, *prologue, *rows, *softmax)
        backward = functools.partial(delta_attention_bwd, tiles=backward_tiles(D, dtype, device))
        if not interleaved:
            yield from launches(name, backward, q, q, k, v, q, lse, *rows, *softmax)
        return
    lengths, pages = meta(1, dtype=torch.int32), None
    if page:
        pages = meta(1, T // page, dtype=torch.int32)
        k, v = (meta(T // page, page, HKV, D) for _ in range(2))
    tile = forward_tile(D, dtype, device, small_pages(k, pages))
    cached = functools.partial(delta_attention_with_kvcache, tile=tile)
    cache = (lengths, None, pages, None, True)
    yield from launches(name, cached, q, k, v, *prologue, *rows, *cache, *softmax, 2, q, lse)
