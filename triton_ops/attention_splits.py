"""Splits of the keys: how many, and the merge of their partial results in fixed order."""

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def automatic_splits(programs: int, slots: int, multiprocessors: int) -> int:
    """Splits of the keys: one wave of programs, where each split still has 512 slots to walk."""
    return max(1, min(multiprocessors // max(programs, 1), slots // 512, 32))


@triton.jit(do_not_specialize=["B", "T", "splits", "stride_lse_b", "stride_lse_h"])
def merge_kernel(
    part_out, part_lse, out, lse, stride_out_b, stride_out_t, stride_out_h, stride_lse_b, stride_lse_h, B, T, splits,
    HQ: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """out = sum_s exp(lse_s - lse) out_s in the order of the splits; parts [S, B, T, HQ, D] and [S, B, HQ, T]."""
    rows = B.to(tl.int64) * T * HQ
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    head, token, batch = row % HQ, row // HQ % T, row // HQ // T
    column = tl.arange(0, C)[None, :]
    mask = inside[:, None] & (column < D)
    acc = tl.zeros([ROWS, C], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    for s in tl.range(0, splits):
        at = part_lse + s * rows + (batch * HQ + head) * T + token
        part = tl.load(at, mask=inside, other=float("-inf"))
        new_peak = tl.maximum(peak, part)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink, grow = tl.exp(peak - base), tl.exp(part - base)
        acc = acc * shrink[:, None]
        acc += grow[:, None] * tl.load(part_out + (s * rows + row)[:, None] * D + column, mask=mask, other=0.0)
        total = total * shrink + grow
        peak = new_peak
    sees = total > 0
    total = tl.where(sees, total, 1.0)
    at = out + (batch * stride_out_b + token * stride_out_t + head * stride_out_h)[:, None] + column
    tl.store(at, tl.where(sees[:, None], acc / total[:, None], 0.0).to(out.dtype.element_ty), mask=mask)
    log_sum = tl.where(sees, peak + tl.log(total), float("-inf"))
    tl.store(lse + batch * stride_lse_b + head * stride_lse_h + token, log_sum, mask=inside)


def merge(part_out: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Partial results [S, B, T, HQ, D] and [S, B, HQ, T] into out and lse."""
    splits, B, T, HQ, D = part_out.shape
    ROWS = 16  # [ROWS, D] fp32 in registers
    merge_kernel[(triton.cdiv(B * T * HQ, ROWS),)](
        part_out, part_lse, out, lse, *out.stride()[:3], *lse.stride()[:2], B, T, splits,
        HQ=HQ, D=D, C=triton.next_power_of_2(D), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
