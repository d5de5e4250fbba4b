"""Backward of attention on prepared q, k, v, from P = exp(s - lse) recomputed tile by tile:

    dv = P^T dout     ds = P (dout v^T - delta) [1 - (s / softcap)^2]     dq = scale ds k     dk = scale ds^T q

with delta = rowsum(dout out). Three launches, each result written by one program, so no atomics and equal bits in
every run: delta; dk and dv, a program per key block and kv head, which walks the query tiles of all heads of its
group; dq, a program per query tile and head, which walks the keys. Accumulators stay in registers. Tiles that
are seen whole take loops without masks. Dead tokens come in as zeros with an infinite lse, so that they add nothing.

Floor: 14 D flops per visible (query, key) and head, against 10 where dq is added up by atomics.
"""

import torch
import triton
import triton.language as tl

from .attention import LOG2E, find_tile, in_window, load_rows, owned, past_full, product, tanh, tile_count, window
from .attention_tiles import backward_tiles, capability


# fmt: off
@triton.jit(do_not_specialize=["T", "N"])
def rowsum_kernel(
    out, dout, delta, token_mask, cu_seqlens, stride_out_b, stride_out_t, stride_out_h,
    stride_dout_b, stride_dout_t, stride_dout_h, stride_mask, T, N,
    HQ: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BM: tl.constexpr,
):
    """delta [B, HQ, T] = rowsum(dout out); 0 of masked tokens and of those that no sequence owns."""
    pid = tl.program_id(0)
    head = (pid % HQ).to(tl.int64)
    row, batch, start, length, at = find_tile(pid // HQ, cu_seqlens, N, T, BM)
    if at >= length:
        return
    batch = tl.cast(batch, tl.int64)
    step = at + tl.arange(0, BM)
    tokens = start + step
    inside = step < length
    live = step < owned(row, length, cu_seqlens, N)
    if token_mask is not None:
        live = tl.load(token_mask + batch * stride_mask + tokens, mask=live, other=0).to(tl.int1)
    column = tl.arange(0, C)
    columns = (column, column < D)
    o = load_rows(out + batch * stride_out_b + head * stride_out_h, tokens, stride_out_t, None, 0, columns, live,
                  True, D == C)
    do = load_rows(dout + batch * stride_dout_b + head * stride_dout_h, tokens, stride_dout_t, None, 0, columns, live,
                   True, D == C)
    products = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + (batch * HQ + head) * T + tokens, products, mask=inside)


@triton.jit
def tile_gradients(
    scores, dp, log_sum, delta, sees, scale, softcap, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):
    """(P, dscores / scale) from products q . k and dout . v; log_sum (base 2) and delta broadcast to them."""
    factor = scale * LOG2E
    if CAPPED:
        bent = tanh(scores * (scale / softcap))
        scores = softcap * bent
        factor = LOG2E
    p = tl.exp2(scores * factor - log_sum)
    if MASKED:
        p = tl.where(sees, p, 0.0)
    ds = p * (dp - delta)
    if CAPPED:
        ds = ds * (1 - bent * bent)
    return p, ds


@triton.jit
def add_queries(
    dk, dv, k, v, begin, full_begin, full_stop, stop, q, dout, lse, delta, shown, keys, length, left, right,
    scale, softcap, stride_q_t, stride_dout_t, columns,
    EVEN: tl.constexpr, CAPPED: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr,
):
    """Adds query tiles of one head to dk, dv [BN, C]; scores are transposed, [BN, BM].

    Those of full_begin .. full_stop, or MASKED the others of begin .. stop.
    """
    for step in tl.range(begin if MASKED else full_begin, stop - (full_stop - full_begin) if MASKED else full_stop, BM):
        rows = tl.multiple_of(past_full(step, full_begin, full_stop, MASKED), BM) + tl.arange(0, BM)
        live = rows < length
        if shown is not None:
            live = tl.load(shown + rows, mask=live, other=0).to(tl.int1)
        q_tile = load_rows(q, rows, stride_q_t, None, 0, columns, live, MASKED, EVEN)
        do_tile = load_rows(dout, rows, stride_dout_t, None, 0, columns, live, MASKED, EVEN)
        if MASKED:
            log_sum = tl.load(lse + rows, mask=live, other=float("inf"))  # P = 0
            row_delta = tl.load(delta + rows, mask=live, other=0.0)
        else:
            log_sum = tl.load(lse + rows)
            row_delta = tl.load(delta + rows)
        scores = product(k, tl.trans(q_tile))
        dp = product(v, tl.trans(do_tile))
        sees = in_window(keys[:, None] - rows[None, :], left, right)
        p, ds = tile_gradients(
            scores, dp, (log_sum * LOG2E)[None, :], row_delta[None, :], sees, scale, softcap, CAPPED, MASKED
        )
        dv = product(p.to(do_tile.dtype), do_tile, dv)
        dk = product(ds.to(q_tile.dtype), q_tile, dk)
    return dk, dv


