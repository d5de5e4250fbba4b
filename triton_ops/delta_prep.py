"""q, k, v before attention: x' = RoPE(RMSNorm(x + delta_x reads)), rounded once; v is only corrected.

One program per (token tile, group of heads of q, k or v): the tile's rotary rows stay in registers for all heads
of the group, a head's weights come from L2 once per tile. Rows go to fresh tensors, or to the slots of a dense or
paged cache. Floor: every row read once and written once; 2 J flops per element, FMA only.
"""

import torch
import triton
import triton.language as tl

from deltamem_kernels.ops import SEGMENT_LEN, tape_shape

from .delta_prep_bwd import delta_prep_bwd
from .delta_scan import delta_scan_fwd
from .lift import columns
from .lowering import launches, unique
from .prep_tiles import (
    outer_strides,
    prep_heads,
    rotary_flags,
    rotary_strides,
    tile,
    token_angles,
)
from .scan_plan import plan
from .scan_prep import scan_beside_prep
from .sequences import search_steps, sequence_of

__all__ = ["delta_prep_bwd", "delta_prep_fwd", "delta_prep_with_kvcache", "delta_scan_prep_fwd", "lowerings"]


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
    cos, sin = token_angles(
        cos_ptr, sin_ptr, positions_ptr, b, t, index, live, stride_cb, stride_ct, stride_sb, stride_st, stride_pb,
        GATHERED, HALF, P,
    )  # fmt: skip
    read_at = b * stride_rb + t * stride_rt
    ROTATES: tl.constexpr = cos_ptr is not None
    if group < q_groups:
        if q_ptr is not None:
            first = group * GROUP
            prep_heads(
                q_ptr, q_out, delta_q, q_norm, b * stride_qb + t * stride_qt, out_b * stride_qob + out_t * stride_qot,
                read_at, n_ok, live, cos, sin, first, min(first + GROUP, HQ), stride_qh, stride_qoh, stride_dq,
                reads_ptr, stride_rh, eps, ROTATES, J, R, JC, D, HALF, INTERLEAVED, P,
            )  # fmt: skip
    elif group < q_groups + k_groups:
        if k_ptr is not None:
            first = (group - q_groups) * GROUP
            prep_heads(
                k_ptr, k_out, delta_k, k_norm, b * stride_kb + t * stride_kt, out_b * stride_kob + out_t * stride_kot,
                read_at, n_ok, live, cos, sin, first, min(first + GROUP, HKV), stride_kh, stride_koh, stride_dk,
                reads_ptr, stride_rh, eps, ROTATES, J, R, JC, D, HALF, INTERLEAVED, P,
            )  # fmt: skip
    elif v_ptr is not None:
        first = (group - q_groups - k_groups) * GROUP
        prep_heads(
            v_ptr, v_out, delta_v, None, b * stride_vb + t * stride_vt, out_b * stride_vob + out_t * stride_vot,
            read_at, n_ok, live, cos, sin, first, min(first + GROUP, HKV), stride_vh, stride_voh, stride_dv,
            reads_ptr, stride_rh, eps, False, J, R, JC, D, HALF, INTERLEAVED, P,
        )  # fmt: skip


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
    BT, group, warps = tile(n_tokens, D, H * R)
    q_groups, k_groups = triton.cdiv(HQ, group), 0 if k is None else triton.cdiv(HKV, group)
    groups = q_groups + k_groups + (0 if v is None else triton.cdiv(HKV, group))
    n_rows = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    prep_kernel[(triton.cdiv(n_tokens, BT) * groups,)](
        *inputs, *outputs, reads, *deltas, *norms, cos, sin,
        positions, token_mask, cu_seqlens, lengths, block_table, state_indices,
        n_tokens, T, n_rows, search_steps(n_rows), 0 if block_table is None else outputs[1].shape[1],
        q_groups, k_groups, HQ, HKV, norm_eps,
        *(stride for x in (*inputs, *outputs, reads) for stride in outer_strides(x)),
        *(stride for x in deltas for stride in outer_strides(x, 1)), *rotary_strides(cos), *rotary_strides(sin),
        *(stride for x in (positions, token_mask, block_table) for stride in outer_strides(x, 1)),
        GROUP=group, BT=BT, J=H * R, R=R, JC=columns(H * R), **rotary_flags(cos, interleaved, D), num_warps=warps,
    )  # fmt: skip


def _results(*inputs):
    """(fresh tensors like the inputs, an empty one for an absent input; the same with None for an absent input)"""
    given = next(x for x in inputs if x is not None)
    results = [given.new_empty((0,) if x is None else x.shape) for x in inputs]
    return results, [None if x is None else y for x, y in zip(inputs, results, strict=True)]


def delta_prep_fwd(
    q, k, v, reads, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight, norm_eps,
    rotary_cos, rotary_sin, rotary_interleaved, positions, cu_seqlens,
):  # fmt: skip
    results, outputs = _results(q, k, v)
    _launch(
        (q, k, v), outputs, reads, (delta_q, delta_k, delta_v), (q_norm_weight, k_norm_weight), norm_eps,
        rotary_cos, rotary_sin, rotary_interleaved, positions, cu_seqlens,
    )  # fmt: skip
    return tuple(results)


