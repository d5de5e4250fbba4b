"""Words that kernels share: activations, gates, and vectors held as one register per channel.

A recurrence that multiplies a row of S by k at every token wants the row's R channels inside one thread: then
the dot product needs no shuffle. Triton lays tiles out as it likes, so a vector is a tuple of R tensors
[LANES] here, one value per thread, and every operation on it is elementwise.
"""

import triton
import triton.language as tl

L2_EPS: tl.constexpr = tl.constexpr(1e-6)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """To an ulp or two also near 0, where 2 sigmoid(2x) - 1 cancels: a polynomial below 5/8 (Cephes tanhf)."""
    z = x * x
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    near = near * z * x + x
    far = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def columns(x):
    """[LANES, W], W a power of two -> W tensors [LANES]; no data moves where a thread holds whole rows."""
    LANES: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    if W == 1:
        return (tl.reshape(x, [LANES]),)
    elif W == 2:
        first, second = tl.split(x)
        return (first, second)
    else:
        even, odd = tl.split(tl.reshape(x, [LANES, W // 2, 2]))
        even, odd = columns(even), columns(odd)
        found = ()
        for c in tl.static_range(W // 2):
            found = found + (even[c], odd[c])
        return found


@triton.jit
def stack(x):
    """W tensors [LANES], W a power of two -> [LANES, W], held by the thread that held its row's columns."""
    LANES: tl.constexpr = x[0].shape[0]
    W: tl.constexpr = len(x)
    if W == 1:
        return tl.reshape(x[0], [LANES, 1])
    elif W == 2:
        return tl.join(x[0], x[1])
    else:
        return tl.reshape(tl.join(stack(x[0::2]), stack(x[1::2])), [LANES, W])


@triton.jit
def load_columns(pointer, offset, live, first, R: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
    """C channels at pointer + offset [LANES], in loads of W; 0 where not live or from channel R on.

    W divides the address, and offset in a way that the compiler sees. first: the channel of the first column.
    """
    found = ()
    for c in tl.static_range(0, C, W):
        if W == 1:
            inside = live & (first + c < R)
            found = found + (tl.load(pointer + offset + c, mask=inside, other=0.0),)
        else:
            tile = offset[:, None] + (c + tl.arange(0, W))[None, :]
            found = found + columns(tl.load(pointer + tile, mask=live[:, None], other=0.0))
    return found


@triton.jit
def store_columns(pointer, offset, live, first, x, R: tl.constexpr, W: tl.constexpr = 1):
    """Channels x to pointer + offset [LANES], in stores of W; nothing from channel R on. W as in load_columns."""
    for c in tl.static_range(0, len(x), W):
        if W == 1:
            tl.store(pointer + offset + c, x[c], mask=live & (first + c < R))
        else:
            tile = offset[:, None] + (c + tl.arange(0, W))[None, :]
            tl.store(pointer + tile, stack(x[c : c + W]), mask=live[:, None])


@triton.jit
def zero_columns(lane, C: tl.constexpr):
    found = ()
    for _ in tl.static_range(C):
        found = found + ((lane * 0).to(tl.float32),)
    return found


@triton.jit
def widen(x):
    found = ()
    for c in tl.static_range(len(x)):
        found = found + (x[c].to(tl.float32),)
    return found


@triton.jit
def where_columns(condition, x, y):
    found = ()
    for c in tl.static_range(len(x)):
        found = found + (tl.where(condition, x[c], y[c]),)
    return found


@triton.jit
def axpby(a, x, b, y):
    """a x + b y; a, b one value per lane."""
    found = ()
    for c in tl.static_range(len(x)):
        found = found + (a * x[c] + b * y[c],)
    return found


@triton.jit
def _sum_neighbours(x, NB: tl.constexpr):
    """Sum over each run of NB lanes, given to all of them."""
    LANES: tl.constexpr = x.shape[0]
    total = tl.sum(tl.reshape(x, [LANES // NB, NB]), 1)
    return tl.reshape(tl.broadcast_to(total[:, None], [LANES // NB, NB]), [LANES])


@triton.jit
def dot(x, y, NB: tl.constexpr):
    """x . y of vectors whose channels lie in NB neighbouring lanes; every one of them gets the sum."""
    total = x[0] * y[0]
    for c in tl.static_range(1, len(x)):
        total += x[c] * y[c]
    if NB > 1:
        total = _sum_neighbours(total, NB)
    return total


@triton.jit
def sum_rows(x, RP: tl.constexpr, NB: tl.constexpr):
    """Sum of x [LANES] over the RP rows of a state, given to all of them. Lanes run (state, row, column block)."""
    LANES: tl.constexpr = x.shape[0]
    STATES: tl.constexpr = LANES // (RP * NB)
    if NB == 1:
        return _sum_neighbours(x, RP)
    else:
        total = tl.sum(tl.reshape(x, [STATES, RP, NB]), 1)
        return tl.reshape(tl.broadcast_to(total[:, None, :], [STATES, RP, NB]), [LANES])


@triton.jit
def pick(x, c):
    """x[c], c [LANES]; 0 past the end."""
    found = tl.where(c == 0, x[0], 0.0)
    for j in tl.static_range(1, len(x)):
        found = tl.where(c == j, x[j], found)
    return found


@triton.jit
def activate(x, NB: tl.constexpr):
    """(z, |y| or L2_EPS): z = y / max(|y|, L2_EPS), y = tanh(x)."""
    y = ()
    for c in tl.static_range(len(x)):
        y = y + (tanh(x[c]),)
    norm = tl.maximum(tl.sqrt_rn(dot(y, y, NB)), L2_EPS)
    z = ()
    for c in tl.static_range(len(x)):
        z = z + (tl.div_rn(y[c], norm),)
    return z, norm


@triton.jit
def gate_terms(beta, lam, RULE: tl.constexpr):
    """(keep, erase, write); lam is 1 - beta where coupled. RULE: the op's update_rule."""
    if RULE == "no_lambda":
        return beta * 0 + 1, beta, beta
    elif RULE == "lambda_outside":
        return lam, lam * beta, beta
    else:
        return lam, beta, beta
