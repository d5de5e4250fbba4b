"""Words of decoding's tiles: queries, new keys and values, slots of the cache, one step of online softmax."""

import triton
import triton.language as tl

from .attention import product, tanh
from .decode_state import head_reads
from .prologue import joined, load_pairs, normed, pair_channels, rotary_rows, store_pairs

SECTOR = tl.constexpr(32)  # bytes: what a prefetch is sure to bring


# fmt: off
@triton.jit
def turns_at(slots, batch, tokens, live, rotary, GATHERED: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr):
    """(cos, sin) [M, P] of the tokens [M], by default at their slots."""
    cos, sin, positions, stride_cb, stride_ct, stride_sb, stride_st, stride_pb = rotary
    if GATHERED:
        cos_at, sin_at = batch * stride_cb + tokens * stride_ct, batch * stride_sb + tokens * stride_st
    else:
        at = tl.maximum(slots, 0)  # a query before slot 0 sees nothing, yet its rotation must be a row of the table
        if positions is not None:
            at = tl.load(positions + batch * stride_pb + tokens, mask=live, other=0)
        cos_at, sin_at = at.to(tl.int64) * stride_ct, at.to(tl.int64) * stride_st
    return rotary_rows(cos + cos_at[:, None], sin + sin_at[:, None], live[:, None], HALF, P)


@triton.jit
def slot_rows(slots, row, live, table, stride_b, stride_t, stride_table, PAGE: tl.constexpr):
    """Offset of each slot's row in a dense or paged cache."""
    slots = slots.to(tl.int64)
    if PAGE == 0:
        return row * stride_b + slots * stride_t
    else:
        page = tl.load(table + row * stride_table + slots // PAGE, mask=live, other=0).to(tl.int64)
        return page * stride_b + slots % PAGE * stride_t


@triton.jit
def find_page(first, stop, row, table, stride_table, PAGE: tl.constexpr, BN: tl.constexpr):
    """Entry of the cache that holds the slots first .. first + BN: one, or [BN] where pages are shorter than that."""
    if PAGE == 0:
        return row
    elif PAGE % BN == 0:
        return tl.load(table + row * stride_table + first // PAGE, mask=first < stop, other=0).to(tl.int64)
    else:
        slots = first + tl.arange(0, BN)
        return tl.load(table + row * stride_table + slots // PAGE, mask=slots < stop, other=0).to(tl.int64)


@triton.jit
def ask(pointers):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.uint64, bitcast=True)],
        dtype=tl.int32, is_pure=False, pack=1,
    )


