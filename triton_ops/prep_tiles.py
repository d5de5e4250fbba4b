"""Words of the kernels that prepare q, k and v: the angles of a tile of tokens, and the rows of a group of heads."""

import triton
import triton.language as tl

from .lift import lift
from .prologue import load_pairs, normed, pair_channels, rotary_rows, store_pairs


@triton.jit
def token_angles(
    cos_ptr, sin_ptr, positions_ptr, b, t, index, live, stride_cb, stride_ct, stride_sb, stride_st, stride_pb,
    GATHERED: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """fp32 (cos, sin) [BT, P] of tokens t of batch rows b, int64 [BT]; those at index in the tables unless positions
    say otherwise or the tables are GATHERED. Without tables (0, 0)."""
    if cos_ptr is None:
        return 0.0, 0.0
    else:
        if positions_ptr is not None:
            index = tl.load(positions_ptr + b * stride_pb + t, mask=live, other=0).to(tl.int64)
        cos_at = b * stride_cb + t * stride_ct if GATHERED else index * stride_ct
        sin_at = b * stride_sb + t * stride_st if GATHERED else index * stride_st
        return rotary_rows(cos_ptr + cos_at[:, None], sin_ptr + sin_at[:, None], live[:, None], HALF, P)


@triton.jit
def prep_heads(
    x_ptr, y_ptr, delta_ptr, norm_ptr, x_at, y_at, read_at, n_ok, live, cos, sin, first_head, end_head,
    stride_xh, stride_yh, stride_delta, reads_ptr, stride_rh, eps, ROTATES: tl.constexpr,
    J: tl.constexpr, R: tl.constexpr, JC: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Heads first_head .. end_head - 1 of the rows at x_at, y_at, read_at int64 [BT]; cos, sin [BT, P]. Rows are
    read where live, where they are not they count as 0; they are stored where n_ok."""
    first, second = pair_channels(D, HALF, INTERLEAVED, P)
    x_at += first_head.to(tl.int64) * stride_xh
    y_at += first_head.to(tl.int64) * stride_yh
    for head in range(first_head, end_head):
        a, b = load_pairs(x_ptr + x_at[:, None], live[:, None], D, HALF, INTERLEAVED, P)
        if delta_ptr is not None:
            row = head * D
            a += lift(reads_ptr, read_at, live, stride_rh, delta_ptr, row + first, first < D, stride_delta, J, R, JC)
            b += lift(reads_ptr, read_at, live, stride_rh, delta_ptr, row + second, second < D, stride_delta, J, R, JC)
        if norm_ptr is not None:
            a, b = normed(a, b, norm_ptr, eps, D, HALF, INTERLEAVED, P)
        if ROTATES:
            a, b = a * cos - b * sin, b * cos + a * sin
        store_pairs(y_ptr + y_at[:, None], a, b, n_ok[:, None], D, HALF, INTERLEAVED, P)
        x_at += stride_xh
        y_at += stride_yh


def rotary_strides(table):
    """(batch, row) strides of a rotary table, gathered [B, T, HALF] or indexed by position [S, HALF]."""
    if table is None:
        return 0, 0
    return table.stride()[:2] if table.ndim == 3 else (0, table.stride(0))


def outer_strides(x, count=3):
    return (0,) * count if x is None else x.stride()[:count]
