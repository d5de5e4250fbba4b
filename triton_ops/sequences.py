"""Which sequence of a packed batch a token belongs to, found on the device."""

import triton
import triton.language as tl


def search_steps(n_rows: int) -> int:
    """Halvings that leave one of n_rows + 1 outcomes."""
    return n_rows.bit_length()


@triton.jit
def sequence_of(t, cu_ptr, n_rows, steps, ok):
    """For tokens t int64 [M]: (sequence, index within it, whether there is one), by bisection of cu_seqlens.

    A token lies in the first sequence that ends behind it: empty sequences hold none.
    """
    low = tl.zeros_like(t)
    high = low + n_rows
    while steps > 0:
        middle = (low + high) // 2
        ends = tl.load(cu_ptr + middle + 1, mask=ok & (middle < n_rows), other=2147483647)
        behind = (ends <= t) & (low < high)
        low = tl.where(behind, middle + 1, low)
        high = tl.where(behind, high, middle)
        steps -= 1
    inside = ok & (low < n_rows)
    start = tl.load(cu_ptr + low, mask=inside, other=0)
    return low, t - start, inside
