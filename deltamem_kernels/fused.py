"""The chain scan -> prep -> attention and its reverse, once for all backends.

reads, state = delta_scan(...)                       joined with the next where a backend has that op
k', v'       = delta_prep(k, v, reads)               RoPE(RMSNorm(k + delta_k reads)), v + delta_v reads
out, lse     = delta_attention(q, k', v', reads)     prepares its queries itself, tile by tile
"""

from typing import NamedTuple

import torch

SCAN_PREP = "delta_scan_prep_fwd"  # scan and prep joined, run where a backend has it
MAX_DECODE_TOKENS = 16  # new tokens per row that one delta_decode call takes


class Scan(NamedTuple):
    """The delta rule's options, in the order of every scan schema."""

    update_rule: str
    write: bool
    use_qk_activation_in_kernel: bool
    use_gate_in_kernel: bool


class Memory(NamedTuple):
    """One call's memory tensors, 4-D."""

    mem_q: torch.Tensor
    mem_k: torch.Tensor | None
    mem_v: torch.Tensor | None
    beta: torch.Tensor | None
    lam: torch.Tensor | None
    beta_bias: torch.Tensor | None
    lam_bias: torch.Tensor | None


class Corrections(NamedTuple):
    """What turns raw projections into queries, keys and values."""

    delta_q: torch.Tensor | None
    delta_k: torch.Tensor | None
    delta_v: torch.Tensor | None
    q_norm_weight: torch.Tensor | None
    k_norm_weight: torch.Tensor | None
    norm_eps: float
    rotary_cos: torch.Tensor | None
    rotary_sin: torch.Tensor | None
    rotary_interleaved: bool
    positions: torch.Tensor | None


class Rows(NamedTuple):
    token_mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    max_seqlen: int  # 0: not known on the host


class Softmax(NamedTuple):
    scale: float
    causal: bool
    window_left: int
    window_right: int
    softcap: float


class Pool(NamedTuple):
    state_pool: torch.Tensor | None
    state_indices: torch.Tensor | None
    output_state_indices: torch.Tensor | None
    has_initial_state: torch.Tensor | None


class Cache(NamedTuple):
    cache_seqlens: torch.Tensor
    cache_leftpad: torch.Tensor | None
    block_table: torch.Tensor | None


def memory_4d(*tensors):
    """Memory tensors, of one rank, with their state-head dimension: ``[B, T, R]`` means H = 1."""
    if tensors[0].ndim == 4:
        return tensors
    return [None if x is None else x.unsqueeze(2) for x in tensors]


def scan_forward(kernels, memory, scan, initial_state, token_mask, cu_seqlens, save_tape):
    """-> reads, final_state, tape"""
    mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias = memory
    return kernels["delta_scan_fwd"](
        mem_q,
        mem_k,
        mem_v,
        beta,
        lam,
        initial_state,
        token_mask,
        cu_seqlens,
        beta_bias,
        lam_bias,
        *scan,
        0,
        save_tape,
    )


def scan_backward(kernels, memory, scan, initial_state, token_mask, cu_seqlens, tape, dreads, dfinal_state):
    """-> gradients of (mem_q, mem_k, mem_v, beta, lam, initial_state, beta_bias, lam_bias)"""
    mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias = memory
    return kernels["delta_scan_bwd"](
        dreads,
        dfinal_state,
        mem_q,
        mem_k,
        mem_v,
        beta,
        lam,
        initial_state,
        token_mask,
        cu_seqlens,
        beta_bias,
        lam_bias,
        *scan,
        0,
        tape,
    )


def _prepared(fix: Corrections) -> tuple[bool, bool, bool]:
    """Which of q, k, v differ from their raw projections."""
    rotates = fix.rotary_cos is not None
    return (
        rotates or fix.delta_q is not None or fix.q_norm_weight is not None,
        rotates or fix.delta_k is not None or fix.k_norm_weight is not None,
        fix.delta_v is not None,
    )


def _changed(fix: Corrections, *raw):
    """q, k, v where they are given and will differ from their raw projections, else None."""
    return [x if changes else None for x, changes in zip(raw, _prepared(fix), strict=True)]


