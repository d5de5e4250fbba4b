"""delta reads: the product of a skinny weight [C, J] with J = H R reads of a token, by fp32 FMA in registers.

Weights and reads are held three-dimensionally, [JC, BT, BN] with the sum in front: a thread then has all JC
terms of its elements, loads a channel's JC weights at once and adds without shuffles. Also the fixed-order sum
of the partial gradients that this gives rise to.
"""

import torch
import triton
import triton.language as tl

# Columns held at once: 16 bytes of a bf16 weight's row, one vector load.
COLUMNS = 8
# A sum's tile: 128 bytes of a part, and as many parts in flight as 32 registers of a thread hold.
PARTS_BLOCK, MAX_PARTS = 32, 128


def columns(J: int) -> int:
    """JC for a weight of J columns."""
    return min(COLUMNS, triton.next_power_of_2(J))


@triton.jit
def load_reads(reads_ptr, row_at, row_ok, stride_h, j0, J: tl.constexpr, R: tl.constexpr, JC: tl.constexpr):
    """reads[row, j0 : j0 + JC] as [JC, BT]; row_at int64 [BT] is where each row begins."""
    j = j0 + tl.arange(0, JC)
    at = row_at[None, :] + ((j // R) * stride_h + j % R)[:, None]
    return tl.load(reads_ptr + at, mask=row_ok[None, :] & (j < J)[:, None], other=0.0).to(tl.float32)


@triton.jit
def load_weight(w_ptr, c, c_ok, stride_w, j0, J: tl.constexpr, JC: tl.constexpr):
    """delta[c, j0 : j0 + JC] as [JC, BN], one vector load per channel."""
    j = j0 + tl.arange(0, JC)
    at = c.to(tl.int64)[None, :] * stride_w + j[:, None]
    return tl.load(w_ptr + at, mask=c_ok[None, :] & (j < J)[:, None], other=0.0).to(tl.float32)


@triton.jit
def lift(
    reads_ptr, row_at, row_ok, stride_h, w_ptr, c, c_ok, stride_w, J: tl.constexpr, R: tl.constexpr, JC: tl.constexpr
):
    """delta reads at rows x channels c: [BT, BN] fp32. The sum runs over registers of one thread."""
    u = tl.zeros([row_at.shape[0], c.shape[0]], tl.float32)
    for j0 in range(0, J, JC):
        r = load_reads(reads_ptr, row_at, row_ok, stride_h, j0, J, R, JC)  # [JC, BT]
        w = load_weight(w_ptr, c, c_ok, stride_w, j0, J, JC)  # [JC, BN]
        u += tl.sum(r[:, :, None] * w[:, None, :], 0)
    return u


@triton.jit(do_not_specialize=["n_parts"])
def add_parts_kernel(parts_ptr, total_ptr, size, n_parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """total[i] = sum over parts of parts[p, i]: PARTS sums of every PARTS-th part, then their tree, in every run."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    p, first = tl.arange(0, PARTS), 0
    sums = tl.zeros([PARTS, BLOCK], tl.float32)
    while first < n_parts:
        at = p.to(tl.int64)[:, None] * size + i[None, :]
        sums += tl.load(parts_ptr + at, mask=(i < size)[None, :] & (p < n_parts)[:, None], other=0.0)
        p, first = p + PARTS, first + PARTS
    tl.store(total_ptr + i, tl.sum(sums, 0).to(total_ptr.dtype.element_ty), mask=i < size)


def add_parts(parts: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Sums parts [P, *total.shape] fp32 over P into total."""
    size, n_parts = total.numel(), parts.shape[0]
    if size:
        add_parts_kernel[(triton.cdiv(size, PARTS_BLOCK),)](
            parts, total, size, n_parts, PARTS=min(triton.next_power_of_2(max(n_parts, 1)), MAX_PARTS),
            BLOCK=PARTS_BLOCK, num_warps=4,
        )  # fmt: skip
    return total
