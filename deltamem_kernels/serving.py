"""The public functions that advance caches and state pools in place: what an engine calls at every step.

They allocate results only, wait for no device, and decide nothing on the host from lengths.
"""

import torch

from deltamem_kernels import debug, fused, plans, validation
from deltamem_kernels.api import FusedDeltaAttentionOutput
from deltamem_kernels.backends import choose
from deltamem_kernels.fused import Cache, Corrections, Memory, Pool, Rows, Scan, Softmax, memory_4d
from deltamem_kernels.ops import state_dtype

Tensor = torch.Tensor


def delta_scan_with_state_pool(
    mem_q: Tensor,
    mem_k: Tensor | None,
    mem_v: Tensor | None,
    beta: Tensor | None,
    lam: Tensor | None = None,
    *,
    state_pool: Tensor,
    state_indices: Tensor | None = None,
    output_state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reads_out: Tensor | None = None,
    update_rule: str = "standard",
    write: bool = True,
    token_mask: Tensor | None = None,
    use_qk_activation_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    beta_bias: Tensor | None = None,
    lam_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``delta_scan`` over a pool of states that advances in place; for engines.

    Args:
        mem_q, mem_k, mem_v, beta, lam, update_rule, write, token_mask, cu_seqlens, use_qk_activation_in_kernel,
            use_gate_in_kernel, beta_bias, lam_bias, backend: As in ``delta_scan``.
        state_pool: ``[P, H, R, R]`` fp32; the inner ``[R, R]`` contiguous. Modified.
        state_indices: int32 ``[N]``, the slot that each row starts from; None: row b uses slot b. An index < 0 is
            padding: the row's reads are 0 and nothing is stored. Active indices must be unique.
        output_state_indices: int32 ``[N]``, the slot of each row's final state, or ``[B, T]``, the slot of the
            state after each token; < 0 stores nothing. None: ``state_indices``.
        has_initial_state: bool ``[N]``. False: the row starts from zero and its slot is not loaded.
        reads_out: ``[B, T, H, R]`` fp32 to hold the result.

    Returns:
        reads ``[B, T, H, R]`` fp32 (``reads_out`` itself when given).

    Raises:
        As ``delta_scan``; and RuntimeError when an input requires grad in grad mode.
    """
    name = "delta_scan_with_state_pool"
    memory = (mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias)
    pool = Pool(state_pool, state_indices, output_state_indices, has_initial_state)
    tensors = (*memory, *pool, token_mask, cu_seqlens, reads_out)
    scan = Scan(update_rule, write, use_qk_activation_in_kernel, use_gate_in_kernel)
    key, plan = plans.find(name, tensors, (*scan, backend))
    if plan is None:
        plan = _plan_scan(name, memory, pool, token_mask, cu_seqlens, reads_out, scan, backend)
        plans.remember(key, plan)
    validation.inference_only(name, "delta_scan", *memory, state_pool, reads_out)
    if debug.ENABLED:
        debug.pool_call(name, mem_q, cu_seqlens, pool)
    reads = mem_q.new_empty(plan.sizes, dtype=state_dtype(mem_q)) if reads_out is None else reads_out
    memory = Memory(*memory_4d(*memory[:5]), beta_bias, lam_bias)
    fused.scan_with_state_pool(
        plans.kernels(key is not None, plan.backend), memory, scan, pool, token_mask, cu_seqlens, reads
    )
    return reads


def _plan_scan(name, memory, pool, token_mask, cu_seqlens, reads_out, scan, backend):
    mem_q = memory[0]
    B, T, H, R = validation.memory(name, *memory, scan)
    N = validation.rows(name, B, T, token_mask, cu_seqlens, mem_q)
    validation.state_pool(name, *pool, B, T, N, H, R, mem_q)
    validation.result(name, "reads_out", reads_out, (B, T, H, R), state_dtype(mem_q), mem_q)
    return plans.Plan(choose(name, backend, mem_q, R), (B, T, H, R))


def fused_delta_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    mem_q: Tensor | None = None,
    mem_k: Tensor | None = None,
    mem_v: Tensor | None = None,
    beta: Tensor | None = None,
    lam: Tensor | None = None,
    initial_state: Tensor | None = None,
    delta_q: Tensor | None = None,
    delta_k: Tensor | None = None,
    delta_v: Tensor | None = None,
    update_rule: str = "standard",
    write: bool = True,
    token_mask: Tensor | None = None,
    use_qk_activation_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    beta_bias: Tensor | None = None,
    lam_bias: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    positions: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    state_pool: Tensor | None = None,
    state_indices: Tensor | None = None,
    output_state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    num_splits: int = 0,
    out: Tensor | None = None,
    reads_out: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    backend: str = "auto",
) -> FusedDeltaAttentionOutput:
    """``fused_delta_attention`` of new tokens over a KV cache and a state pool, which advance in place.

    Any number of new tokens T >= 1: a decode step, a draft, a chunk of a prompt; ragged by ``cu_seqlens`` or by a
    ``token_mask`` over the tails. New keys and values are corrected, normed, rotated and stored at slots
    ``cache_seqlens + i``; then the queries attend to every filled slot. Token i of a row stands at that slot, which
    is its RoPE position and its place in causal masks and windows. The caller advances ``cache_seqlens``.

    Args:
        q: Raw query projections ``[B, T, HQ, D]``.
        k_cache, v_cache: ``[B, S, HKV, D]``, or pages ``[pages, page_size, HKV, D]`` with ``block_table``; q's
            dtype. Modified when k and v are given.
        k, v: New raw projections ``[B, T, HKV, D]``; None: the row's last T keys are in the cache already,
            prepared, and norm and RoPE act on q alone, at slots ``cache_seqlens - T + i``.
        mem_q, mem_k, mem_v, beta, lam, delta_q, delta_k, delta_v, update_rule, write, use_qk_activation_in_kernel,
            use_gate_in_kernel, beta_bias, lam_bias, q_norm_weight, k_norm_weight, norm_eps, rotary_cos, rotary_sin,
            rotary_interleaved, positions, softmax_scale, causal, window_size, softcap: As in
            ``fused_delta_attention``.
        initial_state: Must be None: the state is in the pool.
        token_mask: bool ``[B, T]``; may mask only the tail of a row, which is then not appended.
        state_pool, state_indices, output_state_indices, has_initial_state: As in ``delta_scan_with_state_pool``.
            A row with ``state_indices`` < 0 is padding: out and reads 0, cache untouched.
        cache_seqlens: int32 ``[B]`` (packed: ``[N]``), slots filled before this call, left padding included. None:
            every slot is filled (k None, no ``block_table``).
        cache_leftpad: int32, leading slots of each row that hold nothing.
        block_table: int32 ``[B or N, max_pages]``, the page of each ``page_size`` slots.
        cu_seqlens: int32 ``[N + 1]``: the new tokens of N rows packed into one (B = 1).
        max_seqlen: The most new tokens of a row, where the host knows it.
        num_splits: Parts that a row's keys are cut into. 0: the backend picks; n >= 1: a row's bits do not depend
            on its neighbours.
        out, reads_out: Hold the results, ``[B, T, HQ, D]`` and ``[B, T, H, R]`` fp32.
        k_descale, v_descale: Reserved for fp8 caches; must be None.
        backend: ``auto``, or ``reference``, ``cpu``, ``triton``, ``cuda``, which runs or raises.

    Returns:
        out, reads (None without memory), final_state None, lse ``[B, HQ, T]`` fp32.

    Raises:
        As ``delta_scan``; and RuntimeError when an input requires grad in grad mode.
    """
    name = "fused_delta_attention_with_kvcache"
    if k_descale is not None or v_descale is not None:
        raise NotImplementedError(f"{name}: k_descale and v_descale must be None (no backend covers fp8), got a tensor")
    memory = (mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias)
    pool = Pool(state_pool, state_indices, output_state_indices, has_initial_state)
    fix = Corrections(
        delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight, norm_eps, rotary_cos, rotary_sin,
        rotary_interleaved, positions,
    )  # fmt: skip
    cache = Cache(cache_seqlens, cache_leftpad, block_table)
    tensors = (
        q, k_cache, v_cache, k, v, *memory, initial_state, *pool, delta_q, delta_k, delta_v, q_norm_weight,
        k_norm_weight, rotary_cos, rotary_sin, positions, token_mask, cu_seqlens, *cache, out, reads_out,
    )  # fmt: skip
    scan = Scan(update_rule, write, use_qk_activation_in_kernel, use_gate_in_kernel)
    softmax = (softmax_scale, causal, tuple(window_size), softcap, max_seqlen)
    key, plan = plans.find(name, tensors, (*scan, *softmax, num_splits, backend))
    if plan is None:
        plan = _plan_attention(*tensors, scan, softmax, num_splits, backend)
        plans.remember(key, plan)
    validation.inference_only(name, "fused_delta_attention", *tensors)
    rows = Rows(token_mask, cu_seqlens, max_seqlen or 0)
    if cache_seqlens is None:
        filled = torch.full((q.shape[0],), k_cache.shape[1], dtype=torch.int32, device=q.device)
        cache = cache._replace(cache_seqlens=filled)
    if debug.ENABLED:
        debug.kvcache_call(name, q, k, k_cache, cache, rows, pool, positions, rotary_cos)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    softmax = Softmax(scale, causal, *window_size, softcap)
    dtype = state_dtype(q)
    out = q.new_empty(q.shape) if out is None else out
    lse = q.new_empty(plan.sizes[0], dtype=dtype)
    reads = reads_out
    if mem_q is None:
        memory = None
    else:
        memory = Memory(*memory_4d(*memory[:5]), beta_bias, lam_bias)
        reads = q.new_empty(plan.sizes[1], dtype=dtype) if reads is None else reads
    fused.attention_with_kvcache(
        plans.kernels(key is not None, plan.backend), q, k_cache, v_cache, k, v, memory, scan, pool, fix, rows, cache,
        softmax, num_splits, out, reads, lse,
    )  # fmt: skip
    return FusedDeltaAttentionOutput(out, reads, None, lse)


def _plan_attention(
    q, k_cache, v_cache, k, v, mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, initial_state, state_pool,
    state_indices, output_state_indices, has_initial_state, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight,
    rotary_cos, rotary_sin, positions, token_mask, cu_seqlens, cache_seqlens, cache_leftpad, block_table, out,
    reads_out, scan, softmax, num_splits, backend,
):  # fmt: skip
    name = "fused_delta_attention_with_kvcache"
    if initial_state is not None:
        raise ValueError(f"{name}: initial_state must be None with a cache (state_pool holds the state), got a tensor")
    B, T = validation.queries(name, q)
    N = validation.rows(name, B, T, token_mask, cu_seqlens, q)
    HKV = validation.cache(name, q, k_cache, v_cache, k, v, cache_seqlens, cache_leftpad, block_table, state_indices, N)
    H, R = 0, 1
    if mem_q is None:
        validation.no_memory(
            name, mem_k=mem_k, mem_v=mem_v, beta=beta, lam=lam, delta_q=delta_q, delta_k=delta_k, delta_v=delta_v,
            beta_bias=beta_bias, lam_bias=lam_bias, state_pool=state_pool, reads_out=reads_out,
            output_state_indices=output_state_indices, has_initial_state=has_initial_state,
        )  # fmt: skip
    else:
        H, R = validation.memory(name, mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias, scan)[2:]
        validation.same_tokens(name, q, mem_q)
        validation.state_pool(
            name, state_pool, state_indices, output_state_indices, has_initial_state, B, T, N, H, R, q
        )
        validation.result(name, "reads_out", reads_out, (B, T, H, R), state_dtype(q), q)
    validation.corrections(name, q, HKV, H * R, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight)
    validation.rotary(name, q, rotary_cos, rotary_sin, positions, 0)
    validation.softmax(name, *softmax)
    validation.num_splits(name, num_splits)
    validation.result(name, "out", out, q.shape, q.dtype, q)
    return plans.Plan(choose(name, backend, q, R), ((B, q.shape[2], T), (B, T, H, R)))