def _kept(raw, done, changed):
    """Prepared tensors, and raw ones where nothing changed."""
    return tuple(x if todo is None else y for x, y, todo in zip(raw, done, changed, strict=True))


def prepare(kernels, q, k, v, reads, fix: Corrections, cu_seqlens):
    """Prepared q, k, v; an argument that is None, or that nothing changes, comes back as it is."""
    todo = _changed(fix, q, k, v)
    if all(x is None for x in todo):
        return q, k, v
    return _kept((q, k, v), kernels["delta_prep_fwd"](*todo, reads, *fix, cu_seqlens), todo)


def scan_and_prepare(kernels, k, v, memory, scan, initial_state, fix: Corrections, rows: Rows, save_tape):
    """-> reads, final_state, tape (None without memory), k', v'"""
    token_mask, cu_seqlens, _ = rows
    if memory is None:
        return None, None, None, *prepare(kernels, None, k, v, None, fix, cu_seqlens)[1:]
    _, *todo = _changed(fix, None, k, v)
    if SCAN_PREP not in kernels or all(x is None for x in todo):
        results = scan_forward(kernels, memory, scan, initial_state, token_mask, cu_seqlens, save_tape)
        return *results, *prepare(kernels, None, k, v, results[0], fix, cu_seqlens)[1:]
    mem_q, mem_k, mem_v, beta, lam, *biases = memory
    *results, k_prep, v_prep = kernels[SCAN_PREP](
        mem_q, mem_k, mem_v, beta, lam, initial_state, token_mask, cu_seqlens, *biases, *scan, 0, save_tape,
        *todo, fix.delta_k, fix.delta_v, fix.k_norm_weight, *fix[5:],
    )  # fmt: skip
    return *results, *_kept((k, v), (k_prep, v_prep), todo)


def attention_forward(kernels, q, k, v, memory, scan, initial_state, fix: Corrections, rows: Rows, softmax, save_tape):
    """-> out, lse, reads, final_state, tape, k', v'"""
    reads, *states, k, v = scan_and_prepare(kernels, k, v, memory, scan, initial_state, fix, rows, save_tape)
    out, lse = kernels["delta_attention_fwd"](q, k, v, *_query_prologue(reads, fix), *rows, *softmax)
    return out, lse, reads, *states, k, v


def _query_prologue(reads, fix: Corrections):
    return (
        reads if fix.delta_q is not None else None,
        fix.delta_q,
        fix.q_norm_weight,
        fix.norm_eps,
        fix.rotary_cos,
        fix.rotary_sin,
        fix.rotary_interleaved,
        fix.positions,
    )


def attention_backward(kernels, dout, q, k, v, k_prep, v_prep, reads, fix, rows, softmax, out, lse):
    """-> gradients of (q, k, v, reads, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight, rotary_cos, rotary_sin)

    Absent ones are None; the rotary gradients are those of the tables as given.
    """
    q_prep, _, _ = prepare(kernels, q, None, None, reads, fix, rows.cu_seqlens)
    grads = kernels["delta_attention_bwd"](dout, q_prep, k_prep, v_prep, out, lse, *rows, *softmax)
    changes = _prepared(fix)
    if not any(changes):
        return (*grads, *[None] * 8)
    rotary_grad = fix.rotary_cos is not None and (fix.rotary_cos.requires_grad or fix.rotary_sin.requires_grad)
    cotangents = [g if changed else None for g, changed in zip(grads, changes, strict=True)]
    raw = _changed(fix, q, k, v)
    dq, dk, dv, *others = kernels["delta_prep_bwd"](*cotangents, *raw, reads, *fix, rows.cu_seqlens, rotary_grad)
    projected = [prep if c else g for g, prep, c in zip(grads, (dq, dk, dv), changes, strict=True)]
    given = (reads, fix.delta_q, fix.delta_k, fix.delta_v, fix.q_norm_weight, fix.k_norm_weight)
    weights = [g if x is not None else None for g, x in zip(others[:6], given, strict=True)]
    tables = [None, None]
    if rotary_grad:
        tables = [_table_grad(g, fix.rotary_cos, fix.positions, rows.cu_seqlens) for g in others[6:]]
    return (*projected, *weights, *tables)


