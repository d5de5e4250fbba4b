"""Words of the kernels that prepare q, k and v: the angles of a tile of tokens, and the rows of a group of heads.

Tiles are [1, BT, P]: against JC reads of a row and JC weights of a channel, [JC, BT, P], they keep the layout of
their loads, a run of channels in a thread. Sums over reads are then its own, and those over channels nearly so.
"""

import triton
import triton.language as tl

from .lift import COLUMNS, load_reads, load_weight
from .prologue import load_pairs, normed, pair_channels, pair_count, rotary_rows, store_pairs

# (tokens x pairs, heads, warps) of a program: 8 pairs of a thread make 16-byte loads of 2-byte types, 16 use each of
# its weights, widened to fp32, on two rows. Sums over several blocks of columns, and masks of padded heads, leave no
# registers for that. Few tokens: one head each, to spread over the machine.
PREFILL_TILE, THIN_TILE, DECODE_TILE = (2048, 4, 4), (512, 4, 2), (256, 1, 1)
DECODE_TOKENS = 64


def tile(n_tokens: int, D: int, J: int) -> tuple[int, int, int]:
    """(tokens, heads, warps) of a program that lifts J reads."""
    prefill = PREFILL_TILE if J <= COLUMNS and 2 * pair_count(D) == D else THIN_TILE
    elements, heads, warps = DECODE_TILE if n_tokens <= DECODE_TOKENS else prefill
    return min(max(1, elements // pair_count(D)), 64), heads, warps


def rotary_flags(cos, interleaved, D) -> dict:
    """The compile-time arguments that say what turns."""
    return {
        "GATHERED": cos is not None and cos.ndim == 3,
        "HALF": 0 if cos is None else cos.shape[-1],
        "INTERLEAVED": interleaved and cos is not None,
        "D": D,
        "P": pair_count(D),
    }


@triton.jit
def tall(x):
    """[BT] -> [1, BT, 1]"""
    return x[None, :, None]


@triton.jit
def lifted(
    reads_ptr, read_at, live, stride_h, w_ptr, c, c_ok, stride_w, J: tl.constexpr, R: tl.constexpr, JC: tl.constexpr
):
    """delta reads at rows x channels c: [1, BT, P] fp32."""
    u = tl.zeros([1, read_at.shape[0], c.shape[0]], tl.float32)
    for j0 in range(0, J, JC):
        r = load_reads(reads_ptr, read_at, live, stride_h, j0, J, R, JC)  # [JC, BT]
        w = load_weight(w_ptr, c, c_ok, stride_w, j0, J, JC)  # [JC, P]
        u += tl.sum(r[:, :, None] * w[:, None, :], 0, keep_dims=True)
    return u


@triton.jit
def token_angles(
    cos_ptr, sin_ptr, positions_ptr, b, t, index, live, stride_cb, stride_ct, stride_sb, stride_st, stride_pb,
    GATHERED: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """fp32 (cos, sin) [1, BT, P] of tokens t of batch rows b, int64 [BT]; those at index in the tables unless positions
    say otherwise or the tables are GATHERED. Without tables (0, 0)."""
    if cos_ptr is None:
        return 0.0, 0.0
    else:
        if positions_ptr is not None:
            index = tl.load(positions_ptr + b * stride_pb + t, mask=live, other=0).to(tl.int64)
        cos_at = b * stride_cb + t * stride_ct if GATHERED else index * stride_ct
        sin_at = b * stride_sb + t * stride_st if GATHERED else index * stride_st
        return rotary_rows(cos_ptr + tall(cos_at), sin_ptr + tall(sin_at), tall(live), HALF, P)


@triton.jit
def prep_heads(
    x_ptr, y_ptr, delta_ptr, norm_ptr, x_at, y_at, read_at, n_ok, live, cos, sin, first_head, end_head,
    stride_xh, stride_yh, stride_delta, reads_ptr, stride_rh, eps, ROTATES: tl.constexpr,
    J: tl.constexpr, R: tl.constexpr, JC: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Heads first_head .. end_head - 1 of the rows at x_at, y_at, read_at int64 [BT]; cos, sin [1, BT, P]. Rows are
    read where live, where they are not they count as 0; they are stored where n_ok."""
    first, second = pair_channels(D, HALF, INTERLEAVED, P)
    x_at += first_head.to(tl.int64) * stride_xh
    y_at += first_head.to(tl.int64) * stride_yh
    head = first_head
    while head < end_head:
        a, b = load_pairs(x_ptr + tall(x_at), tall(live), D, HALF, INTERLEAVED, P)
        if delta_ptr is not None:
            row = head * D
            a += lifted(reads_ptr, read_at, live, stride_rh, delta_ptr, row + first, first < D, stride_delta, J, R, JC)
            b += lifted(
                reads_ptr, read_at, live, stride_rh, delta_ptr, row + second, second < D, stride_delta, J, R, JC
            )
        if norm_ptr is not None:
            a, b = normed(a, b, norm_ptr, tl.where(tall(live), eps, 1.0), D, HALF, INTERLEAVED, P)
        if ROTATES:
            a, b = a * cos - b * sin, b * cos + a * sin
        store_pairs(y_ptr + tall(y_at), a, b, tall(n_ok), D, HALF, INTERLEAVED, P)
        x_at += stride_xh
        y_at += stride_yh
        head += 1


def rotary_strides(table):
    """(batch, row) strides of a rotary table, gathered [B, T, HALF] or indexed by position [S, HALF]."""
    if table is None:
        return 0, 0
    return table.stride()[:2] if table.ndim == 3 else (0, table.stride(0))


def outer_strides(x, count=3):
    return (0,) * count if x is None else x.stride()[:count]