@triton.jit
def prefetch(
    begin, stop, low, row, k_head, v_head, table, stride_kb, stride_kt, stride_vb, stride_vt, stride_table,
    PAGE: tl.constexpr, D: tl.constexpr, P: tl.constexpr, KEYS: tl.constexpr,
):
    """Asks L2 for the keys and values of the slots begin .. begin + KEYS, in no register and no shared memory."""
    CHANNELS: tl.constexpr = SECTOR * 8 // k_head.dtype.element_ty.primitive_bitwidth
    slots = tl.maximum(tl.minimum(begin + tl.arange(0, KEYS), stop - 1), low)  # of the others pages may be absurd
    channel = tl.minimum(tl.arange(0, 2 * P // CHANNELS) * CHANNELS, D - 1)[None, :]
    k_at = slot_rows(slots, row, slots < stop, table, stride_kb, stride_kt, stride_table, PAGE)
    v_at = slot_rows(slots, row, slots < stop, table, stride_vb, stride_vt, stride_table, PAGE)
    ask(k_head + k_at[:, None] + channel)
    ask(v_head + v_at[:, None] + channel)


@triton.jit
def lifted(reads, delta, rows, exists, stride, R: tl.constexpr, RP: tl.constexpr):
    """delta reads [M, P] of one state head: reads [M, RP], each with its rows [M, P] of delta, those that exist.

    fp32 FMA. A thread loads up to 8 of a row's weights, 16 bytes of bf16, at once and adds their terms itself.
    """
    C: tl.constexpr = 8 if RP > 8 else RP
    u = tl.zeros([rows.shape[0], rows.shape[1]], tl.float32)
    at = delta + (rows.to(tl.int64) * stride)[:, :, None]
    for c in range(RP // C):
        chunk = reads
        if RP > C:
            among = tl.arange(0, RP // C)[None, :, None] == c
            chunk = tl.sum(tl.where(among, tl.reshape(reads, [reads.shape[0], RP // C, C]), 0.0), 1)
        j = (c * C + tl.arange(0, C))[None, None, :]
        w = tl.load(at + j, mask=exists[:, :, None] & (j < R), other=0.0)
        u += tl.sum(w.to(tl.float32) * chunk[:, None, :], 2)
    return u


@triton.jit
def lifted_by(
    a, b, read, delta, stride, head, j, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr
):
    """Pairs [M, P] + column j of a head's delta x read [M]: a few registers, where latency does not count."""
    first, second = pair_channels(D, HALF, INTERLEAVED, P)
    at_a, at_b = delta + (head * D + first) * stride + j, delta + (head * D + second) * stride + j
    a += read[:, None] * tl.load(at_a, mask=first < D, other=0.0).to(tl.float32)[None, :]
    b += read[:, None] * tl.load(at_b, mask=second < D, other=0.0).to(tl.float32)[None, :]
    return a, b


@triton.jit
def query_tile(
    q, batch, start, step, slots, head, count, stride_b, stride_t, stride_h, state, loads, memory, strides, state_heads,
    stride_sh, delta, stride_delta, norm_weight, eps, rotary, RULE: tl.constexpr, WRITE: tl.constexpr,
    ACTIVATE: tl.constexpr, GATE: tl.constexpr, BETA_STEP: tl.constexpr, LAM_STEP: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, TOKENS: tl.constexpr, GATHERED: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr,
):
    """q' [BM, 2 P] of columns that are tokens step [BM] x heads [BM], rounded."""
    live = step < count
    rows = q + (batch * stride_b + (start + step) * stride_t + head * stride_h)[:, None]
    a, b = load_pairs(rows, live[:, None], D, HALF, INTERLEAVED, P)
    if delta is not None:
        for h in range(state_heads):
            reads = head_reads(
                step, count, state + h * stride_sh, loads, h, batch, start, memory, strides,
                RULE, WRITE, ACTIVATE, GATE, BETA_STEP, LAM_STEP, R, RP, TOKENS,
            )
            first, second = pair_channels(D, HALF, INTERLEAVED, P)
            own, columns = (head * D)[:, None], delta + h * R
            has_a, has_b = live[:, None] & (first < D)[None, :], live[:, None] & (second < D)[None, :]
            a += lifted(reads, columns, own + first[None, :], has_a, stride_delta, R, RP)
            b += lifted(reads, columns, own + second[None, :], has_b, stride_delta, R, RP)
    if norm_weight is not None:
        a, b = normed(a, b, norm_weight, eps, D, HALF, INTERLEAVED, P)
    if rotary[0] is not None:
        c, s = turns_at(slots, batch, start + step, live, rotary, GATHERED, HALF, P)
        a, b = a * c - b * s, b * c + a * s
    return joined(a.to(q.dtype.element_ty), b.to(q.dtype.element_ty), INTERLEAVED)


@triton.jit
def new_tokens(
    k, v, k_head, v_head, stores, batch, start, step, slots, head, count, row, table, k_strides, v_strides,
    stride_table, state, loads, memory, strides, state_heads, stride_sh, delta_k, delta_v, stride_dk, stride_dv,
    norm_weight, eps, rotary, RULE: tl.constexpr, WRITE: tl.constexpr,
    ACTIVATE: tl.constexpr, GATE: tl.constexpr, BETA_STEP: tl.constexpr, LAM_STEP: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, TOKENS: tl.constexpr, GATHERED: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr, PAGE: tl.constexpr,
):
    """(k', v') [NT, 2 P] of the row's tokens step [NT], put into their slots too if it is this program's work.

    v, which does not turn, is paired as neighbours: so it lies in the order of its channels.
    """
    live, tokens = step < count, start + step
    shown = live[:, None]
    k_rows = k + (batch * k_strides[0] + tokens * k_strides[1] + head * k_strides[2])[:, None]
    v_rows = v + (batch * v_strides[0] + tokens * v_strides[1] + head * v_strides[2])[:, None]
    ka, kb = load_pairs(k_rows, shown, D, HALF, INTERLEAVED, P)
    va, vb = load_pairs(v_rows, shown, D, 0, True, P)
    if delta_k is not None or delta_v is not None:
        for h in range(state_heads):
            reads = head_reads(
                step, count, state + h * stride_sh, loads, h, batch, start, memory, strides,
                RULE, WRITE, ACTIVATE, GATE, BETA_STEP, LAM_STEP, R, RP, TOKENS,
            )
            for j in tl.range(R, loop_unroll_factor=1):
                read = tl.sum(tl.where(tl.arange(0, RP)[None, :] == j, reads, 0.0), 1)
                if delta_k is not None:
                    ka, kb = lifted_by(ka, kb, read, delta_k, stride_dk, head, h * R + j, D, HALF, INTERLEAVED, P)
                if delta_v is not None:
                    va, vb = lifted_by(va, vb, read, delta_v, stride_dv, head, h * R + j, D, 0, True, P)
    if norm_weight is not None:
        ka, kb = normed(ka, kb, norm_weight, eps, D, HALF, INTERLEAVED, P)
    if rotary[0] is not None:
        c, s = turns_at(slots, batch, tokens, live, rotary, GATHERED, HALF, P)
        ka, kb = ka * c - kb * s, kb * c + ka * s
    dtype = k.dtype.element_ty
    ka, kb, va, vb = ka.to(dtype), kb.to(dtype), va.to(dtype), vb.to(dtype)
    k_at = slot_rows(slots, row, live, table, k_strides[3], k_strides[4], stride_table, PAGE)
    v_at = slot_rows(slots, row, live, table, v_strides[3], v_strides[4], stride_table, PAGE)
    store_pairs(k_head + k_at[:, None], ka, kb, shown & stores, D, HALF, INTERLEAVED, P)
    store_pairs(v_head + v_at[:, None], va, vb, shown & stores, D, 0, True, P)
    return joined(ka, kb, INTERLEAVED), joined(va, vb, True)


@triton.jit
def absorb(acc, total, peak, q, k, v, sees, factor, softcap, cap_scale, CAPPED: tl.constexpr):
    """Online softmax in base 2 over one block of keys: acc [BM, C], total and peak [BM], sees [BM, BN].

    Products of fp32 are sums of FMAs: a dot would want all of both operands in a thread's registers.
    """
    if k.dtype == tl.float32:
        scores = tl.sum(q[:, None, :] * k[None, :, :], 2)
    else:
        scores = product(q, tl.trans(k))
    if CAPPED:
        scores = softcap * tanh(scores * cap_scale)
    scores = tl.where(sees, scores * factor, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # of a query that has seen no key
    p = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(p, 1)
    if v.dtype == tl.float32:
        acc = acc * shrink[:, None] + tl.sum(v[None, :, :] * p[:, :, None], 1)  # p first, Triton makes a TF32 dot of it
    else:
        acc = product(p.to(v.dtype), v, acc * shrink[:, None])
    return acc, total, new_peak
# fmt: on
