"""Where a lane of the scan stands, and what it loads there.

A lane is one thread's worth: (segment, head h, row of S, block of the row's columns), the last fastest. It holds
CW = RP / NB channels of its row; RP is R padded to a power of two, NB = 1 up to R = 16. Tensors arrive with
their strides as tuples (pointer, batch, token, head), states as (pointer, slot, head, row), biases as
(pointer, head); absent ones as None.
"""

import triton
import triton.language as tl

from .common import activate, gate_terms, load_columns, sigmoid, widen


@triton.jit
def lane_of(pid, H, RP: tl.constexpr, NB: tl.constexpr, LANES: tl.constexpr):
    """(slot, h, row, column block), int64 [LANES]. Divided in 32 bits, which hold any number of lanes: 64-bit
    division is a routine that takes half of a lane's registers."""
    lane = pid * LANES + tl.arange(0, LANES)
    state = lane // (RP * NB)
    return (
        (state // H).to(tl.int64),
        (state % H).to(tl.int64),
        (lane // NB % RP).to(tl.int64),
        (lane % NB).to(tl.int64),
    )


@triton.jit
def first_slot(n, begin, T, L, PACKED: tl.constexpr):
    """Slot of a sequence's first segment of L tokens: the tape's rule, for any L."""
    if PACKED:
        return begin.to(tl.int32) // L + n
    else:
        return n * ((T + L - 1) // L)


@triton.jit
def segment_of(slot, cu_seqlens, T, N, L):
    """(n, s, begin, length) of segment slot: sequence n's s-th segment of L tokens; n and begin int64.

    A sequence without tokens still has segment 0; length is -1 where the slot holds no segment. Packed:
    a binary search for the last n with cu_seqlens[n] // L + n <= slot.
    """
    slot = slot.to(tl.int32)
    if cu_seqlens is None:
        per_row = tl.maximum((T + L - 1) // L, 1)
        n = slot // per_row
        return n.to(tl.int64), slot % per_row, (n * 0).to(tl.int64), tl.where(n < N, n * 0 + T, -1)
    else:
        n = slot * 0
        span = N - 1
        while span > 0:
            half = (span + 1) // 2
            probe = n + half
            inside = probe < N
            start = tl.load(cu_seqlens + probe, mask=inside, other=0)
            n = tl.where(inside & (start // L + probe <= slot), probe, n)
            span = span - half
        begin = tl.load(cu_seqlens + n, mask=n < N, other=0)
        end = tl.load(cu_seqlens + n + 1, mask=n < N, other=0)
        s = slot - (begin // L + n)
        held = (n < N) & ((s == 0) | (s * L < end - begin))
        return n.to(tl.int64), s, begin.to(tl.int64), tl.where(held, end - begin, -1)


@triton.jit
def offset_of(x, i, j, k, W: tl.constexpr = 1):
    """Of x[i, j, k]. W divides the strides: said of each product, since a sum's hint is lost where it folds."""
    return tl.multiple_of(i * x[1], W) + tl.multiple_of(j * x[2], W) + tl.multiple_of(k * x[3], W)


@triton.jit
def is_live(token_mask, batch, token, inside):
    if token_mask is None:
        return inside
    else:
        kept = tl.load(token_mask[0] + batch * token_mask[1] + token, mask=inside, other=0)
        return inside & (kept != 0)


@triton.jit
def load_vector(x, batch, token, h, first, live, R: tl.constexpr, CW: tl.constexpr, W: tl.constexpr):
    """CW channels of x[batch, token, h] from channel first on, in x's dtype."""
    return load_columns(x[0], offset_of(x, batch, token, h, W) + first, live, first, R, CW, W)


@triton.jit
def load_value(x, batch, token, h, row, live, SHARED: tl.constexpr = False):
    """x[batch, token, h, row], or of a gate that all rows share x[batch, token, h, 0]."""
    offset = offset_of(x, batch, token, h)
    if not SHARED:
        offset += row
    return tl.load(x[0] + offset, mask=live, other=0.0)


@triton.jit
def blank(x, row):
    """A value of x's type for each lane, of no meaning."""
    return tl.zeros([row.shape[0]], x[0].dtype.element_ty)


@triton.jit
def blank_columns(x, row, CW: tl.constexpr):
    found = ()
    for _ in tl.static_range(CW):
        found = found + (blank(x, row),)
    return found


@triton.jit
def load_bias(bias, h, row, live, SHARED: tl.constexpr):
    if bias is None:
        return (row * 0).to(tl.float32)
    else:
        offset = h * bias[1]
        if not SHARED:
            offset += row
        return tl.load(bias[0] + offset, mask=live, other=0.0)


@triton.jit
def load_gates(beta, lam, batch, token, h, row, live, SHARED: tl.constexpr, LAM_SHARED: tl.constexpr):
    """(beta, lam) as given; an absent lam is beta again."""
    b = load_value(beta, batch, token, h, row, live, SHARED)
    if lam is None:
        return b, b
    else:
        return b, load_value(lam, batch, token, h, row, live, LAM_SHARED)


@triton.jit
def open_gates(b, l, b_bias, l_bias, COUPLED: tl.constexpr, GATE: tl.constexpr):
    """(beta, lam) in use."""
    b = b.to(tl.float32)
    if GATE:
        b = sigmoid(b + b_bias)
    if COUPLED:
        return b, 1 - b
    else:
        l = l.to(tl.float32)
        if GATE:
            l = sigmoid(l + l_bias)
        return b, l


@triton.jit
def terms(b, l, live, RULE: tl.constexpr):
    """(keep, erase, write) of a token; what is not live keeps all (its k and v are loaded as 0)."""
    keep, erase, write = gate_terms(b, l, RULE)
    return tl.where(live, keep, 1.0), erase, write


@triton.jit
def vector(x, NB: tl.constexpr, ACT: tl.constexpr):
    """fp32 channels of q or k, activated if that is the kernel's work."""
    x = widen(x)
    if ACT:
        x, _ = activate(x, NB)
    return x
