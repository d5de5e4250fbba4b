"""A few tokens per row through the whole layer: read and advance the state, append k' and v', attend.

The chain itself; a backend that runs it as one kernel must give the same.
"""

from torch import Tensor

from .delta_attention import delta_attention_with_kvcache
from .delta_prep import delta_prep_with_kvcache
from .delta_scan import delta_scan_with_state_pool


def delta_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    mem_q: Tensor | None,
    mem_k: Tensor | None,
    mem_v: Tensor | None,
    beta: Tensor | None,
    lam: Tensor | None,
    state_pool: Tensor | None,
    state_indices: Tensor | None,
    output_state_indices: Tensor | None,
    has_initial_state: Tensor | None,
    beta_bias: Tensor | None,
    lam_bias: Tensor | None,
    update_rule: str,
    write: bool,
    use_qk_activation_in_kernel: bool,
    use_gate_in_kernel: bool,
    delta_q: Tensor | None,
    delta_k: Tensor | None,
    delta_v: Tensor | None,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    norm_eps: float,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    positions: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    cache_seqlens: Tensor,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    num_splits: int,
    out: Tensor,
    reads: Tensor | None,
    lse: Tensor,
) -> None:
    """Fills out, lse and, given mem_q, reads. state_pool and, given k and v, the caches advance in place."""
    rotary = (rotary_cos, rotary_sin, rotary_interleaved, positions)
    if mem_q is not None:
        delta_scan_with_state_pool(
            *(
                mem_q,
                mem_k,
                mem_v,
                beta,
                lam,
                state_pool,
                state_indices,
                output_state_indices,
                has_initial_state,
            ),
            *(token_mask, cu_seqlens, beta_bias, lam_bias, update_rule, write),
            *(use_qk_activation_in_kernel, use_gate_in_kernel, reads),
        )
    if k is not None:
        delta_prep_with_kvcache(
            *(k, v, k_cache, v_cache, reads, delta_k, delta_v, k_norm_weight, norm_eps, *rotary),
            *(token_mask, cu_seqlens, cache_seqlens, block_table, state_indices),
        )
    delta_attention_with_kvcache(
        *(
            q,
            k_cache,
            v_cache,
            reads,
            delta_q,
            q_norm_weight,
            norm_eps,
            *rotary,
            token_mask,
            cu_seqlens,
            max_seqlen,
        ),
        *(cache_seqlens, cache_leftpad, block_table, state_indices, k is not None),
        *(softmax_scale, causal, window_left, window_right, softcap, num_splits, out, lse),
    )
