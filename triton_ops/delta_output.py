"""The correction behind the output projection: y = attn_proj + u (+ residual), u = delta_o reads, with or
without RMSNorm over hidden.

Forward: one program per (token tile, span of hidden channels), J = H R products per element in registers, FMA
only. With the norm every program first sums u^2 over all of hidden: delta_o is small and comes from L2.
Backward: one program per token tile sums dreads over hidden; one per (channel tile, chunk of tokens) sums
ddelta_o into fp32 partials, which a last kernel adds in a fixed order.
Floor: 3 (4 with the residual) x tokens x hidden elements moved; 2 J flops per element.
"""

import torch
import triton
import triton.language as tl

from .lift import COLUMNS, add_parts, columns, lift, load_reads, load_weight
from .lowering import launches

# (tokens, channels, warps) of a forward tile. A weight tile costs a pass through shared memory, which 16 tokens
# repay; several blocks of columns leave registers for half the channels. A decode step has so few tokens that it
# spreads the channels over the machine instead.
PREFILL_TILE, WIDE_TILE, DECODE_TILE = (16, 128, 4), (16, 64, 4), (1, 128, 1)
DECODE_TOKENS = 32
# The same of a backward tile, which holds 8 sums per element: 64 registers of a thread (twice 32 with the norm).
BWD_TILE, RMS_BWD_TILE = (8, 128, 4), (4, 128, 4)
CHUNK_TOKENS, MAX_CHUNKS = 256, 64


