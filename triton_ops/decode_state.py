"""The delta rule over a row's few tokens, S held whole by one program."""

import triton
import triton.language as tl

from .common import L2_EPS, gate_terms, sigmoid, tanh


@triton.jit
def row_span(row, T, cu_ptr, mask_ptr, stride_mask, indices_ptr, MAX_T: tl.constexpr):
    """(batch entry, first token, tokens, tokens that live) of a row: its masked tail and padding rows do not."""
    if cu_ptr is None:
        batch, start, length = row, row * 0, T
    else:
        batch, start = row * 0, tl.load(cu_ptr + row)
        length = tl.load(cu_ptr + row + 1) - start
        start = start.to(tl.int64)
    count = length
    if mask_ptr is not None:
        step = tl.arange(0, MAX_T)
        shown = tl.load(mask_ptr + batch * stride_mask + start + step, mask=step < length, other=0)
        count = tl.sum(shown.to(tl.int32), 0)
    if indices_ptr is not None:
        count = tl.where(tl.load(indices_ptr + row) < 0, 0, count)
    return batch, start, length, count


@triton.jit
def load_state(state, loads, R: tl.constexpr, RP: tl.constexpr):
    """S [RP, RP] at state, rows of value channels; 0 where it is not to be loaded."""
    i, j = tl.arange(0, RP)[:, None], tl.arange(0, RP)[None, :]
    return tl.load(state + i * R + j, mask=loads & (i < R) & (j < R), other=0.0)


@triton.jit
def store_state(state, s, stores, R: tl.constexpr, RP: tl.constexpr):
    i, j = tl.arange(0, RP)[:, None], tl.arange(0, RP)[None, :]
    tl.store(state + i * R + j, s, mask=stores & (i < R) & (j < R))


@triton.jit
def unit_row(x, R: tl.constexpr, RP: tl.constexpr, ACTIVATE: tl.constexpr):
    """[1, RP] from x; l2norm(tanh(x)) if the activation is the kernel's work."""
    j = tl.arange(0, RP)[None, :]
    y = tl.load(x + j, mask=j < R, other=0.0).to(tl.float32)
    if ACTIVATE:
        y = tanh(y)
        y = tl.div_rn(y, tl.maximum(tl.sqrt_rn(tl.sum(y * y, 1, keep_dims=True)), L2_EPS))
    return y


@triton.jit
def gate_column(x, bias, R: tl.constexpr, RP: tl.constexpr, STEP: tl.constexpr, GATE: tl.constexpr):
    """[RP, 1] of a gate per row (STEP 1) or shared by the rows (STEP 0); a logit if GATE."""
    i = tl.arange(0, RP)[:, None]
    y = tl.load(x + i * STEP, mask=i < R, other=0.0).to(tl.float32)
    if GATE:
        if bias is not None:
            y += tl.load(bias + i * STEP, mask=i < R, other=0.0)
        y = sigmoid(y)
    return y


# fmt: off
@triton.jit
def updated(
    s, mem_k, mem_v, beta, lam, beta_bias, lam_bias, RULE: tl.constexpr, ACTIVATE: tl.constexpr, GATE: tl.constexpr,
    BETA_STEP: tl.constexpr, LAM_STEP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
): 
    """S after the token whose operands lie at the pointers."""
    i = tl.arange(0, RP)[:, None]
    k = unit_row(mem_k, R, RP, ACTIVATE)
    v = tl.load(mem_v + i, mask=i < R, other=0.0).to(tl.float32)
    b = gate_column(beta, beta_bias, R, RP, BETA_STEP, GATE)
    decay = 1 - b
    if lam is not None and RULE != "no_lambda":
        decay = gate_column(lam, lam_bias, R, RP, LAM_STEP, GATE)
    keep, erase, write = gate_terms(b, decay, RULE)
    return keep * s + (write * v - erase * tl.sum(s * k, 1, keep_dims=True)) * k


