"""The last pass of the forward scan: every segment from its true start state.

A lane holds its channels of one row of S in registers and walks its segment: 4 R operations a token and row,
no exchange with other lanes up to R = 16. With one segment per sequence this is the whole scan.
"""

import triton
import triton.language as tl

from .common import axpby, dot, load_columns, store_columns, widen, zero_columns
from .scan_maps import carry_state
from .scan_tokens import (
    blank,
    blank_columns,
    first_slot,
    is_live,
    lane_of,
    load_bias,
    load_gates,
    load_value,
    load_vector,
    offset_of,
    open_gates,
    segment_of,
    terms,
    vector,
)


@triton.jit
def load_state(state, slot, h, row, first, live, R: tl.constexpr, CW: tl.constexpr, W: tl.constexpr):
    """Channels of a row of state[slot, h]; 0 where not live or there is no state."""
    if state is None:
        return zero_columns(row, CW)
    else:
        offset = offset_of(state, slot, h, row, W) + first
        return widen(load_columns(state[0], offset, live & (row < R), first, R, CW, W))


@triton.jit
def store_state(state, slot, h, row, first, live, x, R: tl.constexpr, W: tl.constexpr):
    store_columns(state[0], offset_of(state, slot, h, row, W) + first, live & (row < R), first, x, R, W)


@triton.jit
def clear_tail(out, cu_seqlens, N, T, slot, slots, h, row, live):
    """Zeros for a packed batch's tokens past the last sequence, in turns over all segments' lanes."""
    if out is not None:
        token = tl.load(cu_seqlens + N).to(tl.int64) + slot
        while tl.min(token, 0) < T:
            tl.store(out[0] + offset_of(out, token * 0, token, h) + row, 0.0, mask=live & (token < T))
            token += slots


@triton.jit
def _fetch(q, k, v, beta, lam, token_mask, batch, token, h, row, first, inside, WRITE: tl.constexpr,
           R: tl.constexpr, CW: tl.constexpr, SHARED: tl.constexpr, LAM_SHARED: tl.constexpr,
           WQ: tl.constexpr, WK: tl.constexpr):  # fmt: skip
    """A token as loaded: (q, k, v, beta, lam, live); q in place of what a read-only token lacks."""
    live = is_live(token_mask, batch, token, inside)
    held = live & (row < R)
    qx = load_vector(q, batch, token, h, first, live, R, CW, WQ)
    if not WRITE:
        return qx, qx, qx[0], qx[0], qx[0], live
    else:
        kx = load_vector(k, batch, token, h, first, live, R, CW, WK)
        value = load_value(v, batch, token, h, row, held)
        b, l = load_gates(beta, lam, batch, token, h, row, held, SHARED, LAM_SHARED)
        return qx, kx, value, b, l, live


@triton.jit
def fetch_block(q, k, v, beta, lam, token_mask, batch, base, t, count, h, row, first, U: tl.constexpr,
                WRITE: tl.constexpr, R: tl.constexpr, CW: tl.constexpr, SHARED: tl.constexpr,
                LAM_SHARED: tl.constexpr, WQ: tl.constexpr, WK: tl.constexpr):  # fmt: skip
    """Tokens t .. t + U - 1 of a segment of count tokens, as loaded."""
    found = ()
    for u in tl.static_range(U):
        found = found + (_fetch(q, k, v, beta, lam, token_mask, batch, base + t + u, h, row, first, t + u < count,
                                WRITE, R, CW, SHARED, LAM_SHARED, WQ, WK),)  # fmt: skip
    return found


@triton.jit
def _blank_block(q, k, v, beta, lam, row, U: tl.constexpr, WRITE: tl.constexpr, CW: tl.constexpr):
    """What fetch_block returns, of no tokens."""
    qx = blank_columns(q, row, CW)
    token = (qx, qx, qx[0], qx[0], qx[0], row < 0)
    if WRITE:
        kx, b = blank_columns(k, row, CW), blank(beta, row)
        token = (qx, kx, blank(v, row), b, b if lam is None else blank(lam, row), row < 0)
    found = ()
    for _ in tl.static_range(U):
        found = found + (token,)
    return found