@triton.jit(do_not_specialize=["n_tokens", "T", "n_spans"])
def output_fwd_kernel(
    x_ptr, reads_ptr, w_ptr, rms_ptr, residual_ptr, y_ptr,
    n_tokens, T, hidden, n_spans, eps,
    stride_xb, stride_xt, stride_rb, stride_rt, stride_rh, stride_w, stride_sb, stride_st, stride_yb, stride_yt,
    J: tl.constexpr, R: tl.constexpr, JC: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n = (pid // n_spans).to(tl.int64) * BT + tl.arange(0, BT)
    n_ok = n < n_tokens
    b, t = n // T, n % T
    row_at = b * stride_rb + t * stride_rt
    scale = tl.full([BT], 1.0, tl.float32)
    if rms_ptr is not None:
        square = tl.zeros([BT, BN], tl.float32)
        for c0 in range(0, hidden, BN):
            c = c0 + tl.arange(0, BN)
            u = lift(reads_ptr, row_at, n_ok, stride_rh, w_ptr, c, c < hidden, stride_w, J, R, JC)
            square += u * u
        scale = 1 / tl.sqrt_rn(tl.sum(square, 1) / hidden + eps)
    first = (pid % n_spans) * (SPAN * BN)
    for c0 in range(first, min(first + SPAN * BN, hidden), BN):
        c = c0 + tl.arange(0, BN)
        ok = n_ok[:, None] & (c < hidden)[None, :]
        y = lift(reads_ptr, row_at, n_ok, stride_rh, w_ptr, c, c < hidden, stride_w, J, R, JC)
        if rms_ptr is not None:
            weight = tl.load(rms_ptr + c, mask=c < hidden, other=0.0).to(tl.float32)
            y = y * scale[:, None] * weight[None, :]
        x_at = (b * stride_xb + t * stride_xt)[:, None] + c[None, :]
        y += tl.load(x_ptr + x_at, mask=ok, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            s_at = (b * stride_sb + t * stride_st)[:, None] + c[None, :]
            y += tl.load(residual_ptr + s_at, mask=ok, other=0.0).to(tl.float32)
        y_at = (b * stride_yb + t * stride_yt)[:, None] + c[None, :]
        tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["n_tokens", "T"])
def output_dreads_kernel(
    dy_ptr, reads_ptr, w_ptr, rms_ptr, dreads_ptr, stats_ptr,
    n_tokens, T, hidden, eps, stride_db, stride_dt, stride_rb, stride_rt, stride_rh, stride_w,
    J: tl.constexpr, R: tl.constexpr, JC: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dreads = s A - s^3 c B, with the sums over hidden A = delta_o^T (dy w), B = delta_o^T u, c = mean(dy w u),
    s = rsqrt(mean(u^2) + eps); stats holds (s, s^3 c). Without the norm: dreads = A."""
    chunks: tl.constexpr = (J + JC - 1) // JC
    pid = tl.program_id(0)
    j0 = (pid % chunks) * JC
    n = (pid // chunks).to(tl.int64) * BT + tl.arange(0, BT)
    n_ok = n < n_tokens
    b, t = n // T, n % T
    row_at = b * stride_rb + t * stride_rt
    a_sum = tl.zeros([JC, BT, BN], tl.float32)
    if rms_ptr is not None:
        b_sum = tl.zeros([JC, BT, BN], tl.float32)
        uu = tl.zeros([BT, BN], tl.float32)
        gu = tl.zeros([BT, BN], tl.float32)
    for c0 in range(0, hidden, BN):
        c = c0 + tl.arange(0, BN)
        ok = n_ok[:, None] & (c < hidden)[None, :]
        d_at = (b * stride_db + t * stride_dt)[:, None] + c[None, :]
        g = tl.load(dy_ptr + d_at, mask=ok, other=0.0).to(tl.float32)
        w = load_weight(w_ptr, c, c < hidden, stride_w, j0, J, JC)
        if rms_ptr is not None:
            g = g * tl.load(rms_ptr + c, mask=c < hidden, other=0.0).to(tl.float32)[None, :]
            u = lift(reads_ptr, row_at, n_ok, stride_rh, w_ptr, c, c < hidden, stride_w, J, R, JC)
            uu += u * u
            gu += g * u
            b_sum += u[None, :, :] * w[:, None, :]
        a_sum += g[None, :, :] * w[:, None, :]
    dr = tl.sum(a_sum, 2)  # [JC, BT]
    if rms_ptr is not None:
        scale = 1 / tl.sqrt_rn(tl.sum(uu, 1) / hidden + eps)
        along = scale * scale * scale * (tl.sum(gu, 1) / hidden)
        dr = dr * scale[None, :] - tl.sum(b_sum, 2) * along[None, :]
        tl.store(stats_ptr + n * 2, scale, mask=n_ok)
        tl.store(stats_ptr + n * 2 + 1, along, mask=n_ok)
    j = j0 + tl.arange(0, JC)
    tl.store(dreads_ptr + n[None, :] * J + j[:, None], dr, mask=n_ok[None, :] & (j < J)[:, None])


@triton.jit(do_not_specialize=["n_tokens", "T", "n_tiles", "chunk_tokens"])
def output_dweight_kernel(
    dy_ptr, reads_ptr, w_ptr, rms_ptr, stats_ptr, dw_ptr, drms_ptr,
    n_tokens, T, hidden, n_tiles, chunk_tokens,
    stride_db, stride_dt, stride_rb, stride_rt, stride_rh, stride_w,
    J: tl.constexpr, R: tl.constexpr, JC: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """This chunk's share of ddelta_o = sum_t du_t reads_t^T and drms_weight = sum_t dy_t u_t s_t."""
    columns: tl.constexpr = (J + JC - 1) // JC
    pid = tl.program_id(0)
    j0 = (pid % columns) * JC
    c = (pid // columns % n_tiles) * BN + tl.arange(0, BN)
    chunk = (pid // columns // n_tiles).to(tl.int64)
    dw = tl.zeros([JC, BT, BN], tl.float32)
    drms = tl.zeros([BT, BN], tl.float32)
    for first in range(chunk * chunk_tokens, min((chunk + 1) * chunk_tokens, n_tokens), BT):
        n = first + tl.arange(0, BT)
        n_ok = n < n_tokens
        b, t = n // T, n % T
        row_at = b * stride_rb + t * stride_rt
        d_at = (b * stride_db + t * stride_dt)[:, None] + c[None, :]
        g = tl.load(dy_ptr + d_at, mask=n_ok[:, None] & (c < hidden)[None, :], other=0.0).to(tl.float32)
        if rms_ptr is not None:
            u = lift(reads_ptr, row_at, n_ok, stride_rh, w_ptr, c, c < hidden, stride_w, J, R, JC)
            scale = tl.load(stats_ptr + n * 2, mask=n_ok, other=0.0)
            along = tl.load(stats_ptr + n * 2 + 1, mask=n_ok, other=0.0)
            weight = tl.load(rms_ptr + c, mask=c < hidden, other=0.0).to(tl.float32)
            drms += g * u * scale[:, None]
            g = g * weight[None, :] * scale[:, None] - u * along[:, None]
        r = load_reads(reads_ptr, row_at, n_ok, stride_rh, j0, J, R, JC)
        dw += r[:, :, None] * g[None, :, :]
    j = j0 + tl.arange(0, JC)
    at = (chunk * hidden + c)[None, :] * J + j[:, None]
    tl.store(dw_ptr + at, tl.sum(dw, 1), mask=(c < hidden)[None, :] & (j < J)[:, None])
    if rms_ptr is not None:
        tl.store(drms_ptr + chunk * hidden + c, tl.sum(drms, 0), mask=c < tl.where(j0 == 0, hidden, 0))


def delta_output_fwd(attn_proj, reads, delta_o, rms_weight, rms_eps, residual):
    y = attn_proj.new_empty(attn_proj.shape)
    delta_output_out(attn_proj, reads, delta_o, rms_weight, rms_eps, residual, y)
    return y


def delta_output_out(attn_proj, reads, delta_o, rms_weight, rms_eps, residual, out):
    B, T, hidden = attn_proj.shape
    n_tokens = B * T
    if n_tokens * hidden == 0:
        return
    H, R = reads.shape[2:]
    prefill = PREFILL_TILE if H * R <= COLUMNS else WIDE_TILE
    BT, BN, warps = DECODE_TILE if n_tokens <= DECODE_TOKENS else prefill
    tiles = triton.cdiv(hidden, BN)
    # with the norm a program that owns its tokens' whole rows pays the sum of squares once
    span = tiles if rms_weight is not None and BT > 1 else 1
    spans = triton.cdiv(tiles, span)
    output_fwd_kernel[(triton.cdiv(n_tokens, BT) * spans,)](
        attn_proj, reads, delta_o, rms_weight, residual, out,
        n_tokens, T, hidden, spans, rms_eps,
        *attn_proj.stride()[:2], *reads.stride()[:3], delta_o.stride(0),
        *((0, 0) if residual is None else residual.stride()[:2]), *out.stride()[:2],
        J=H * R, R=R, JC=columns(H * R), BT=BT, BN=BN, SPAN=span, num_warps=warps,
    )  # fmt: skip


def delta_output_bwd(dy, reads, delta_o, rms_weight, rms_eps):
    B, T, hidden = dy.shape
    H, R = reads.shape[2:]
    J, n_tokens = H * R, B * T
    dreads = reads.new_empty(reads.shape)
    ddelta_o = delta_o.new_empty(delta_o.shape)
    drms = dy.new_empty(0) if rms_weight is None else rms_weight.new_empty(rms_weight.shape)
    JC = columns(J)
    BT, BN, warps = BWD_TILE if rms_weight is None else RMS_BWD_TILE
    tile = {"J": J, "R": R, "JC": JC, "BT": BT, "BN": BN, "num_warps": warps}
    strides = (*dy.stride()[:2], *reads.stride()[:3], delta_o.stride(0))
    stats = None if rms_weight is None else dy.new_empty((n_tokens, 2), dtype=torch.float32)
    chunks = min(triton.cdiv(n_tokens, CHUNK_TOKENS), MAX_CHUNKS)
    dw_parts = dy.new_empty((chunks, hidden, J), dtype=torch.float32)
    drms_parts = None if rms_weight is None else dy.new_empty((chunks, hidden), dtype=torch.float32)
    if n_tokens and hidden:
        output_dreads_kernel[(triton.cdiv(n_tokens, BT) * triton.cdiv(J, JC),)](
            dy, reads, delta_o, rms_weight, dreads, stats, n_tokens, T, hidden, rms_eps, *strides, **tile
        )
        channel_tiles = triton.cdiv(hidden, BN)
        chunk_tokens = triton.cdiv(triton.cdiv(n_tokens, chunks), BT) * BT
        output_dweight_kernel[(triton.cdiv(J, JC) * channel_tiles * chunks,)](
            dy, reads, delta_o, rms_weight, stats, dw_parts, drms_parts,
            n_tokens, T, hidden, channel_tiles, chunk_tokens, *strides, **tile,
        )  # fmt: skip
    add_parts(dw_parts, ddelta_o)
    if rms_weight is not None:
        add_parts(drms_parts, drms)
    return dreads, ddelta_o, drms


def lowerings():
    """Every (name, kernel, signature, constexprs, options) that the launchers pick, at sizes of an 8B model."""
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, J in ((8192, 8), (8192, 32), (1, 8)):
            for rms in (False, True):
                x = torch.empty(1, tokens, 4096, dtype=dtype, device="meta")
                reads = torch.empty(1, tokens, J // 8, 8, device="meta")
                w = torch.empty(4096, J, dtype=dtype, device="meta")
                weight = w[:, 0].contiguous() if rms else None
                name = f"T={tokens} J={J}{' rms' if rms else ''}"
                yield from launches(name, delta_output_fwd, x, reads, w, weight, 1e-6, x)
                if tokens > 1:
                    yield from launches(name, delta_output_bwd, x, reads, w, weight, 1e-6)
