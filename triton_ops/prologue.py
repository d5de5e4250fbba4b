"""Words for what happens to a raw projection x before attention, shared by every kernel that prepares rows:

    x' = RoPE(RMSNorm(x + delta_x reads)),     RMSNorm(x) = x / sqrt(mean(x^2) + eps) * weight over D

in fp32. A tile of M rows is held as its rotary pairs (a, b), each [M, P] with P = next power of two of D / 2:
the turn is then elementwise and every channel is loaded, corrected and scaled once. Rows are given by
pointers [M, 1], so a tile may mix tokens, heads and sequences. Channels past D hold 0. Loading, norm, turn and
storing take tiles [1, M, P] as well, from pointers [1, M, 1].
"""

import triton
import triton.language as tl


def pair_count(D: int) -> int:
    """P of a head of D channels."""
    return triton.next_power_of_2((D + 1) // 2)


@triton.jit
def pair_channels(D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr):
    """Channels (first, second) of the pairs, each [P]; D or more: no channel.

    Pairs p < HALF = rotary_dim/2 turn: halves (p, p + HALF), or neighbours. Those behind are the channels that
    do not rotate, paired alike so that every channel belongs to one pair.
    """
    p = tl.arange(0, P)
    if INTERLEAVED:
        return 2 * p, 2 * p + 1
    REST: tl.constexpr = (D - 2 * HALF + 1) // 2
    first = tl.where(p < HALF, p, p + HALF)
    second = tl.where(p < HALF, p + HALF, p + HALF + REST)
    if HALF + REST < P:
        first = tl.where(p < HALF + REST, first, D)
        second = tl.where(p < HALF + REST, second, D)
    if HALF % 8 == 0 and REST % 8 == 0:  # 16-byte loads of 2-byte types
        first = tl.max_contiguous(tl.multiple_of(first, 8), 8)
        second = tl.max_contiguous(tl.multiple_of(second, 8), 8)
    return first, second


@triton.jit
def channel_mask(channels, D: tl.constexpr, HALF: tl.constexpr):
    """Which of the channels exist, told in runs of 8 where they come in such."""
    inside = channels < D
    if HALF % 8 == 0 and D % 16 == 0:
        inside = tl.max_constancy(inside, 8)
    return inside


@triton.jit
def joined(a, b, INTERLEAVED: tl.constexpr):
    """[M, 2 P] from pairs: in channel order if interleaved, else all of a before all of b."""
    x = tl.join(a, b)  # [M, P, 2]
    if not INTERLEAVED:
        x = tl.permute(x, (0, 2, 1))
    if len(a.shape) == 2:
        return tl.reshape(x, (a.shape[0], 2 * a.shape[1]))
    else:
        return tl.reshape(x, (a.shape[0], a.shape[1], 2 * a.shape[2]))


@triton.jit
def load_pairs(x, live, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr):
    """fp32 pairs of the rows at x [M, 1]; 0 where not live [M, 1]."""
    if INTERLEAVED:
        channels = tl.arange(0, 2 * P)[None, :]
        both = tl.load(x + channels, mask=live & (channels < D), other=0.0)
        if len(both.shape) == 2:
            a, b = tl.split(tl.reshape(both, (both.shape[0], P, 2)))
        else:
            a, b = tl.split(tl.reshape(both, (both.shape[0], both.shape[1], P, 2)))
    else:
        first, second = pair_channels(D, HALF, INTERLEAVED, P)
        a = tl.load(x + first[None, :], mask=live & channel_mask(first, D, HALF)[None, :], other=0.0)
        b = tl.load(x + second[None, :], mask=live & channel_mask(second, D, HALF)[None, :], other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_pairs(y, a, b, live, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr):
    """Rounds pairs to the dtype behind y [M, 1] and stores the live rows."""
    if INTERLEAVED:
        channels = tl.arange(0, 2 * P)[None, :]
        both = joined(a, b, INTERLEAVED).to(y.dtype.element_ty)
        tl.store(y + channels, both, mask=live & (channels < D))
    else:
        first, second = pair_channels(D, HALF, INTERLEAVED, P)
        a, b = a.to(y.dtype.element_ty), b.to(y.dtype.element_ty)
        tl.store(y + first[None, :], a, mask=live & channel_mask(first, D, HALF)[None, :])
        tl.store(y + second[None, :], b, mask=live & channel_mask(second, D, HALF)[None, :])


@triton.jit
def corrected(
    a,
    b,
    live,
    reads,
    stride_reads_h,
    delta,
    stride_delta,
    head,
    H: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    P: tl.constexpr,
):
    """x + delta reads by FMA. reads [M, 1] point at a row's first read; head is a scalar or [M, 1].

    delta [heads * D, H * R]: column h * R + r meets read r of state head h.
    """
    first, second = pair_channels(D, HALF, INTERLEAVED, P)
    has_first, has_second = (first < D)[None, :], (second < D)[None, :]
    delta_a = delta + (head * D + first[None, :]).to(tl.int64) * stride_delta
    delta_b = delta + (head * D + second[None, :]).to(tl.int64) * stride_delta
    for h in tl.range(H):
        for r in tl.range(R, loop_unroll_factor=4):
            read = tl.load(reads + h * stride_reads_h + r, mask=live, other=0.0).to(tl.float32)
            a += read * tl.load(delta_a + h * R + r, mask=has_first, other=0.0).to(tl.float32)
            b += read * tl.load(delta_b + h * R + r, mask=has_second, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def normed(
    a,
    b,
    weight,
    eps,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    P: tl.constexpr,
):
    """RMSNorm over the D channels of a row, times weight [D]."""
    first, second = pair_channels(D, HALF, INTERLEAVED, P)
    scale = tl.math.rsqrt(tl.sum(a * a + b * b, len(a.shape) - 1, keep_dims=True) / D + eps)
    weight_a = tl.load(weight + first, mask=first < D, other=0.0).to(tl.float32)[None, :]
    weight_b = tl.load(weight + second, mask=second < D, other=0.0).to(tl.float32)[None, :]
    return a * scale * weight_a, b * scale * weight_b


@triton.jit
def rotary_rows(cos, sin, live, HALF: tl.constexpr, P: tl.constexpr):
    """fp32 (cos, sin) [M, P] of the table rows at cos, sin [M, 1]; the angle 0 for pairs that do not turn."""
    p = tl.arange(0, P)[None, :]
    turns = live & (p < HALF)
    c = tl.load(cos + p, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + p, mask=turns, other=0.0).to(tl.float32)
    return c, s


@triton.jit
def prepared_pairs(
    x,
    live,
    reads,
    stride_reads_h,
    delta,
    stride_delta,
    head,
    weight,
    eps,
    cos,
    sin,
    H: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    P: tl.constexpr,
):
    """fp32 pairs of x' for the rows at x [M, 1]: 0 where not live [M, 1].

    A step whose operand (delta, weight, cos) is None is skipped. reads, cos and sin [M, 1] point at a row's
    first read and table entry, head (scalar or [M, 1]) chooses the rows of delta.
    """
    a, b = load_pairs(x, live, D, HALF, INTERLEAVED, P)
    if delta is not None:
        a, b = corrected(
            a, b, live, reads, stride_reads_h, delta, stride_delta, head, H, R, D, HALF, INTERLEAVED, P
        )  # fmt: skip
    if weight is not None:
        a, b = normed(a, b, weight, eps, D, HALF, INTERLEAVED, P)
    if cos is not None:
        c, s = rotary_rows(cos, sin, live, HALF, P)
        a, b = a * c - b * s, b * c + a * s
    return a, b


@triton.jit
def joined_channels(D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr):
    """The channel [2 P] that stands in each column of joined(a, b); D or more: none."""
    column = tl.arange(0, 2 * P)
    if INTERLEAVED or (D == 2 * P and (HALF == P or HALF == 0)):
        return column
    REST: tl.constexpr = (D - 2 * HALF + 1) // 2
    p = column % P
    first = tl.where(p < HALF, p, p + HALF)
    channel = tl.where(column < P, first, tl.where(p < HALF, p + HALF, p + HALF + REST))
    channel = tl.where(p < HALF + REST, channel, D)
    if HALF % 8 == 0 and REST % 8 == 0:
        channel = tl.max_contiguous(tl.multiple_of(channel, 8), 8)
    return channel
