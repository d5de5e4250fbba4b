"""z = l2norm(tanh(x)) of mem_q and mem_k for all tokens at once, and the gradient with respect to x.

Lanes of a scan that share a token would each activate its q and k again, some 20 operations a channel: a pass of its
own costs less as soon as sequences have a few tokens. z is fp32 and contiguous. A lane per token and head, which
holds all R channels; bytes: x and z once each, x, dz and dx in the backward.
"""

import triton
import triton.language as tl

from .common import L2_EPS, activate, axpby, dot, load_columns, store_columns, widen
from .scan_tokens import is_live, load_vector


@triton.jit
def _place(T, H, total, LANES: tl.constexpr):
    """(lane, batch, token, h, whether there is one)."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    return lane, lane // H // T, lane // H % T, lane % H, lane < total


@triton.jit
def _activate(x, z, T, H, total, R: tl.constexpr, RP: tl.constexpr, LANES: tl.constexpr, W: tl.constexpr,
              WZ: tl.constexpr):  # fmt: skip
    if x is not None:
        lane, batch, token, h, live = _place(T, H, total, LANES)
        y, _ = activate(widen(load_vector(x, batch, token, h, 0, live, R, RP, W)), 1)
        store_columns(z, lane * R, live, 0, y, R, WZ)


@triton.jit(do_not_specialize=["T", "total"])
def activate_kernel(
    q, k, zq, zk, T, H, total, R: tl.constexpr, RP: tl.constexpr, LANES: tl.constexpr, WQ: tl.constexpr,
    WK: tl.constexpr, WZ: tl.constexpr,
):  # fmt: skip
    """zq, zk [B, T, H, R] of q and, where given, k. total: B T H."""
    _activate(q, zq, T, H, total, R, RP, LANES, WQ, WZ)
    _activate(k, zk, T, H, total, R, RP, LANES, WK, WZ)


@triton.jit
def _activation_gradient(x, dz, dx, token_mask, end, T, H, total, R: tl.constexpr, RP: tl.constexpr,
                         LANES: tl.constexpr, W: tl.constexpr, WZ: tl.constexpr, WD: tl.constexpr):  # fmt: skip
    """With y = tanh(x), n = max(|y|, eps): dx = (dz - z (z.dz)) / n (1 - y^2), without z.dz where n is eps."""
    if x is not None:
        lane, batch, token, h, inside = _place(T, H, total, LANES)
        live = is_live(token_mask, batch, token, inside & (token < end))
        z, norm = activate(widen(load_vector(x, batch, token, h, 0, live, R, RP, W)), 1)
        d = load_columns(dz, lane * R, live, 0, R, RP, WZ)
        along = tl.where(norm > L2_EPS, dot(z, d, 1), 0.0)
        d = axpby(1.0, d, -along, z)
        found = ()
        for c in tl.static_range(RP):
            y = z[c] * norm
            found = found + (tl.where(live, d[c] / norm * (1 - y * y), 0.0),)
        store_columns(dx, lane * R, inside, 0, found, R, WD)


@triton.jit(do_not_specialize=["T", "N", "total"])
def activation_gradient_kernel(
    q, k, dzq, dzk, dq, dk, token_mask, cu_seqlens, T, N, H, total, R: tl.constexpr, RP: tl.constexpr,
    LANES: tl.constexpr, WQ: tl.constexpr, WK: tl.constexpr, WZ: tl.constexpr, WDQ: tl.constexpr, WDK: tl.constexpr,
):  # fmt: skip
    """dq, dk [B, T, H, R] from dzq, dzk; 0 at masked tokens and past the last sequence."""
    end = T
    if cu_seqlens is not None:
        end = tl.load(cu_seqlens + N)
    _activation_gradient(q, dzq, dq, token_mask, end, T, H, total, R, RP, LANES, WQ, WZ, WDQ)
    _activation_gradient(k, dzk, dk, token_mask, end, T, H, total, R, RP, LANES, WK, WZ, WDK)