@triton.jit(do_not_specialize=["T", "N", "L", "slots", "second", "third"])
def replay_kernel(
    q, k, v, beta, lam, beta_bias, lam_bias, token_mask, cu_seqlens, start, start_slots, has_initial, maps, biases,
    final, final_slots, tape, reads, T, N, H, L, slots, second, third,
    R: tl.constexpr, RP: tl.constexpr, NB: tl.constexpr, MAP_SHARED: tl.constexpr, SHARED: tl.constexpr,
    LAM_SHARED: tl.constexpr, RULE: tl.constexpr, COUPLED: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
    WRITE: tl.constexpr, PER_TOKEN: tl.constexpr, COPIED: tl.constexpr, TAPE: tl.constexpr, SHORT: tl.constexpr,
    LEVELS: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, LANES: tl.constexpr, U: tl.constexpr,
    WQ: tl.constexpr, WK: tl.constexpr, WS: tl.constexpr, WF: tl.constexpr, WT: tl.constexpr, WM: tl.constexpr,
):  # fmt: skip
    """reads of each segment of L tokens; the final state; the state at every TAPE-th token. start_slots: the slot
    of each sequence's state (None: its own number), < 0 for padding; final_slots: where states go, [N], or per
    token (PER_TOKEN). COPIED: start is already in sequence order. LEVELS 0: segments are whole sequences.
    U tokens are in flight while U are in work, and the first turn works on none; not so where sequences are SHORT."""
    PACKED: tl.constexpr = cu_seqlens is not None
    CW: tl.constexpr = RP // NB
    slot, h, row, block = lane_of(tl.program_id(0), H, RP, NB, LANES)
    first = block * CW
    n, s, begin, length = segment_of(slot, cu_seqlens, T, N, L)
    batch = n * (1 - PACKED)
    held = (length >= 0) & (row < R)
    count = tl.minimum(length - s * L, L)
    base = begin + s * L

    source = n
    if start_slots is not None:
        source = tl.load(start_slots + n, mask=held, other=-1).to(tl.int64)
    used = held & (source >= 0)
    loaded = used
    if has_initial is not None:
        loaded = used & (tl.load(has_initial + n, mask=held, other=0) != 0)
    state = load_state(start, n if COPIED else source, h, row, first, loaded, R, CW, WS)
    if LEVELS > 0:
        state = carry_state(state, maps, biases, slot, n, s, begin, length, T, L, H, h, row, second, third, RP,
                            MAP_SHARED, False, PACKED, LEVELS, G1, G2, WM)  # fmt: skip
    b_bias = load_bias(beta_bias, h, row, used, SHARED)
    l_bias = load_bias(lam_bias, h, row, used, LAM_SHARED)

    steps = tl.max(count, 0)
    present = tl.where(source >= 0, count, 0)
    t = 0
    if not SHORT:
        t = -U
        ahead = _blank_block(q, k, v, beta, lam, row, U, WRITE, CW)
    while t < steps:
        if SHORT:
            taken = fetch_block(q, k, v, beta, lam, token_mask, batch, base, t, present, h, row, first, U, WRITE, R, CW,
                                SHARED, LAM_SHARED, WQ, WK)  # fmt: skip
        else:
            taken = ahead
            ahead = fetch_block(q, k, v, beta, lam, token_mask, batch, base, t + U, present, h, row, first, U, WRITE,
                                R, CW, SHARED, LAM_SHARED, WQ, WK)  # fmt: skip
        if TAPE > 0:
            if (t >= 0) & (t % TAPE == 0):
                place = ((first_slot(n, begin, T, TAPE, PACKED) + (s * L + t) // TAPE) * H + h) * R + row
                store_columns(tape, place * R + first, used & (t < count), first, state, R, WT)
        for u in tl.static_range(U):
            qx, kx, value, b, l, live = taken[u]
            read = tl.where(live, dot(state, vector(qx, NB, ACT), NB), 0.0)
            token = base + t + u
            inside = held & (t + u >= 0) & (t + u < count)
            tl.store(reads[0] + offset_of(reads, batch, token, h) + row, read, mask=inside & (block == 0))
            if WRITE:
                kv = vector(kx, NB, ACT)
                b, l = open_gates(b, l, b_bias, l_bias, COUPLED, GATE)
                keep, erase, write = terms(b, l, live, RULE)
                state = axpby(keep, state, write * value.to(tl.float32) - erase * dot(state, kv, NB), kv)
            if PER_TOKEN:
                place = tl.load(final_slots[0] + batch * final_slots[1] + token, mask=inside, other=-1).to(tl.int64)
                store_state(final, place, h, row, first, used & inside & (place >= 0), state, R, WF)
        t += U

    if not PER_TOKEN:
        place = source
        if final_slots is not None:
            place = tl.load(final_slots[0] + n, mask=held, other=-1).to(tl.int64)
        last = (s + 1) * L >= length
        store_state(final, place, h, row, first, used & last & (place >= 0), state, R, WF)
    if PACKED:
        clear_tail(reads, cu_seqlens, N, T, slot, slots, h, row, (row < R) & (block == 0))


@triton.jit(do_not_specialize=["N"])
def copy_states_kernel(pool, slots, has_initial, out, N, H, R: tl.constexpr, LANES: tl.constexpr):
    """out [N, H, R, R] = the states that sequences start from: 0 where there is none. A lane per row of S."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    row, h, n = lane % R, lane // R % H, lane // R // H
    live = n < N
    source = n
    if slots is not None:
        source = tl.load(slots + n, mask=live, other=-1).to(tl.int64)
    loaded = live & (source >= 0)
    if has_initial is not None:
        loaded = loaded & (tl.load(has_initial + n, mask=live, other=0) != 0)
    state = load_state(pool, source, h, row, 0, loaded, R, R, 1)
    store_state(out, n, h, row, 0, live, state, R, 1)