def _table_grad(per_token, table, positions, cu_seqlens):
    """Gradient of a rotary table from those of its rows at each token."""
    if table.ndim == 3:
        return per_token.to(table.dtype)
    if positions is None:
        tokens = torch.arange(per_token.shape[1], device=table.device)
        if cu_seqlens is not None:
            sequence = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
            tokens = tokens - cu_seqlens[sequence.clamp(max=cu_seqlens.shape[0] - 1)]
        positions = tokens.expand(per_token.shape[:2])
    total = per_token.new_zeros(table.shape)
    total.index_add_(0, positions.reshape(-1), per_token.reshape(-1, per_token.shape[-1]))
    return total.to(table.dtype)


def scan_with_state_pool(kernels, memory, scan, pool: Pool, token_mask, cu_seqlens, reads):
    mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias = memory
    kernels["delta_scan_with_state_pool"](
        mem_q, mem_k, mem_v, beta, lam, *pool, token_mask, cu_seqlens, beta_bias, lam_bias, *scan, reads
    )


def decodes(q, rows: Rows) -> bool:
    """Whether one delta_decode call serves this step: as far as the host knows, few new tokens per row."""
    bound = q.shape[1] if rows.cu_seqlens is None or not rows.max_seqlen else rows.max_seqlen
    return bound <= MAX_DECODE_TOKENS


def attention_with_kvcache(
    kernels,
    q,
    k_cache,
    v_cache,
    k,
    v,
    memory,
    scan,
    pool,
    fix,
    rows,
    cache,
    softmax,
    num_splits,
    out,
    reads,
    lse,
):
    """Advances the caches and the state pool in place; fills out, reads (given with memory) and lse."""
    token_mask, cu_seqlens, _ = rows
    if decodes(q, rows):
        tensors, biases = (memory[:5], memory[5:]) if memory is not None else ((None,) * 5, (None,) * 2)
        kernels["delta_decode"](
            q, k_cache, v_cache, k, v, *tensors, *pool, *biases, *scan, *fix, *rows, *cache, *softmax, num_splits,
            out, reads, lse
        )  # fmt: skip
        return
    if memory is not None:
        scan_with_state_pool(kernels, memory, scan, pool, token_mask, cu_seqlens, reads)
    if k is not None:
        kernels["delta_prep_with_kvcache"](
            k,
            v,
            k_cache,
            v_cache,
            reads,
            fix.delta_k,
            fix.delta_v,
            fix.k_norm_weight,
            fix.norm_eps,
            *fix[6:],
            token_mask,
            cu_seqlens,
            cache.cache_seqlens,
            cache.block_table,
            pool.state_indices,
        )
    kernels["delta_attention_with_kvcache"](
        q, k_cache, v_cache, *_query_prologue(reads, fix), *rows, *cache, pool.state_indices, k is not None, *softmax,
        num_splits, out, lse
    )  # fmt: skip


def chain(function: str, given: dict, covered: set[str]) -> list[str]:
    """The ops that a call of a public function with these arguments runs forward, in order, on a backend that has
    those in covered."""
    has_memory = given.get("mem_q") is not None
    if function == "delta_scan":
        return ["delta_scan_fwd"]
    if function == "delta_scan_with_state_pool":
        return ["delta_scan_with_state_pool"]
    if function == "delta_output":
        return ["delta_output_fwd" if given["out"] is None else "delta_output_out"]
    scan = [] if not has_memory else ["delta_scan_fwd"]
    if function == "fused_delta_attention":
        _, k_changes, v_changes = _prepared(Corrections(*(given[name] for name in Corrections._fields)))
        prep = ["delta_prep_fwd"] if k_changes or v_changes else []
        return [*([SCAN_PREP] if scan and prep and SCAN_PREP in covered else scan + prep), "delta_attention_fwd"]
    if decodes(given["q"], Rows(given["token_mask"], given["cu_seqlens"], given["max_seqlen"] or 0)):
        return ["delta_decode"]
    scan = ["delta_scan_with_state_pool"] if has_memory else []
    append = ["delta_prep_with_kvcache"] if given["k"] is not None else []
    return [*scan, *append, "delta_attention_with_kvcache"]
