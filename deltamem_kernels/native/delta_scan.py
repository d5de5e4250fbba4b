"""Launchers of the delta-rule scan."""

import torch

from deltamem_kernels.ops import SEGMENT_LEN, tape_shape


def delta_scan_fwd(
    kernels,
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
    update_rule,
    write,
    use_qk_activation_in_kernel,
    use_gate_in_kernel,
    segment_len,
    save_tape,
):
    B, T, H, R = mem_q.shape
    rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    reads = mem_q.new_empty((B, T, H, R), dtype=torch.float32)
    final_state = mem_q.new_empty((rows, H, R, R), dtype=torch.float32)
    tape = mem_q.new_empty(tape_shape(mem_q, cu_seqlens, segment_len) if save_tape else (0,), dtype=torch.float32)
    kernels.delta_scan_fwd(
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
        update_rule,
        write,
        use_qk_activation_in_kernel,
        use_gate_in_kernel,
        segment_len or SEGMENT_LEN,
        reads,
        final_state,
        tape if save_tape else None,
    )
    return reads, final_state, tape


def delta_scan_bwd(
    kernels,
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
    update_rule,
    write,
    use_qk_activation_in_kernel,
    use_gate_in_kernel,
    segment_len,
    tape,
):
    inputs = (mem_q, mem_k, mem_v, beta, lam, initial_state, beta_bias, lam_bias)
    given = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    kernels.delta_scan_bwd(
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
        update_rule,
        write,
        use_qk_activation_in_kernel,
        use_gate_in_kernel,
        segment_len or SEGMENT_LEN,
        tape,
        *given,
    )
    return tuple(given)


def delta_scan_with_state_pool(
    kernels,
    mem_q,
    mem_k,
    mem_v,
    beta,
    lam,
    state_pool,
    state_indices,
    output_state_indices,
    has_initial_state,
    token_mask,
    cu_seqlens,
    beta_bias,
    lam_bias,
    update_rule,
    write,
    use_qk_activation_in_kernel,
    use_gate_in_kernel,
    reads,
):
    kernels.delta_scan_with_state_pool(
        mem_q,
        mem_k,
        mem_v,
        beta,
        lam,
        state_pool,
        state_indices,
        output_state_indices,
        has_initial_state,
        token_mask,
        cu_seqlens,
        beta_bias,
        lam_bias,
        update_rule,
        write,
        use_qk_activation_in_kernel,
        use_gate_in_kernel,
        reads,
    )
