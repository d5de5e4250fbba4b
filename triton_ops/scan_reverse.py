"""The last pass of the backward scan: every segment from the gradient at its end back to its start.

    g_{t-1} = keep g - erase h k + dr q        a = s.k    h = g.k    per row, s = S_{t-1}, g = dS_t
    dq = sum_rows dr s       dk = sum_rows (write v - erase a) g - erase h s       dv = write h
    dkeep = g.s              derase = -a h                                         dwrite = v h

States are recomputed from the tape: once forward through a tape segment, leaving one state every U tokens in
memory, then from those, last to first, the U states of each block of tokens into registers. So 1 / U of the history
exists, and only of the segments at work. A program holds whole states: sums over rows stay inside it. q and k come
activated: activation and its gradient are passes of their own.
"""

import triton
import triton.language as tl

from .common import axpby, dot, load_columns, pick, store_columns, sum_rows, widen, zero_columns
from .scan_maps import bias_offset, carry_state
from .scan_replay import clear_tail, fetch_block, load_state, store_state
from .scan_tokens import (
    first_slot,
    lane_of,
    load_bias,
    load_value,
    offset_of,
    open_gates,
    segment_of,
    terms,
)


@triton.jit
def _gate_gradients(dkeep, derase, dwrite, beta, lam, RULE: tl.constexpr, COUPLED: tl.constexpr):
    """(dbeta, dlam) of the gates in use; coupled: dbeta is the total derivative."""
    if RULE == "no_lambda":
        return derase + dwrite, dkeep * 0
    else:
        dbeta, dlam = derase + dwrite, dkeep
        if RULE == "lambda_outside":
            dbeta, dlam = derase * lam + dwrite, dkeep + derase * beta
        if COUPLED:
            dbeta -= dlam
        return dbeta, dlam


@triton.jit
def _logit_gradient(dgate, value, RP: tl.constexpr, NB: tl.constexpr, SHARED: tl.constexpr, GATE: tl.constexpr):
    if SHARED:
        dgate = sum_rows(dgate, RP, NB)
    if GATE:
        dgate = dgate * value * (1 - value)
    return dgate


@triton.jit
def _store_value(out, place, row, live, x, R: tl.constexpr, SHARED: tl.constexpr = False):
    """out[place, row] = x, of what all rows share out[place]; nothing where out is absent. place: (b, t, h)."""
    if out is not None:
        if SHARED:
            tl.store(out + place, x, mask=live & (row == 0))
        else:
            tl.store(out + place * R + row, x, mask=live)


@triton.jit
def _clear_tail(out, cu_seqlens, N, T, slot, slots, H, h, row, live, R: tl.constexpr, SHARED: tl.constexpr = False):
    if out is not None:
        if SHARED:
            clear_tail((out, 0, H, 1), cu_seqlens, N, T, slot, slots, h, row, live & (row == 0))
        else:
            clear_tail((out, 0, H * R, R), cu_seqlens, N, T, slot, slots, h, row, live)


@triton.jit
def _write(state, token, b_bias, l_bias, NB: tl.constexpr, RULE: tl.constexpr, COUPLED: tl.constexpr,
           GATE: tl.constexpr, WRITE: tl.constexpr):  # fmt: skip
    """S_{t-1} -> S_t."""
    if WRITE:
        _, kx, value, b, l, live = token
        kv = widen(kx)
        b, l = open_gates(b, l, b_bias, l_bias, COUPLED, GATE)
        keep, erase, write = terms(b, l, live, RULE)
        state = axpby(keep, state, write * value.to(tl.float32) - erase * dot(state, kv, NB), kv)
    return state


@triton.jit
def _token_back(g, state, dr, token, b_bias, l_bias, row, RP: tl.constexpr, NB: tl.constexpr, SHARED: tl.constexpr,
                LAM_SHARED: tl.constexpr, RULE: tl.constexpr, COUPLED: tl.constexpr, GATE: tl.constexpr,
                WRITE: tl.constexpr):  # fmt: skip
    """dS_t -> (dS_{t-1}, this lane's channel of dq and dk, its row of dv, dbeta, dlam); state is S_{t-1}."""
    qx, kx, value, b, l, live = token
    dz = ()
    for c in tl.static_range(len(g)):
        dz = dz + (sum_rows(dr * state[c], RP, NB),)
    own_q = pick(dz, row)
    own_k, dvalue, db, dl = dr * 0, dr * 0, dr * 0, dr * 0
    if WRITE:
        kv = widen(kx)
        value = value.to(tl.float32)
        b, l = open_gates(b, l, b_bias, l_bias, COUPLED, GATE)
        keep, erase, write = terms(b, l, live, RULE)
        a, h = dot(state, kv, NB), dot(g, kv, NB)
        put, away = write * value - erase * a, erase * h
        dz = ()
        for c in tl.static_range(len(g)):
            dz = dz + (sum_rows(put * g[c] - away * state[c], RP, NB),)
        own_k = pick(dz, row)
        dvalue = write * h
        db, dl = _gate_gradients(dot(g, state, NB), -a * h, value * h, b, l, RULE, COUPLED)
        db = _logit_gradient(tl.where(live, db, 0.0), b, RP, NB, SHARED, GATE)
        dl = _logit_gradient(tl.where(live, dl, 0.0), l, RP, NB, LAM_SHARED, GATE)
        g = axpby(keep, g, -away, kv)
    return axpby(1.0, g, dr, widen(qx)), own_q, own_k, dvalue, db, dl


