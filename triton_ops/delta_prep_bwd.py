"""Reverse of the preparation of q, k and v: for one row, g the cotangent turned back by RoPE, n = RMSNorm's x / rms,

    dx = rsqrt(mean + eps) (g w - n mean(g w n)),   dw = sum g n,   dreads = delta^T dx,   ddelta = sum dx reads^T

and without the norm dx = g. One program per (head of q, k or v, chunk of tokens), which recomputes n and keeps the
chunk's ddelta and dw in registers; dreads and, if asked for, the tables' gradients are shares of one head. A last
kernel adds the shares in a fixed order. A weight of J > 8 columns takes more programs, 8 columns each.
Floor: dx written, x and its cotangent read once; 4 J flops per element, FMA only.
"""

import torch
import triton
import triton.language as tl

from .lift import add_parts, columns, load_reads, load_weight
from .prep_tiles import lifted, outer_strides, rotary_strides, tall, token_angles
from .prologue import load_pairs, pair_channels, pair_count, store_pairs
from .sequences import search_steps, sequence_of

# Tokens x pairs that a warp holds at a time: their sums of JC columns per channel fill 2 x 32 registers of a thread.
# Rows of at most 32 pairs are one warp's, so that a weight's row is one load of 16 bytes.
WARP_TILE = 128
CHUNK_TOKENS, MAX_CHUNKS = 256, 32


