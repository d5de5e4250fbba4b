"""Words of the attention kernels: which tokens a tile holds, which keys it sees, scores and their cap.

Scores live in base 2: s = (q . k) scale log2(e), so that exp2 is one instruction and the scale one FMA.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
UNBOUNDED = 1 << 30  # a window side without limit; slots stay below it


def window(causal: bool, left: int, right: int) -> tuple[int, int]:
    """(left, right) of the band p - left .. p + right of slots that a query at slot p sees."""
    sides = (left, 0 if causal else right)
    return tuple(min(side, UNBOUNDED) if side >= 0 else UNBOUNDED for side in sides)


def tile_count(B: int, T: int, cu_seqlens, BM: int) -> int:
    """Tiles per head: exact for a batch; packed, where lengths stay on the device, room for any partition.

    Sequence n takes tiles cu[n] // BM + n ..; behind the last come those of the rows that no sequence owns.
    """
    return B * triton.cdiv(T, BM) if cu_seqlens is None else T // BM + cu_seqlens.shape[0]


@triton.jit
def find_tile(tile, cu_seqlens, N, T, BM: tl.constexpr):
    """(row, batch entry, first token of the row, its tokens, first token of the tile within the row).

    Row N of a packed batch: the tokens past cu_seqlens[N].
    """
    if cu_seqlens is None:
        tiles = tl.cdiv(T, BM)
        return tile // tiles, tile // tiles, 0, T, (tile % tiles) * BM
    else:
        row = 0
        above = N + 1
        while above - row > 1:  # the last row whose tiles start at or before this one
            middle = (row + above) // 2
            before = tl.load(cu_seqlens + middle) // BM + middle <= tile
            row = tl.where(before, middle, row)
            above = tl.where(before, above, middle)
        start = tl.load(cu_seqlens + row)
        stop = tl.load(cu_seqlens + row + 1, mask=row < N, other=T)
        return row, 0, start, stop - start, (tile - start // BM - row) * BM


@triton.jit
def owned(row, length, cu_seqlens, N):
    """Tokens of the row that a sequence owns: none of those past cu_seqlens[N]."""
    if cu_seqlens is not None:
        length = tl.where(row < N, length, 0)
    return length


@triton.jit
def count_unmasked(mask, tokens):
    """Number of set entries among mask[0 .. tokens]."""
    found = tl.zeros([1024], tl.int32)
    for t in range(0, tokens, 1024):
        at = t + tl.arange(0, 1024)
        found += tl.load(mask + at, mask=at < tokens, other=0).to(tl.int32)
    return tl.sum(found)


@triton.jit
def tanh(x):
    """To a few ulp for every x: a series near 0, where the exponential form would cancel."""
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E))))


@triton.jit
def product(a, b, acc=None):
    """a b + acc in fp32, of exact products: never TF32."""
    if INTERPRETED:  # whose dot takes bf16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def past_full(step, full_begin, full_stop, MASKED: tl.constexpr):
    """Where a walk stands that leaves out full_begin .. full_stop, if MASKED."""
    if MASKED:
        step = tl.where(step < full_begin, step, step + (full_stop - full_begin))
    return step


@triton.jit
def in_window(ahead, left, right):
    """ahead: slot of the key less slot of the query."""
    return (ahead <= right) & (ahead >= -left)


@triton.jit
def visible(slots, keys, low, high, left, right):
    """bool, of slots and keys that broadcast: the key lies in low .. high - 1 and in the query's window."""
    return (keys >= low) & (keys < high) & in_window(keys - slots, left, right)


@triton.jit
def load_rows(base, rows, stride, page, stride_page, columns, live, MASKED: tl.constexpr, EVEN: tl.constexpr):
    """[rows, columns] of a matrix, row r at page[r] * stride_page + rows[r] * stride (page None: one matrix).

    columns: (channels, which exist). MASKED: 0 where not live [rows]; EVEN: every channel exists.
    """
    channels, exist = columns
    at = rows[:, None].to(tl.int64) * stride
    if page is not None:
        at += page[:, None] * stride_page
    at = base + at + channels[None, :]
    if MASKED and not EVEN:
        return tl.load(at, mask=live[:, None] & exist[None, :], other=0.0)
    if MASKED:
        return tl.load(at, mask=live[:, None], other=0.0)
    if not EVEN:
        return tl.load(at, mask=exist[None, :], other=0.0)
    return tl.load(at)
