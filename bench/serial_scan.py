"""The plain way to write the scan in Triton, for comparison: one program per row of a state, a loop over tokens.

Inputs are activated, lam = 1 - beta, the rule is the standard one.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def _serial_kernel(mem_q, mem_k, mem_v, beta, reads, final_state, T, H, R: tl.constexpr):
    """A program per (b, h, row); contiguous [B, T, H, R]."""
    pid = tl.program_id(0).to(tl.int64)
    row, h, b = pid % R, pid // R % H, pid // R // H
    column = tl.arange(0, R)
    state = tl.zeros([R], tl.float32)
    for t in range(T):
        token = ((b * T + t) * H + h) * R
        q = tl.load(mem_q + token + column).to(tl.float32)
        k = tl.load(mem_k + token + column).to(tl.float32)
        v = tl.load(mem_v + token + row).to(tl.float32)
        write = tl.load(beta + token + row).to(tl.float32)
        tl.store(reads + token + row, tl.sum(state * q))
        state = (1 - write) * state + write * (v - tl.sum(state * k)) * k
    tl.store(final_state + pid * R + column, state)


def serial_scan(mem_q, mem_k, mem_v, beta):
    """(reads, final_state) from a zero state; R a power of two."""
    B, T, H, R = mem_q.shape
    reads = mem_q.new_empty((B, T, H, R), dtype=torch.float32)
    final_state = mem_q.new_empty((B, H, R, R), dtype=torch.float32)
    _serial_kernel[(B * H * R,)](mem_q, mem_k, mem_v, beta, reads, final_state, T, H, R=R, num_warps=1)
    return reads, final_state