@triton.jit(do_not_specialize=["n_tokens", "T", "n_rows", "steps", "chunk_tokens", "n_heads"])
def prep_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, delta_ptr, norm_ptr, reads_ptr, dreads_ptr, ddelta_ptr, dnorm_ptr,
    cos_ptr, sin_ptr, dcos_ptr, dsin_ptr, positions_ptr, cu_ptr,
    n_tokens, T, n_rows, steps, chunk_tokens, n_heads, eps,
    stride_yb, stride_yt, stride_yh, stride_xb, stride_xt, stride_xh, stride_rb, stride_rt, stride_rh, stride_delta,
    stride_cb, stride_ct, stride_sb, stride_st, stride_pb,
    GATHERED: tl.constexpr, BT: tl.constexpr, J: tl.constexpr, R: tl.constexpr, JC: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    column_chunks: tl.constexpr = (J + JC - 1) // JC
    j0 = (pid % column_chunks) * JC
    head = pid // column_chunks % n_heads
    chunk = (pid // column_chunks // n_heads).to(tl.int64)
    first, second = pair_channels(D, HALF, INTERLEAVED, P)
    row = head * D
    if norm_ptr is not None:
        norm_a = tl.load(norm_ptr + first, mask=first < D, other=0.0).to(tl.float32)[None, None, :]
        norm_b = tl.load(norm_ptr + second, mask=second < D, other=0.0).to(tl.float32)[None, None, :]
        dnorm_a = tl.zeros([1, BT, P], tl.float32)
        dnorm_b = tl.zeros([1, BT, P], tl.float32)
    if delta_ptr is not None:
        weight_a = load_weight(delta_ptr, row + first, first < D, stride_delta, j0, J, JC)[:, None, :]
        weight_b = load_weight(delta_ptr, row + second, second < D, stride_delta, j0, J, JC)[:, None, :]
        ddelta_a = tl.zeros([JC, BT, P], tl.float32)
        ddelta_b = tl.zeros([JC, BT, P], tl.float32)
    start = chunk * chunk_tokens
    while start < tl.minimum((chunk + 1) * chunk_tokens, n_tokens):
        n = start + tl.arange(0, BT)
        n_ok = n < n_tokens
        b, t = n // T, n % T
        index, live = t, n_ok
        if cu_ptr is not None:
            _, index, live = sequence_of(t, cu_ptr, n_rows, steps, n_ok)
        read_at = b * stride_rb + t * stride_rt
        x = x_ptr + tall(b * stride_xb + t * stride_xt + head.to(tl.int64) * stride_xh)
        a, b2 = load_pairs(x, tall(live), D, HALF, INTERLEAVED, P)
        if delta_ptr is not None:
            r = load_reads(reads_ptr, read_at, live, stride_rh, j0, J, R, JC)[:, :, None]
            if J <= JC:
                a += tl.sum(r * weight_a, 0, keep_dims=True)
                b2 += tl.sum(r * weight_b, 0, keep_dims=True)
            else:
                a += lifted(
                    reads_ptr, read_at, live, stride_rh, delta_ptr, row + first, first < D, stride_delta, J, R, JC
                )
                b2 += lifted(
                    reads_ptr, read_at, live, stride_rh, delta_ptr, row + second, second < D, stride_delta, J, R, JC
                )
        scale = tl.full([1, BT, 1], 1.0, tl.float32)
        if norm_ptr is not None:
            scale = 1 / tl.sqrt_rn(tl.sum(a * a + b2 * b2, 2, keep_dims=True) / D + tl.where(tall(live), eps, 1.0))
            a, b2 = a * scale, b2 * scale
        ga = tl.zeros([1, BT, P], tl.float32)
        gb = tl.zeros([1, BT, P], tl.float32)
        if dy_ptr is not None:
            dy = dy_ptr + tall(b * stride_yb + t * stride_yt + head.to(tl.int64) * stride_yh)
            ga, gb = load_pairs(dy, tall(live), D, HALF, INTERLEAVED, P)
        if cos_ptr is not None:
            c, s = token_angles(cos_ptr, sin_ptr, positions_ptr, b, t, index, live, stride_cb, stride_ct, stride_sb,
                                stride_st, stride_pb, GATHERED, HALF, P)  # fmt: skip
            if dcos_ptr is not None:
                ya, yb = (a, b2) if norm_ptr is None else (a * norm_a, b2 * norm_b)
                at = tall(head * n_tokens.to(tl.int64) + n) * HALF + tl.arange(0, P)[None, :]
                turns = tall(n_ok) & (tl.arange(0, P) < HALF)[None, :] & (j0 == 0)
                tl.store(dcos_ptr + at, ga * ya + gb * yb, mask=turns)
                tl.store(dsin_ptr + at, gb * ya - ga * yb, mask=turns)
            ga, gb = ga * c + gb * s, gb * c - ga * s
        if norm_ptr is not None:
            dnorm_a += ga * a
            dnorm_b += gb * b2
            ga, gb = ga * norm_a, gb * norm_b
            along = tl.sum(ga * a + gb * b2, 2, keep_dims=True) / D
            ga, gb = scale * (ga - a * along), scale * (gb - b2 * along)
        dx = dx_ptr + tall((n * n_heads + head) * D)
        store_pairs(dx, ga, gb, tall(n_ok) & (j0 == 0), D, HALF, INTERLEAVED, P)
        if delta_ptr is not None:
            ddelta_a += r * ga
            ddelta_b += r * gb
            dr = tl.sum(ga * weight_a + gb * weight_b, 2)  # [JC, BT]
            j = j0 + tl.arange(0, JC)
            at = (head * n_tokens.to(tl.int64) + n)[None, :] * J + j[:, None]
            tl.store(dreads_ptr + at, dr, mask=n_ok[None, :] & (j < J)[:, None])
        start += BT
    part = chunk * n_heads + head
    if delta_ptr is not None:
        j = (j0 + tl.arange(0, JC))[:, None]
        at = part * (D * J) + j
        tl.store(ddelta_ptr + at + first[None, :] * J, tl.sum(ddelta_a, 1), mask=(j < J) & (first < D)[None, :])
        tl.store(ddelta_ptr + at + second[None, :] * J, tl.sum(ddelta_b, 1), mask=(j < J) & (second < D)[None, :])
    if norm_ptr is not None:
        tl.store(dnorm_ptr + part * D + first, tl.sum(tl.sum(dnorm_a, 1), 0), mask=(first < D) & (j0 == 0))
        tl.store(dnorm_ptr + part * D + second, tl.sum(tl.sum(dnorm_b, 1), 0), mask=(second < D) & (j0 == 0))


def _zeros(weight):
    return add_parts(weight.new_empty((0, *weight.shape), dtype=torch.float32), weight.new_empty(weight.shape))


def _head_grads(
    dy, x, reads, delta, norm_weight, norm_eps, cos, sin, interleaved, positions, cu_seqlens, dreads, dcos, dsin
):  # fmt: skip
    """(dx, ddelta, dnorm_weight) of one of q, k, v; fills its heads' shares dreads [heads, B, T, J], dcos, dsin."""
    B, T, heads, D = x.shape
    H, R = (1, 1) if delta is None else reads.shape[2:]
    J, JC, P, n_tokens = H * R, columns(H * R), pair_count(D), B * T
    warps = 1 if P <= 32 else 4 if P == 64 else 8
    BT = min(max(1, WARP_TILE * warps // P), 32)
    chunks = min(triton.cdiv(n_tokens, CHUNK_TOKENS), MAX_CHUNKS)
    chunk_tokens = triton.cdiv(triton.cdiv(n_tokens, max(chunks, 1)), BT) * BT
    n_rows = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gathered = cos is not None and cos.ndim == 3

    def partials(weight, *shape):
        return None if weight is None else x.new_empty((chunks, *shape), dtype=torch.float32)

    dx = x.new_empty(x.shape)
    ddelta, dnorm = partials(delta, heads * D, J), partials(norm_weight, heads, D)
    if n_tokens:
        prep_bwd_kernel[(triton.cdiv(J, JC) * heads * chunks,)](
            dy, x, dx, delta, norm_weight, reads if delta is not None else None, dreads, ddelta, dnorm,
            cos, sin, dcos, dsin, positions, cu_seqlens,
            n_tokens, T, n_rows, search_steps(n_rows), chunk_tokens, heads, norm_eps,
            *outer_strides(dy), *outer_strides(x),
            *outer_strides(reads if delta is not None else None), *outer_strides(delta, 1),
            *rotary_strides(cos), *rotary_strides(sin), *outer_strides(positions, 1),
            GATHERED=gathered, BT=BT, J=J, R=R, JC=JC, D=D, HALF=0 if cos is None else cos.shape[-1],
            INTERLEAVED=interleaved and cos is not None, P=P, num_warps=warps,
        )  # fmt: skip
    return (
        dx,
        x.new_empty(0) if delta is None else add_parts(ddelta, delta.new_empty(delta.shape)),
        x.new_empty(0) if norm_weight is None
        else add_parts(dnorm.view(chunks * heads, D), norm_weight.new_empty(norm_weight.shape)),
    )  # fmt: skip


def delta_prep_bwd(
    dq_prep, dk_prep, dv_prep, q, k, v, reads, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight, norm_eps,
    rotary_cos, rotary_sin, rotary_interleaved, positions, cu_seqlens, rotary_grad,
):  # fmt: skip
    given = next(x for x in (q, k, v) if x is not None)
    B, T = given.shape[:2]
    empty, fp32 = given.new_empty(0), {"dtype": torch.float32}
    jobs = (
        (dq_prep, q, delta_q, q_norm_weight, True),
        (dk_prep, k, delta_k, k_norm_weight, True),
        (dv_prep, v, delta_v, None, False),
    )
    corrected = sum(x.shape[2] for _, x, delta, _, _ in jobs if x is not None and delta is not None)
    dreads = None if reads is None else given.new_empty((corrected, *reads.shape), **fp32)
    turned, tables = 0, (None, None)
    if rotary_grad:
        turned = sum(x.shape[2] for x in (q, k) if x is not None)
        tables = [given.new_empty((turned, B, T, rotary_cos.shape[-1]), **fp32) for _ in range(2)]
    grads, reads_at, table_at = [], 0, 0
    for dy, x, delta, norm_weight, turns in jobs:
        if x is None:
            grads.append((empty, *(empty if w is None else _zeros(w) for w in (delta, norm_weight))))
            continue
        rotary = (rotary_cos, rotary_sin) if turns else (None, None)
        shares = [table[table_at:] if rotary_grad and turns else None for table in tables]
        grads.append(
            _head_grads(
                dy,
                x,
                reads,
                delta,
                norm_weight,
                norm_eps,
                *rotary,
                rotary_interleaved,
                positions,
                cu_seqlens,
                None if delta is None else dreads[reads_at:],
                *shares,
            )
        )
        reads_at += 0 if delta is None else x.shape[2]
        table_at += x.shape[2] if rotary_grad and turns else 0
    (dq, ddelta_q, dq_norm), (dk, ddelta_k, dk_norm), (dv, ddelta_v, _) = grads
    return (
        dq, dk, dv, empty if reads is None else add_parts(dreads, reads.new_empty(reads.shape)),
        ddelta_q, ddelta_k, ddelta_v, dq_norm, dk_norm,
        *(add_parts(table, table.new_empty(table.shape[1:])) if rotary_grad else given.new_empty(0, **fp32)
          for table in tables),
    )  # fmt: skip
