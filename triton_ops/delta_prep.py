"""q, k, v before attention: x' = RoPE(RMSNorm(x + delta_x reads)), rounded once; v is only corrected.

One program per (token tile, group of heads of q, k or v): the tile's rotary rows stay in registers for all heads
of the group, a head's weights come from L2 once per tile. Rows go to fresh tensors, or to the slots of a dense or
paged cache. Floor: every row read once and written once; 2 J flops per element, FMA only.
"""

import torch
import triton
import triton.language as tl

from .delta_prep_bwd import delta_prep_bwd, rotary_strides
from .lift import columns, lift
from .lowering import launches
from .prologue import load_pairs, normed, pair_channels, pair_count, rotary_rows, store_pairs
from .sequences import search_steps, sequence_of

__all__ = ["delta_prep_bwd", "delta_prep_fwd", "delta_prep_with_kvcache", "lowerings"]

# (tokens x pairs, heads, warps) of a program: 8 pairs of a thread make 16-byte loads of 2-byte types. Few tokens:
# one head each, to spread over the machine.
PREFILL_TILE, DECODE_TILE = (1024, 4, 4), (256, 1, 1)
DECODE_TOKENS = 64


@triton.jit
def prep_heads(
    x_ptr, y_ptr, delta_ptr, norm_ptr, x_at, y_at, read_at, n_ok, live, cos, sin, first_head, n_heads,
    stride_xh, stride_yh, stride_delta, reads_ptr, stride_rh, eps, ROTATES: tl.constexpr, GROUP: tl.constexpr,
    J: tl.constexpr, R: tl.constexpr, JC: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Heads first_head .. first_head + GROUP of the rows at x_at, y_at, read_at int64 [BT]; cos, sin [BT, P]."""
    first, second = pair_channels(D, HALF, INTERLEAVED, P)
    x_at += first_head.to(tl.int64) * stride_xh
    y_at += first_head.to(tl.int64) * stride_yh
    for head in range(first_head, min(first_head + GROUP, n_heads)):
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


@triton.jit(do_not_specialize=["n_tokens", "T", "n_rows", "steps", "page", "q_groups", "k_groups", "HQ", "HKV"])
def prep_kernel(
    q_ptr, k_ptr, v_ptr, q_out, k_out, v_out, reads_ptr, delta_q, delta_k, delta_v, q_norm, k_norm, cos_ptr, sin_ptr,
    positions_ptr, mask_ptr, cu_ptr, lengths_ptr, table_ptr, indices_ptr,
    n_tokens, T, n_rows, steps, page, q_groups, k_groups, HQ, HKV, eps,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_qob, stride_qot, stride_qoh, stride_kob, stride_kot, stride_koh, stride_vob, stride_vot, stride_voh,
    stride_rb, stride_rt, stride_rh, stride_dq, stride_dk, stride_dv, stride_cb, stride_ct, stride_sb, stride_st,
    stride_pb, stride_mb, stride_tb,
    GATHERED: tl.constexpr, GROUP: tl.constexpr, BT: tl.constexpr, J: tl.constexpr, R: tl.constexpr, JC: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    pid, n_tiles = tl.program_id(0), tl.cdiv(n_tokens, BT)
    group = pid // n_tiles
    n = (pid % n_tiles).to(tl.int64) * BT + tl.arange(0, BT)
    n_ok = n < n_tokens
    b, t = n // T, n % T
    row, index, live = b, t, n_ok
    if cu_ptr is not None:
        row, index, inside = sequence_of(t, cu_ptr, n_rows, steps, n_ok)
        live = n_ok & inside
    out_b, out_t = b, t
    if lengths_ptr is not None:  # slots of a cache, only the live rows
        if mask_ptr is not None:
            live = live & (tl.load(mask_ptr + b * stride_mb + t, mask=live, other=0) != 0)
        if indices_ptr is not None:
            live = live & (tl.load(indices_ptr + row, mask=live, other=-1) >= 0)
        index += tl.load(lengths_ptr + row, mask=live, other=0)
        out_b, out_t = row, index
        if table_ptr is not None:
            out_b = tl.load(table_ptr + row * stride_tb + index // page, mask=live, other=0).to(tl.int64)
            out_t = index % page
        n_ok = live
    cos, sin = 0.0, 0.0
    if cos_ptr is not None:
        if positions_ptr is not None:
            index = tl.load(positions_ptr + b * stride_pb + t, mask=live, other=0).to(tl.int64)
        cos_at = b * stride_cb + t * stride_ct if GATHERED else index * stride_ct
        sin_at = b * stride_sb + t * stride_st if GATHERED else index * stride_st
        cos, sin = rotary_rows(cos_ptr + cos_at[:, None], sin_ptr + sin_at[:, None], live[:, None], HALF, P)
    read_at = b * stride_rb + t * stride_rt
    ROTATES: tl.constexpr = cos_ptr is not None
    if group < q_groups:
        if q_ptr is not None:
            prep_heads(
                q_ptr, q_out, delta_q, q_norm, b * stride_qb + t * stride_qt, out_b * stride_qob + out_t * stride_qot,
                read_at, n_ok, live, cos, sin, group * GROUP, HQ, stride_qh, stride_qoh, stride_dq,
                reads_ptr, stride_rh, eps, ROTATES, GROUP, J, R, JC, D, HALF, INTERLEAVED, P,
            )  # fmt: skip
    elif group < q_groups + k_groups:
        if k_ptr is not None:
            prep_heads(
                k_ptr, k_out, delta_k, k_norm, b * stride_kb + t * stride_kt, out_b * stride_kob + out_t * stride_kot,
                read_at, n_ok, live, cos, sin, (group - q_groups) * GROUP, HKV, stride_kh, stride_koh, stride_dk,
                reads_ptr, stride_rh, eps, ROTATES, GROUP, J, R, JC, D, HALF, INTERLEAVED, P,
            )  # fmt: skip
    elif v_ptr is not None:
        prep_heads(
            v_ptr, v_out, delta_v, None, b * stride_vb + t * stride_vt, out_b * stride_vob + out_t * stride_vot,
            read_at, n_ok, live, cos, sin, (group - q_groups - k_groups) * GROUP, HKV, stride_vh, stride_voh, stride_dv,
            reads_ptr, stride_rh, eps, False, GROUP, J, R, JC, D, HALF, INTERLEAVED, P,
        )  # fmt: skip


def _strides(x, count=3):
    return (0,) * count if x is None else x.stride()[:count]


def _launch(
    inputs, outputs, reads, deltas, norms, norm_eps, cos, sin, interleaved, positions, cu_seqlens,
    token_mask=None, lengths=None, block_table=None, state_indices=None,
):  # fmt: skip
    q, k, v = inputs
    given = next(x for x in inputs if x is not None)
    B, T, _, D = given.shape
    HQ, HKV = 0 if q is None else q.shape[2], next((x.shape[2] for x in (k, v) if x is not None), 0)
    n_tokens = B * T
    if not n_tokens:
        return
    H, R = (1, 1) if reads is None else reads.shape[2:]
    elements, group, warps = DECODE_TILE if n_tokens <= DECODE_TOKENS else PREFILL_TILE
    P = pair_count(D)
    BT = min(max(1, elements // P), 64)
    q_groups, k_groups = triton.cdiv(HQ, group), 0 if k is None else triton.cdiv(HKV, group)
    groups = q_groups + k_groups + (0 if v is None else triton.cdiv(HKV, group))
    n_rows = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gathered = cos is not None and cos.ndim == 3
    prep_kernel[(triton.cdiv(n_tokens, BT) * groups,)](
        *inputs, *outputs, reads, *deltas, *norms, cos, sin,
        positions, token_mask, cu_seqlens, lengths, block_table, state_indices,
        n_tokens, T, n_rows, search_steps(n_rows), 0 if block_table is None else outputs[1].shape[1],
        q_groups, k_groups, HQ, HKV, norm_eps,
        *(stride for x in (*inputs, *outputs, reads) for stride in _strides(x)),
        *(stride for x in deltas for stride in _strides(x, 1)), *rotary_strides(cos), *rotary_strides(sin),
        *(stride for x in (positions, token_mask, block_table) for stride in _strides(x, 1)),
        GATHERED=gathered, GROUP=group, BT=BT, J=H * R, R=R, JC=columns(H * R), D=D,
        HALF=0 if cos is None else cos.shape[-1], INTERLEAVED=interleaved and cos is not None, P=P,
        num_warps=warps,
    )  # fmt: skip


def delta_prep_fwd(
    q, k, v, reads, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight, norm_eps,
    rotary_cos, rotary_sin, rotary_interleaved, positions, cu_seqlens,
):  # fmt: skip
    given = next(x for x in (q, k, v) if x is not None)
    results = [given.new_empty((0,) if x is None else x.shape) for x in (q, k, v)]
    outputs = [None if x is None else y for x, y in zip((q, k, v), results, strict=True)]
    _launch(
        (q, k, v), outputs, reads, (delta_q, delta_k, delta_v), (q_norm_weight, k_norm_weight), norm_eps,
        rotary_cos, rotary_sin, rotary_interleaved, positions, cu_seqlens,
    )  # fmt: skip
    return tuple(results)


def delta_prep_with_kvcache(
    k, v, k_cache, v_cache, reads, delta_k, delta_v, k_norm_weight, norm_eps,
    rotary_cos, rotary_sin, rotary_interleaved, positions, token_mask, cu_seqlens, cache_seqlens, block_table,
    state_indices,
):  # fmt: skip
    _launch(
        (None, k, v), (None, k_cache, v_cache), reads, (None, delta_k, delta_v), (None, k_norm_weight), norm_eps,
        rotary_cos, rotary_sin, rotary_interleaved, positions, cu_seqlens,
        token_mask, cache_seqlens, block_table, state_indices,
    )  # fmt: skip


def lowerings():
    """Every (name, kernel, signature, constexprs, options) that the launchers pick, at sizes of an 8B model."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    for dtype in (torch.bfloat16, torch.float32):
        for tokens, D, half, interleaved, J, paged in (
            (8192, 128, 64, False, 8, False),
            (8192, 128, 64, True, 8, False),
            (8192, 96, 48, False, 8, False),
            (8192, 256, 32, False, 8, False),
            (8192, 64, 32, False, 32, False),
            (8192, 128, 0, False, 8, False),
            (8, 128, 64, False, 8, True),
        ):
            q, kv = empty(1, tokens, 32, D, dtype=dtype), empty(1, tokens, 8, D, dtype=dtype)
            deltas = [empty(heads * D, J, dtype=dtype) for heads in (32, 8, 8)]
            norm, tables = empty(D, dtype=dtype), [empty(40960, half)] * 2 if half else [None, None]
            words = (*deltas, norm, norm, 1e-6, *tables, interleaved, None, None)
            reads = empty(1, tokens, J // 8, 8)
            name = f"T={tokens} D={D}{' interleaved' if interleaved else f' rotary={2 * half}'} J={J}"
            if paged:
                cache, ints = empty(64, 16, 8, D, dtype=dtype), empty(1, 64, dtype=torch.int32)
                yield from launches(
                    f"{name} paged", delta_prep_with_kvcache, kv, kv, cache, cache, reads, *deltas[1:], norm, 1e-6,
                    *tables, interleaved, None, None, None, ints[0], ints, ints[0],
                )  # fmt: skip
                continue
            yield from launches(name, delta_prep_fwd, q, kv, kv, reads, *words)
            yield from launches(name, delta_prep_bwd, q, kv, kv, q, kv, kv, reads, *words, False)