@triton.jit(do_not_specialize=["T", "N", "L", "slots", "second", "third"])
def reverse_kernel(
    dreads, dfinal, q, k, v, beta, lam, beta_bias, lam_bias, token_mask, cu_seqlens, start, tape, maps, biases,
    checkpoints, dq, dk, dv, dbeta, dlam, dstart, dbeta_bias, dlam_bias, T, N, H, L, slots, second, third,
    R: tl.constexpr, RP: tl.constexpr, NB: tl.constexpr, MAP_SHARED: tl.constexpr, SHARED: tl.constexpr,
    LAM_SHARED: tl.constexpr, RULE: tl.constexpr, COUPLED: tl.constexpr, GATE: tl.constexpr, WRITE: tl.constexpr,
    TAPE: tl.constexpr, LEVELS: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, LANES: tl.constexpr,
    F: tl.constexpr, U: tl.constexpr, WQ: tl.constexpr, WK: tl.constexpr, WS: tl.constexpr, WF: tl.constexpr,
    WT: tl.constexpr, WM: tl.constexpr,
):  # fmt: skip
    """Gradients at the tokens of each segment of L (a multiple of TAPE, or whole sequences: LEVELS 0), and of the
    initial state. Read-only tokens (not WRITE) share one state: each segment leaves its sum of dr q in biases.
    checkpoints [TAPE / U, lanes, CW]; states are made F tokens at a time, and used U at a time. dbeta_bias, dlam_bias
    [slots, H, RP]: a segment's share. Gradients at tokens are contiguous."""
    PACKED: tl.constexpr = cu_seqlens is not None
    CW: tl.constexpr = RP // NB
    pid = tl.program_id(0)
    lane = pid.to(tl.int64) * LANES + tl.arange(0, LANES)
    lanes = tl.num_programs(0).to(tl.int64) * LANES
    slot, h, row, block = lane_of(pid, H, RP, NB, LANES)
    first = block * CW
    n, s, begin, length = segment_of(slot, cu_seqlens, T, N, L)
    batch = n * (1 - PACKED)
    held = (length >= 0) & (row < R)
    count = tl.minimum(length - s * L, L)
    base = begin + s * L
    stores_row = held & (block == 0)
    stores_column = (length >= 0) & (row < CW) & (first + row < R)

    g = zero_columns(row, CW)
    if WRITE:
        g = load_state(dfinal, n, h, row, first, held, R, CW, WF)
    if LEVELS > 0:
        g = carry_state(g, maps, biases, slot, n, s, begin, length, T, L, H, h, row, second, third, RP, MAP_SHARED,
                        True, PACKED, LEVELS, G1, G2, WM)  # fmt: skip
    b_bias = load_bias(beta_bias, h, row, held, SHARED)
    l_bias = load_bias(lam_bias, h, row, held, LAM_SHARED)
    zero = (row * 0).to(tl.float32)
    b_sum, l_sum = zero, zero

    part = (tl.max(count, 0) + TAPE - 1) // TAPE - 1
    while part >= 0:
        offset = part * TAPE
        size = tl.minimum(count - offset, TAPE)
        steps = tl.max(size, 0)
        token = base + offset
        if WRITE:
            place = ((first_slot(n, begin, T, TAPE, PACKED) + (s * L + offset) // TAPE) * H + h) * R + row
            state = widen(load_columns(tape, place * R + first, held & (size > 0), first, R, CW, WT))
        else:
            state = load_state(start, n, h, row, first, held, R, CW, WS)
        t = 0
        while t < steps:
            taken = fetch_block(q, k, v, beta, lam, token_mask, batch, token, t, size, h, row, first, F, WRITE, R, CW,
                                SHARED, LAM_SHARED, WQ, WK)  # fmt: skip
            for u in tl.static_range(F):
                if u % U == 0:
                    place = (((t + u) // U) * lanes + lane) * CW
                    store_columns(checkpoints, place, held & (t + u < size), 0, state, CW, WM)
                state = _write(state, taken[u], b_bias, l_bias, NB, RULE, COUPLED, GATE, WRITE)
            t += F
        tl.debug_barrier()  # whichever threads hold a checkpoint's parts, here and there

        t = (steps + U - 1) // U * U - U
        while t >= 0:
            taken = fetch_block(q, k, v, beta, lam, token_mask, batch, token, t, size, h, row, first, U, WRITE, R, CW,
                                SHARED, LAM_SHARED, WQ, WK)  # fmt: skip
            drs = ()
            for u in tl.static_range(U):
                dr = zero
                if dreads is not None:
                    live = taken[u][5] & (row < R)
                    dr = load_value(dreads, batch, token + t + u, h, row, live).to(tl.float32)
                drs = drs + (dr,)
            state = load_columns(checkpoints, ((t // U) * lanes + lane) * CW, held, 0, CW, CW, WM)
            states = ()
            for u in tl.static_range(U):
                states = states + (state,)
                if u < U - 1:
                    state = _write(state, taken[u], b_bias, l_bias, NB, RULE, COUPLED, GATE, WRITE)

            for i in tl.static_range(U):
                now = token + t + (U - 1 - i)
                inside = t + (U - 1 - i) < size
                g, own_q, own_k, dvalue, db, dl = _token_back(
                    g, states[U - 1 - i], drs[U - 1 - i], taken[U - 1 - i], b_bias, l_bias, row, RP, NB, SHARED,
                    LAM_SHARED, RULE, COUPLED, GATE, WRITE,
                )  # fmt: skip
                place = (batch * T + now) * H + h
                _store_value(dq, place, first + row, inside & stores_column, own_q, R)
                _store_value(dk, place, first + row, inside & stores_column, own_k, R)
                _store_value(dv, place, row, inside & stores_row, dvalue, R)
                _store_value(dbeta, place, row, inside & stores_row, db, R, SHARED)
                _store_value(dlam, place, row, inside & stores_row, dl, R, LAM_SHARED)
                b_sum += db
                l_sum += dl
            t -= U
        tl.debug_barrier()
        part -= 1

    if not WRITE:
        store_columns(biases, bias_offset(slot, H, h, row, RP) + first, slot < slots, 0, g, RP, WM)
    elif dstart is not None:
        store_state(dstart, n, h, row, first, held & (s == 0), g, R, WS)
    share = (slot < slots) & (block == 0)
    if dbeta_bias is not None:
        tl.store(dbeta_bias + (slot * H + h) * RP + row, b_sum, mask=share)
    if dlam_bias is not None:
        tl.store(dlam_bias + (slot * H + h) * RP + row, l_sum, mask=share)
    if PACKED:
        tail = (row < R) & (block == 0)
        _clear_tail(dq, cu_seqlens, N, T, slot, slots, H, h, row, tail, R)
        _clear_tail(dk, cu_seqlens, N, T, slot, slots, H, h, row, tail, R)
        _clear_tail(dv, cu_seqlens, N, T, slot, slots, H, h, row, tail, R)
        _clear_tail(dbeta, cu_seqlens, N, T, slot, slots, H, h, row, tail, R, SHARED)
        _clear_tail(dlam, cu_seqlens, N, T, slot, slots, H, h, row, tail, R, LAM_SHARED)


@triton.jit(do_not_specialize=["T", "N", "L"])
def sum_states_kernel(
    dfinal, partials, cu_seqlens, out, T, N, H, L, R: tl.constexpr, RP: tl.constexpr, LANES: tl.constexpr
):
    """dS of read-only tokens: dfinal + the segments' sums, in order. A lane per element of the state."""
    PACKED: tl.constexpr = cu_seqlens is not None
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    column, row, h, n = lane % R, lane // R % R, lane // (R * R) % H, lane // (R * R) // H
    live = n < N
    begin, length = n * 0, n * 0 + T
    if PACKED:
        begin = tl.load(cu_seqlens + n, mask=live, other=0).to(tl.int64)
        length = tl.load(cu_seqlens + n + 1, mask=live, other=0) - begin
    total = tl.zeros([LANES], tl.float32)
    if dfinal is not None:
        total = tl.load(dfinal[0] + offset_of(dfinal, n, h, row) + column, mask=live, other=0.0)
    count = tl.where(live, (length + L - 1) // L, 0)
    slot = first_slot(n, begin, T, L, PACKED)
    steps = tl.max(count, 0)
    i = 0
    while i < steps:
        offset = bias_offset(slot + i, H, h, row, RP) + column
        total += tl.load(partials + offset, mask=i < count, other=0.0)
        i += 1
    tl.store(out[0] + offset_of(out, n, h, row) + column, total, mask=live)


@triton.jit(do_not_specialize=["slots"])
def sum_bias_kernel(partials, out, slots, H, C: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr):
    """out [H, C] = the sum of partials [slots, H, RP] over slots: BLOCK running sums, then their tree. A program per
    head."""
    h = tl.program_id(0).to(tl.int64)
    line, row = tl.arange(0, BLOCK)[:, None], tl.arange(0, RP)[None, :]
    total = tl.zeros([BLOCK, RP], tl.float32)
    i = 0
    while i < slots:
        slot = (i + line).to(tl.int64)
        total += tl.load(partials + (slot * H + h) * RP + row, mask=(slot < slots) & (row < C), other=0.0)
        i += BLOCK
    own = tl.arange(0, RP)
    tl.store(out + h * C + own, tl.sum(total, 0), mask=own < C)
