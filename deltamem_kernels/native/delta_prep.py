"""Launchers of the preparation of q, k and v."""

import torch


def delta_prep_fwd(
    kernels,
    q,
    k,
    v,
    reads,
    delta_q,
    delta_k,
    delta_v,
    q_norm_weight,
    k_norm_weight,
    norm_eps,
    rotary_cos,
    rotary_sin,
    rotary_interleaved,
    positions,
    cu_seqlens,
):
    given = next(x for x in (q, k, v) if x is not None)
    results = [given.new_empty((0,) if x is None else x.shape) for x in (q, k, v)]
    kernels.delta_prep_fwd(
        q,
        k,
        v,
        reads,
        delta_q,
        delta_k,
        delta_v,
        q_norm_weight,
        k_norm_weight,
        norm_eps,
        rotary_cos,
        rotary_sin,
        rotary_interleaved,
        positions,
        cu_seqlens,
        *results,
    )
    return tuple(results)


def delta_prep_with_kvcache(
    kernels,
    k,
    v,
    k_cache,
    v_cache,
    reads,
    delta_k,
    delta_v,
    k_norm_weight,
    norm_eps,
    rotary_cos,
    rotary_sin,
    rotary_interleaved,
    positions,
    token_mask,
    cu_seqlens,
    cache_seqlens,
    block_table,
    state_indices,
):
    kernels.delta_prep_with_kvcache(
        k,
        v,
        k_cache,
        v_cache,
        reads,
        delta_k,
        delta_v,
        k_norm_weight,
        norm_eps,
        rotary_cos,
        rotary_sin,
        rotary_interleaved,
        positions,
        token_mask,
        cu_seqlens,
        cache_seqlens,
        block_table,
        state_indices,
    )


def delta_prep_bwd(
    kernels,
    dq_prep,
    dk_prep,
    dv_prep,
    q,
    k,
    v,
    reads,
    delta_q,
    delta_k,
    delta_v,
    q_norm_weight,
    k_norm_weight,
    norm_eps,
    rotary_cos,
    rotary_sin,
    rotary_interleaved,
    positions,
    cu_seqlens,
    rotary_grad,
):
    given = next(x for x in (q, k, v) if x is not None)
    inputs = (q, k, v, reads, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight)
    grads = [None if x is None else x.new_empty(x.shape) for x in inputs]
    per_token = (*given.shape[:2], rotary_cos.shape[-1]) if rotary_grad else (0,)
    tables = [given.new_empty(per_token, dtype=torch.float32) for _ in range(2)]
    kernels.delta_prep_bwd(
        dq_prep,
        dk_prep,
        dv_prep,
        q,
        k,
        v,
        reads,
        delta_q,
        delta_k,
        delta_v,
        q_norm_weight,
        k_norm_weight,
        norm_eps,
        rotary_cos,
        rotary_sin,
        rotary_interleaved,
        positions,
        cu_seqlens,
        *grads,
        *(tables if rotary_grad else (None, None)),
    )
    return (*(given.new_empty((0,)) if x is None else x for x in grads), *tables)