@triton.jit(do_not_specialize=["T", "N", "stride_lse_b", "stride_lse_h", "left", "right"])
def attention_bwd_dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, token_mask, cu_seqlens,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_dout_b, stride_dout_t, stride_dout_h, stride_lse_b, stride_lse_h, stride_mask,
    scale, softcap, left, right, T, N,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, CAPPED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):
    """dk, dv [B, T, HKV, D] contiguous. Causal: the first blocks are the heavy ones."""
    pid = tl.program_id(0)
    kv_head = (pid % HKV).to(tl.int64)
    row, batch, start, length, at = find_tile(pid // HKV, cu_seqlens, N, T, BN)
    if at >= length:
        return
    batch, start = tl.cast(batch, tl.int64), tl.cast(start, tl.int64)
    keys = at + tl.arange(0, BN)
    inside = keys < length
    count = owned(row, length, cu_seqlens, N)
    key_live = keys < count
    shown = token_mask
    if token_mask is not None:
        shown = token_mask + batch * stride_mask + start
        key_live = tl.load(shown + keys, mask=key_live, other=0).to(tl.int1)
    column = tl.arange(0, C)
    columns = (column, column < D)
    k_base = k + batch * stride_k_b + start * stride_k_t + kv_head * stride_k_h
    v_base = v + batch * stride_v_b + start * stride_v_t + kv_head * stride_v_h
    k_tile = load_rows(k_base, keys, stride_k_t, None, 0, columns, key_live, True, D == C)
    v_tile = load_rows(v_base, keys, stride_v_t, None, 0, columns, key_live, True, D == C)

    # query tiles of begin .. stop see one of the keys; those of full_begin .. full_stop all of them
    begin = tl.maximum(at - right, 0) // BM * BM
    stop = tl.minimum(count, at + BN + left)
    stop = begin + tl.cdiv(tl.maximum(stop - begin, 0), BM) * BM
    full_begin = tl.minimum(tl.cdiv(tl.maximum(at + BN - 1 - right, 0), BM) * BM, stop)
    full_stop = tl.minimum(length, at + left + 1) // BM * BM
    full_stop = tl.maximum(tl.minimum(full_stop, stop), full_begin)
    if token_mask is not None:
        full_begin, full_stop = begin, begin
    if at + BN > length:
        full_begin, full_stop = begin, begin
    dk_tile = tl.zeros([BN, C], tl.float32)
    dv_tile = tl.zeros([BN, C], tl.float32)
    for g in tl.range(0, G):
        head = kv_head * G + g
        q_base = q + batch * stride_q_b + start * stride_q_t + head * stride_q_h
        dout_base = dout + batch * stride_dout_b + start * stride_dout_t + head * stride_dout_h
        lse_base = lse + batch * stride_lse_b + head * stride_lse_h + start
        delta_base = delta + (batch * (HKV * G) + head) * T + start
        if token_mask is None:
            dk_tile, dv_tile = add_queries(
                dk_tile, dv_tile, k_tile, v_tile, begin, full_begin, full_stop, stop, q_base, dout_base, lse_base,
                delta_base, None, keys, length, left, right, scale, softcap, stride_q_t, stride_dout_t, columns,
                D == C, CAPPED, BM, False,
            )
        dk_tile, dv_tile = add_queries(
            dk_tile, dv_tile, k_tile, v_tile, begin, full_begin, full_stop, stop, q_base, dout_base, lse_base,
            delta_base, shown, keys, length, left, right, scale, softcap, stride_q_t, stride_dout_t, columns,
            D == C, CAPPED, BM, True,
        )
    at_rows = ((batch * T + start + keys) * HKV + kv_head)[:, None] * D + column[None, :]
    mask = inside[:, None] & (column < D)[None, :]
    dk_tile = tl.where(key_live[:, None], dk_tile * scale, 0.0)
    dv_tile = tl.where(key_live[:, None], dv_tile, 0.0)
    tl.store(dk + at_rows, dk_tile.to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + at_rows, dv_tile.to(dv.dtype.element_ty), mask=mask)


@triton.jit
def add_keys(
    dq, q, dout, log_sum, delta, begin, full_begin, full_stop, stop, k, v, shown, rows, length, left, right,
    scale, softcap, stride_k_t, stride_v_t, columns,
    EVEN: tl.constexpr, CAPPED: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):
    """Adds to dq [BM, C] the key blocks of full_begin .. full_stop, or MASKED the others of begin .. stop."""
    for step in tl.range(begin if MASKED else full_begin, stop - (full_stop - full_begin) if MASKED else full_stop, BN):
        keys = tl.multiple_of(past_full(step, full_begin, full_stop, MASKED), BN) + tl.arange(0, BN)
        inside = keys < length
        if shown is not None:
            inside = tl.load(shown + keys, mask=inside, other=0).to(tl.int1)
        k_block = load_rows(k, keys, stride_k_t, None, 0, columns, inside, MASKED, EVEN)
        v_block = load_rows(v, keys, stride_v_t, None, 0, columns, inside, MASKED, EVEN)
        scores = product(q, tl.trans(k_block))
        dp = product(dout, tl.trans(v_block))
        # a hidden key's score is 0, which may lie far above the log-sum-exp of those that are seen
        sees = in_window(keys[None, :] - rows[:, None], left, right) & inside[None, :]
        _, ds = tile_gradients(scores, dp, log_sum[:, None], delta[:, None], sees, scale, softcap, CAPPED, MASKED)
        dq = product(ds.to(k_block.dtype), k_block, dq)
    return dq


@triton.jit(do_not_specialize=["T", "N", "stride_lse_b", "stride_lse_h", "left", "right"])
def attention_bwd_dq_kernel(
    q, k, v, dout, lse, delta, dq, token_mask, cu_seqlens,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_dout_b, stride_dout_t, stride_dout_h, stride_lse_b, stride_lse_h, stride_mask,
    scale, softcap, left, right, T, N,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, CAPPED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):
    """dq [B, T, HQ, D] contiguous; heavy tiles first."""
    pid = tl.program_id(0)
    head = (pid % HQ).to(tl.int64)
    tile = (tl.num_programs(0) - 1 - pid) // HQ
    row, batch, start, length, at = find_tile(tile, cu_seqlens, N, T, BM)
    if at >= length:
        return
    batch, start = tl.cast(batch, tl.int64), tl.cast(start, tl.int64)
    rows = at + tl.arange(0, BM)
    inside = rows < length
    count = owned(row, length, cu_seqlens, N)
    live = rows < count
    shown = token_mask
    if token_mask is not None:
        shown = token_mask + batch * stride_mask + start
        live = tl.load(shown + rows, mask=live, other=0).to(tl.int1)
    column = tl.arange(0, C)
    columns = (column, column < D)
    q_base = q + batch * stride_q_b + start * stride_q_t + head * stride_q_h
    dout_base = dout + batch * stride_dout_b + start * stride_dout_t + head * stride_dout_h
    q_tile = load_rows(q_base, rows, stride_q_t, None, 0, columns, live, True, D == C)
    do_tile = load_rows(dout_base, rows, stride_dout_t, None, 0, columns, live, True, D == C)
    log_sum = tl.load(lse + batch * stride_lse_b + head * stride_lse_h + start + rows, mask=live, other=float("inf"))
    log_sum *= LOG2E  # infinite, P = 0, for dead queries
    row_delta = tl.load(delta + (batch * HQ + head) * T + start + rows, mask=live, other=0.0)
    k_base = k + batch * stride_k_b + start * stride_k_t + head // G * stride_k_h
    v_base = v + batch * stride_v_b + start * stride_v_t + head // G * stride_v_h

    last = tl.minimum(at + BM, length) - 1
    begin = tl.maximum(at - left, 0) // BN * BN
    stop = tl.minimum(count, last + right + 1)
    stop = begin + tl.cdiv(tl.maximum(stop - begin, 0), BN) * BN
    full_begin = tl.minimum(tl.cdiv(tl.maximum(last - left, 0), BN) * BN, stop)
    full_stop = tl.minimum(length, at + right + 1) // BN * BN
    full_stop = tl.maximum(tl.minimum(full_stop, stop), full_begin)
    if token_mask is not None:
        full_begin, full_stop = begin, begin
    total = tl.zeros([BM, C], tl.float32)
    if token_mask is None:
        total = add_keys(
            total, q_tile, do_tile, log_sum, row_delta, begin, full_begin, full_stop, stop, k_base, v_base, None, rows,
            length, left, right, scale, softcap, stride_k_t, stride_v_t, columns, D == C, CAPPED, BN, False,
        )
    total = add_keys(
        total, q_tile, do_tile, log_sum, row_delta, begin, full_begin, full_stop, stop, k_base, v_base, shown, rows,
        length, left, right, scale, softcap, stride_k_t, stride_v_t, columns, D == C, CAPPED, BN, True,
    )
    at_rows = ((batch * T + start + rows) * HQ + head)[:, None] * D + column[None, :]
    tl.store(dq + at_rows, (total * scale).to(dq.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])
# fmt: on


def delta_attention_bwd(
    dout, q, k, v, out, lse, token_mask, cu_seqlens, max_seqlen, softmax_scale, causal, window_left, window_right,
    softcap, *, tiles=None
):  # fmt: skip
    """(dq, dk, dv) of the prepared q, k, v; dout of masked tokens counts as 0."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if not q.numel():
        return dq, dk, dv
    B, T, HQ, D = q.shape
    HKV = k.shape[2]
    C = max(16, triton.next_power_of_2(D))  # a dot sums over 16 channels at least
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    mask_stride = 0 if token_mask is None else token_mask.stride(0)
    delta = q.new_empty((B, HQ, T), dtype=torch.float32)
    ROWS = 16
    rowsum_kernel[(tile_count(B, T, cu_seqlens, ROWS) * HQ,)](
        out, dout, delta, token_mask, cu_seqlens, *out.stride()[:3], *dout.stride()[:3], mask_stride, T, N,
        HQ=HQ, D=D, C=C, BM=ROWS, num_warps=4,
    )  # fmt: skip
    strides = (x for tensor in (q, k, v, dout) for x in tensor.stride()[:3])
    shared = (
        *strides, *lse.stride()[:2], mask_stride, softmax_scale, softcap, *window(causal, window_left, window_right),
        T, N,
    )  # fmt: skip
    dkdv_tile, dq_tile = tiles or backward_tiles(D, q.dtype, capability(q.device))
    fixed = {"G": HQ // HKV, "D": D, "C": C, "CAPPED": softcap > 0}
    attention_bwd_dkdv_kernel[(tile_count(B, T, cu_seqlens, dkdv_tile.BN) * HKV,)](
        q, k, v, dout, lse, delta, dk, dv, token_mask, cu_seqlens, *shared, HKV=HKV, **fixed, **dkdv_tile._asdict()
    )  # fmt: skip
    attention_bwd_dq_kernel[(tile_count(B, T, cu_seqlens, dq_tile.BM) * HQ,)](
        q, k, v, dout, lse, delta, dq, token_mask, cu_seqlens, *shared, HQ=HQ, **fixed, **dq_tile._asdict(),
    )  # fmt: skip
    return dq, dk, dv