def delta_scan_prep_fwd(
    mem_q, mem_k, mem_v, beta, lam, initial_state, token_mask, cu_seqlens, beta_bias, lam_bias, update_rule, write,
    use_qk_activation_in_kernel, use_gate_in_kernel, segment_len, save_tape, k, v, delta_k, delta_v, k_norm_weight,
    norm_eps, rotary_cos, rotary_sin, rotary_interleaved, positions,
):  # fmt: skip
    B, T, H, R = mem_q.shape
    tokens, biases = (mem_q, mem_k, mem_v, beta, lam), (beta_bias, lam_bias)
    options = (update_rule, write, use_qk_activation_in_kernel, use_gate_in_kernel)
    rotary = (rotary_cos, rotary_sin, rotary_interleaved, positions)
    cut = plan(mem_q, beta, lam, cu_seqlens, update_rule, write, segment_len)
    waits = delta_k is not None or v is not None  # v is here to be corrected
    if waits or not cut.slots[0] or not T:
        scanned = delta_scan_fwd(
            *tokens, initial_state, token_mask, cu_seqlens, *biases, *options, segment_len, save_tape
        )
        prepared = delta_prep_fwd(
            None, k, v, scanned[0], None, delta_k, delta_v, None, k_norm_weight, norm_eps, *rotary, cu_seqlens
        )
        return *scanned, *prepared[1:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tape_len, tape = 0, (0,)
    if save_tape:
        tape_len, tape = segment_len or SEGMENT_LEN, tape_shape(mem_q, cu_seqlens, segment_len)
    scanned = [mem_q.new_empty(shape, dtype=torch.float32) for shape in ((B, T, H, R), (N, H, R, R), tape)]
    k_prep = k.new_empty(k.shape)
    scan_beside_prep(
        cut, tokens, biases, initial_state, token_mask, cu_seqlens, *options, tape_len, *scanned,
        k, k_prep, k_norm_weight, norm_eps, *rotary,
    )  # fmt: skip
    return *scanned, k_prep, k.new_empty(0)


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
    """Every (name, kernel, signature, constexprs, options) that the launchers pick, at sizes of an 8B model; each
    once, and without the scan's own kernels."""
    for found in unique(_launched()):
        if found[1].__name__ not in ("segment_maps_kernel", "compose_maps_kernel"):
            yield found


def _launched():
    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    half, full = torch.bfloat16, torch.float32
    # fwd, bwd; paged: into a cache; beside: k beside the scan, packed: the same of packed rows
    for dtype, T, D, rotary, interleaved, H, R, ops in (
        (half, 8192, 128, 128, False, 1, 8, "fwd bwd paged beside packed"),
        (half, 8192, 128, 128, True, 1, 8, "fwd bwd"),
        (half, 8192, 128, 0, False, 1, 16, "fwd bwd"),
        (half, 8192, 96, 96, False, 1, 8, "fwd bwd"),
        (half, 8192, 256, 64, False, 1, 8, "fwd bwd"),
        (half, 8192, 64, 64, False, 4, 8, "fwd bwd"),
        (half, 8, 128, 128, False, 1, 8, "fwd paged beside"),
        (full, 8192, 64, 64, False, 1, 8, "fwd bwd"),
        (full, 8192, 128, 128, False, 1, 8, "fwd bwd paged packed"),
        (full, 8192, 256, 256, False, 1, 16, "fwd bwd beside"),
    ):
        q, kv, mem = empty(1, T, 32, D, dtype=dtype), empty(1, T, 8, D, dtype=dtype), empty(1, T, H, R, dtype=dtype)
        deltas = [empty(heads * D, H * R, dtype=dtype) for heads in (32, 8, 8)]
        norm, reads, ints = empty(D, dtype=dtype), empty(1, T, H, R), empty(9, dtype=torch.int32)
        cache, table = empty(64, 16, 8, D, dtype=dtype), empty(1, 64, dtype=torch.int32)
        rotation = [empty(40960, rotary // 2, dtype=dtype)] * 2 if rotary else [None, None]
        rotation = (1e-6, *rotation, interleaved, None)
        words = (reads, *deltas, norm, norm, *rotation, None)
        scan, options = (*(mem,) * 4, *(None,) * 3), (None, None, "standard", True, False, False, 0, True)
        beside = (*options, kv, None, None, None, norm, *rotation)
        calls = {
            "fwd": (delta_prep_fwd, q, kv, kv, *words),
            "bwd": (delta_prep_bwd, q, kv, kv, q, kv, kv, *words, False),
            "paged": (
                delta_prep_with_kvcache, kv, kv, cache, cache, reads, *deltas[1:], norm, *rotation,
                None, None, ints[:1], table, ints[:1],
            ),
            "beside": (delta_scan_prep_fwd, *scan, None, *beside),
            "packed": (delta_scan_prep_fwd, *scan, ints, *beside),
        }  # fmt: skip
        name = f"T={T} D={D} rotary={rotary}{' interleaved' if interleaved else ''} H={H} R={R}"
        for op in ops.split():
            yield from launches(f"{name} {op}", *calls[op])
