"""Words of decoding's tiles: queries, new keys and values, slots of the cache, one step of online softmax."""

import triton
import triton.language as tl

from .attention import product, tanh
from .lift import lift, lift_rows
from .prologue import joined, load_pairs, normed, pair_channels, rotary_rows, store_pairs


# fmt: off
@triton.jit
def turns_at(
    slots, batch, tokens, live, cos, sin, positions, stride_cb, stride_ct, stride_sb, stride_st, stride_pb,
    GATHERED: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr,
):
    """(cos, sin) [M, P] of the tokens [M], by default at their slots."""
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
def query_tile(
    q, batch, tokens, slots, head, live, stride_b, stride_t, stride_h, reads, stride_rb, stride_rt, stride_rh,
    delta, stride_delta, norm_weight, eps,
    cos, sin, positions, stride_cb, stride_ct, stride_sb, stride_st, stride_pb,
    GATHERED: tl.constexpr, J: tl.constexpr, R: tl.constexpr, JC: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr,
):
    """q' [BM, 2 P] of columns that are tokens x heads [BM], rounded."""
    rows = q + (batch * stride_b + tokens * stride_t + head * stride_h)[:, None]
    a, b = load_pairs(rows, live[:, None], D, HALF, INTERLEAVED, P)
    if delta is not None:
        first, second = pair_channels(D, HALF, INTERLEAVED, P)
        own = (head * D)[:, None]
        read_rows = reads + (batch * stride_rb + tokens * stride_rt)[:, None]
        has_a, has_b = live[:, None] & (first < D)[None, :], live[:, None] & (second < D)[None, :]
        a += lift_rows(read_rows, live[:, None], stride_rh, delta, own + first[None, :], has_a, stride_delta, J, R, JC)
        b += lift_rows(read_rows, live[:, None], stride_rh, delta, own + second[None, :], has_b, stride_delta, J, R, JC)
    if norm_weight is not None:
        a, b = normed(a, b, norm_weight, eps, D, HALF, INTERLEAVED, P)
    if cos is not None:
        c, s = turns_at(
            slots, batch, tokens, live, cos, sin, positions, stride_cb, stride_ct, stride_sb, stride_st, stride_pb,
            GATHERED, HALF, P,
        )
        a, b = a * c - b * s, b * c + a * s
    return joined(a.to(q.dtype.element_ty), b.to(q.dtype.element_ty), INTERLEAVED)


@triton.jit
def new_rows(
    x, batch, tokens, live, head, stride_b, stride_t, stride_h, reads, read_at, stride_rh, delta, stride_delta,
    norm_weight, eps, cos, sin, cache, slot_at, stores,
    TURNS: tl.constexpr, J: tl.constexpr, R: tl.constexpr, JC: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr,
):
    """k' or v' [NT, 2 P] of the row's new tokens, stored at cache + slot_at [NT] too if it is this program's work."""
    first, second = pair_channels(D, HALF, INTERLEAVED, P)
    rows = x + (batch * stride_b + tokens * stride_t + head * stride_h)[:, None]
    a, b = load_pairs(rows, live[:, None], D, HALF, INTERLEAVED, P)
    if delta is not None:
        own = head * D
        a += lift(reads, read_at, live, stride_rh, delta, own + first, first < D, stride_delta, J, R, JC)
        b += lift(reads, read_at, live, stride_rh, delta, own + second, second < D, stride_delta, J, R, JC)
    if norm_weight is not None:
        a, b = normed(a, b, norm_weight, eps, D, HALF, INTERLEAVED, P)
    if TURNS:
        a, b = a * cos - b * sin, b * cos + a * sin
    dtype = x.dtype.element_ty
    a, b = a.to(dtype), b.to(dtype)
    store_pairs(cache + slot_at[:, None], a, b, live[:, None] & stores, D, HALF, INTERLEAVED, P)
    return joined(a, b, INTERLEAVED)


@triton.jit
def absorb(acc, total, peak, q, k, v, sees, factor, softcap, cap_scale, CAPPED: tl.constexpr):
    """Online softmax in base 2 over one block of keys: acc [BM, C], total and peak [BM], sees [BM, BN]."""
    scores = product(q, tl.trans(k))
    if CAPPED:
        scores = softcap * tanh(scores * cap_scale)
    scores = tl.where(sees, scores * factor, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # of a query that has seen no key
    p = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(p, 1)
    acc = product(p.to(v.dtype), v, acc * shrink[:, None])
    return acc, total, new_peak
# fmt: on