@triton.jit
def replay_row(
    pool, state, loads, mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, reads, batch, start, count, state_heads,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_bb, stride_bt, stride_bh, stride_lb, stride_lt, stride_lh, stride_beta_bias, stride_lam_bias,
    stride_sp, stride_sh, stride_rb, stride_rt, stride_rh,
    RULE: tl.constexpr, WRITE: tl.constexpr, ACTIVATE: tl.constexpr, GATE: tl.constexpr,
    BETA_STEP: tl.constexpr, LAM_STEP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
):
    """Stores the reads of a row's count tokens; the state in the pool stays as it is."""
    i = tl.arange(0, RP)[:, None]
    for h in range(state_heads):
        s = load_state(pool + state * stride_sp + h * stride_sh, loads, R, RP)
        for t in range(count):
            token = start + t
            q = unit_row(mem_q + batch * stride_qb + token * stride_qt + h * stride_qh, R, RP, ACTIVATE)
            read = tl.sum(s * q, 1, keep_dims=True)
            tl.store(reads + batch * stride_rb + token * stride_rt + h * stride_rh + i, read, mask=i < R)
            if WRITE:  # noqa: SIM102 (known to the compiler, the inner one is not)
                if t + 1 < count:  # the state behind the last token is the second launch's
                    s = updated(
                        s, mem_k + batch * stride_kb + token * stride_kt + h * stride_kh,
                        mem_v + batch * stride_vb + token * stride_vt + h * stride_vh,
                        beta + batch * stride_bb + token * stride_bt + h * stride_bh,
                        None if lam is None else lam + batch * stride_lb + token * stride_lt + h * stride_lh,
                        None if beta_bias is None else beta_bias + h * stride_beta_bias,
                        None if lam_bias is None else lam_bias + h * stride_lam_bias,
                        RULE, ACTIVATE, GATE, BETA_STEP, LAM_STEP, R, RP,
                    )


@triton.jit
def store_states(
    pid, T, mem_k, mem_v, beta, lam, pool, state_indices, target_indices, has_initial, beta_bias, lam_bias,
    token_mask, cu_seqlens, stride_mk_b, stride_mk_t, stride_mk_h, stride_mv_b, stride_mv_t, stride_mv_h,
    stride_b_b, stride_b_t, stride_b_h, stride_l_b, stride_l_t, stride_l_h, stride_bb, stride_lb,
    stride_s_p, stride_s_h, stride_mask, stride_target, state_heads,
    RULE: tl.constexpr, WRITE: tl.constexpr, ACTIVATE: tl.constexpr, GATE: tl.constexpr, EACH: tl.constexpr,
    BETA_STEP: tl.constexpr, LAM_STEP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, MAX_T: tl.constexpr,
):
    """The state of (row, state head) pid behind the row's tokens, EACH: behind every one, into its slot of the pool."""
    row, h = (pid // state_heads).to(tl.int64), pid % state_heads
    batch, start, length, count = row_span(row, T, cu_seqlens, token_mask, stride_mask, state_indices, MAX_T)
    state = row
    if state_indices is not None:
        state = tl.load(state_indices + row).to(tl.int64)
    loads = state >= 0
    if has_initial is not None:
        loads = loads & (tl.load(has_initial + row) != 0)
    states = pool + h * stride_s_h
    s = load_state(states + state * stride_s_p, loads, R, RP)
    for t in range(length):
        if WRITE:  # noqa: SIM102 (as above)
            if t < count:
                token = start + t
                s = updated(
                    s, mem_k + batch * stride_mk_b + token * stride_mk_t + h * stride_mk_h,
                    mem_v + batch * stride_mv_b + token * stride_mv_t + h * stride_mv_h,
                    beta + batch * stride_b_b + token * stride_b_t + h * stride_b_h,
                    None if lam is None else lam + batch * stride_l_b + token * stride_l_t + h * stride_l_h,
                    None if beta_bias is None else beta_bias + h * stride_bb,
                    None if lam_bias is None else lam_bias + h * stride_lb,
                    RULE, ACTIVATE, GATE, BETA_STEP, LAM_STEP, R, RP,
                )
        if EACH:
            slot = tl.load(target_indices + batch * stride_target + start + t).to(tl.int64)
            store_state(states + slot * stride_s_p, s, (state >= 0) & (slot >= 0), R, RP)
    if not EACH:
        slot = state
        if target_indices is not None:
            slot = tl.load(target_indices + row).to(tl.int64)
        store_state(states + slot * stride_s_p, s, (state >= 0) & (slot >= 0), R, RP)
# fmt: on
