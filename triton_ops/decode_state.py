"""The delta rule over a row's few tokens, S of one head held whole by one program."""

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
def state_slot(row, indices_ptr, has_initial_ptr):
    """(slot of a row's state, whether it is to be loaded)."""
    slot = row
    if indices_ptr is not None:
        slot = tl.load(indices_ptr + row).to(tl.int64)
    loads = slot >= 0
    if has_initial_ptr is not None:
        loads = loads & (tl.load(has_initial_ptr + row) != 0)
    return slot, loads


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
def updated_by(
    s, h, batch, token, memory, strides, RULE: tl.constexpr, ACTIVATE: tl.constexpr, GATE: tl.constexpr,
    BETA_STEP: tl.constexpr, LAM_STEP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
):
    """S of state head h after a token; memory: the seven operands, strides: three of each and the biases' own."""
    _, mem_k, mem_v, beta, lam, beta_bias, lam_bias = memory
    _, _, _, kb, kt, kh, vb, vt, vh, bb, bt, bh, lb, lt, lh, stride_beta_bias, stride_lam_bias = strides
    return updated(
        s, mem_k + batch * kb + token * kt + h * kh, mem_v + batch * vb + token * vt + h * vh,
        beta + batch * bb + token * bt + h * bh,
        None if lam is None else lam + batch * lb + token * lt + h * lh,
        None if beta_bias is None else beta_bias + h * stride_beta_bias,
        None if lam_bias is None else lam_bias + h * stride_lam_bias,
        RULE, ACTIVATE, GATE, BETA_STEP, LAM_STEP, R, RP,
    )


@triton.jit
def head_reads(
    step, count, state, loads, h, batch, start, memory, strides,
    RULE: tl.constexpr, WRITE: tl.constexpr, ACTIVATE: tl.constexpr, GATE: tl.constexpr,
    BETA_STEP: tl.constexpr, LAM_STEP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, TOKENS: tl.constexpr,
):
    """Reads [M, RP] of state head h, whose S lies at state, by the row's tokens step [M] < count <= TOKENS.

    They stay in registers: no program waits for memory that it, or another, has written.
    """
    s = load_state(state, loads, R, RP)
    q_at = memory[0] + batch * strides[0] + start * strides[1] + h * strides[2]
    found = tl.zeros([step.shape[0], RP], tl.float32)
    if TOKENS == 1:
        found += tl.sum(s * unit_row(q_at, R, RP, ACTIVATE), 1)[None, :]
    else:
        for t in range(count):
            read = tl.sum(s * unit_row(q_at + t * strides[1], R, RP, ACTIVATE), 1)
            found = tl.where((step == t)[:, None], read[None, :], found)
            if WRITE:
                if t + 1 < count:  # the state behind the last token is the second launch's
                    s = updated_by(
                        s, h, batch, start + t, memory, strides, RULE, ACTIVATE, GATE, BETA_STEP, LAM_STEP, R, RP
                    )
    return found


@triton.jit
def advance_state(
    pid, T, memory, strides, pool, state_indices, target_indices, has_initial, reads, token_mask, cu_seqlens,
    stride_s_p, stride_s_h, stride_r_b, stride_r_t, stride_r_h, stride_mask, stride_target, state_heads,
    RULE: tl.constexpr, WRITE: tl.constexpr, ACTIVATE: tl.constexpr, GATE: tl.constexpr, EACH: tl.constexpr,
    BETA_STEP: tl.constexpr, LAM_STEP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, MAX_T: tl.constexpr,
):
    """Stores the reads of (row, state head) pid, and the state behind its tokens (EACH: behind every one) into its
    slot of the pool, once the program has loaded the old one."""
    row, h = (pid // state_heads).to(tl.int64), pid % state_heads
    batch, start, length, count = row_span(row, T, cu_seqlens, token_mask, stride_mask, state_indices, MAX_T)
    slot, loads = state_slot(row, state_indices, has_initial)
    states, i = pool + h * stride_s_h, tl.arange(0, RP)
    s = load_state(states + slot * stride_s_p, loads, R, RP)
    q_at = memory[0] + batch * strides[0] + start * strides[1] + h * strides[2]
    at = reads + batch * stride_r_b + start * stride_r_t + h * stride_r_h
    for t in range(length):
        if t < count:
            read = tl.sum(s * unit_row(q_at + t * strides[1], R, RP, ACTIVATE), 1)
            tl.store(at + t * stride_r_t + i, read, mask=i < R)
            if WRITE:
                s = updated_by(
                    s, h, batch, start + t, memory, strides, RULE, ACTIVATE, GATE, BETA_STEP, LAM_STEP, R, RP
                )
        if EACH:
            target = tl.load(target_indices + batch * stride_target + start + t).to(tl.int64)
            store_state(states + target * stride_s_p, s, (slot >= 0) & (target >= 0), R, RP)
    if not EACH:
        target = slot
        if target_indices is not None:
            target = tl.load(target_indices + row).to(tl.int64)
        store_state(states + target * stride_s_p, s, (slot >= 0) & (target >= 0), R, RP)
# fmt: on
