"""What each differentiable function saves, and which backward ops run. The ops know nothing of autograd.

``direct``: whether the call has a signature (``plans.kernels``).
"""

import torch
from torch.autograd.function import once_differentiable

from deltamem_kernels import fused
from deltamem_kernels.plans import kernels


def _given(grads, inputs):
    """Gradients with None where the input is absent (ops return an empty tensor there)."""
    return [None if x is None else g for g, x in zip(grads, inputs, strict=True)]


def _dense(*cotangents):
    """Cotangents as ops take tensors: of a sum, say, they come expanded along their last dimension."""
    return [g if g is None or g.stride(-1) == 1 else g.contiguous() for g in cotangents]


class DeltaScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, direct, backend, scan, token_mask, cu_seqlens, initial_state, *memory):
        ctx.set_materialize_grads(False)
        reads, final_state, tape = fused.scan_forward(
            kernels(direct, backend), memory, scan, initial_state, token_mask, cu_seqlens, True
        )
        ctx.direct, ctx.backend, ctx.scan = direct, backend, scan
        ctx.save_for_backward(token_mask, cu_seqlens, initial_state, tape, *memory)
        return reads, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, dreads, dfinal_state):
        token_mask, cu_seqlens, initial_state, tape, *memory = ctx.saved_tensors
        if dreads is None and dfinal_state is None:
            return (None,) * 13
        cotangents = _dense(dreads, dfinal_state)
        grads = _scan_grads(ctx, memory, initial_state, token_mask, cu_seqlens, tape, *cotangents)
        return *(None,) * 5, *grads


def _scan_grads(ctx, memory, initial_state, token_mask, cu_seqlens, tape, dreads, dfinal_state):
    """-> gradients of (initial_state, mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias)"""
    mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias = memory
    grads = fused.scan_backward(
        kernels(ctx.direct, ctx.backend),
        memory,
        ctx.scan,
        initial_state,
        token_mask,
        cu_seqlens,
        tape,
        dreads,
        dfinal_state,
    )
    inputs = (mem_q, mem_k, mem_v, beta, lam, initial_state, beta_bias, lam_bias)
    dq, dk, dv, dbeta, dlam, dstate, dbeta_bias, dlam_bias = _given(grads, inputs)
    return dstate, dq, dk, dv, dbeta, dlam, dbeta_bias, dlam_bias


class FusedDeltaAttention(torch.autograd.Function):
    """``memory`` is seven tensors or seven None; scalars of the corrections travel apart from their tensors."""

    @staticmethod
    def forward(
        ctx, direct, backend, scan, norm_eps, rotary_interleaved, softmax, max_seqlen, token_mask, cu_seqlens,
        positions, q, k, v, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight, rotary_cos, rotary_sin,
        initial_state, *memory,
    ):  # fmt: skip
        ctx.set_materialize_grads(False)
        fix = fused.Corrections(
            delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight, norm_eps, rotary_cos, rotary_sin,
            rotary_interleaved, positions,
        )  # fmt: skip
        reads = final_state = tape = None
        if memory[0] is not None:
            reads, final_state, tape = fused.scan_forward(
                kernels(direct, backend), fused.Memory(*memory), scan, initial_state, token_mask, cu_seqlens, True
            )
        rows = fused.Rows(token_mask, cu_seqlens, max_seqlen)
        out, lse, k_prep, v_prep = fused.attention_forward(kernels(direct, backend), q, k, v, reads, fix, rows, softmax)
        ctx.direct, ctx.backend, ctx.scan = direct, backend, scan
        ctx.softmax, ctx.max_seqlen = softmax, max_seqlen
        ctx.norm_eps, ctx.rotary_interleaved = norm_eps, rotary_interleaved
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(
            token_mask, cu_seqlens, positions, q, k, v, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight,
            rotary_cos, rotary_sin, initial_state, k_prep, v_prep, out, lse, reads, tape, *memory,
        )  # fmt: skip
        return out, reads, final_state, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dreads, dfinal_state, dlse):
        (
            token_mask, cu_seqlens, positions, q, k, v, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight,
            rotary_cos, rotary_sin, initial_state, k_prep, v_prep, out, lse, reads, tape, *memory,
        ) = ctx.saved_tensors  # fmt: skip
        dout, dreads, dfinal_state = _dense(dout, dreads, dfinal_state)
        attention_grads = [None] * 11
        if dout is not None:
            fix = fused.Corrections(
                delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight, ctx.norm_eps, rotary_cos, rotary_sin,
                ctx.rotary_interleaved, positions,
            )  # fmt: skip
            rows = fused.Rows(token_mask, cu_seqlens, ctx.max_seqlen)
            attention_grads = fused.attention_backward(
                kernels(ctx.direct, ctx.backend), dout, q, k, v, k_prep, v_prep, reads, fix, rows, ctx.softmax, out, lse
            )
        dq, dk, dv, dreads_prep, *dfix = attention_grads
        if dreads_prep is not None:
            dreads = dreads_prep if dreads is None else dreads + dreads_prep
        scan_grads = [None] * 8
        if dreads is not None or dfinal_state is not None:
            scan_grads = _scan_grads(ctx, memory, initial_state, token_mask, cu_seqlens, tape, dreads, dfinal_state)
        return (*[None] * 10, dq, dk, dv, *dfix, *scan_grads)


class DeltaOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, direct, backend, rms_eps, attn_proj, reads, delta_o, rms_weight, residual):
        ctx.direct, ctx.backend, ctx.rms_eps = direct, backend, rms_eps
        ctx.save_for_backward(reads, delta_o, rms_weight)
        return kernels(direct, backend)["delta_output_fwd"](attn_proj, reads, delta_o, rms_weight, rms_eps, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        reads, delta_o, rms_weight = ctx.saved_tensors
        (dy,) = _dense(dy)
        grads = kernels(ctx.direct, ctx.backend)["delta_output_bwd"](dy, reads, delta_o, rms_weight, ctx.rms_eps)
        dreads, ddelta_o, drms_weight = _given(grads, (reads, delta_o, rms_weight))
        dresidual = dy if ctx.needs_input_grad[7] else None
        return None, None, None, dy, dreads, ddelta_o, drms_weight, dresidual
