"""What each differentiable function saves, and which backward ops run. The ops know nothing of autograd.

``direct``: whether the call has a signature (``plans.kernels``).
"""

import torch
from torch.autograd.function import once_differentiable

from deltamem_kernels import fused
from deltamem_kernels.plans import kernels


def _once(backward):
    """torch's ``once_differentiable``, entered only where a graph of the gradients is asked for: it takes its time."""
    checked = once_differentiable(backward)

    def run(ctx, *cotangents):
        return (checked if torch.is_grad_enabled() else backward)(ctx, *cotangents)

    return run


def _given(grads, inputs):
    """Gradients with None where the input is absent (ops return an empty tensor there, launchers perhaps None)."""
    return [None if x is None else g for g, x in zip(grads, inputs, strict=True)]


def _dense(cotangent):
    """A cotangent as ops take tensors: of a sum, say, it comes expanded along its last dimension."""
    return cotangent if cotangent is None or cotangent.stride(-1) == 1 else cotangent.contiguous()


class DeltaScan(torch.autograd.Function):
    """``call``: (direct, backend, scan), one argument because torch looks at each."""

    @staticmethod
    def forward(ctx, call, token_mask, cu_seqlens, initial_state, *memory):
        ctx.set_materialize_grads(False)
        direct, backend, scan = ctx.call = call
        reads, final_state, tape = fused.scan_forward(
            kernels(direct, backend), memory, scan, initial_state, token_mask, cu_seqlens, True
        )
        ctx.save_for_backward(tape, token_mask, cu_seqlens, initial_state, *memory)
        return reads, final_state

    @staticmethod
    @_once
    def backward(ctx, dreads, dfinal_state):
        if dreads is None and dfinal_state is None:
            return (None,) * 11
        grads = _scan_grads(ctx.call, *ctx.saved_tensors, dreads=_dense(dreads), dfinal_state=_dense(dfinal_state))
        return None, None, None, *grads


def _scan_grads(call, tape, token_mask, cu_seqlens, initial_state, *memory, dreads, dfinal_state):
    """-> gradients of (initial_state, mem_q, mem_k, mem_v, beta, lam, beta_bias, lam_bias)"""
    direct, backend, scan = call
    grads = fused.scan_backward(
        kernels(direct, backend), memory, scan, initial_state, token_mask, cu_seqlens, tape, dreads, dfinal_state
    )
    *tokens, beta_bias, lam_bias = memory
    *dtokens, dstate, dbeta_bias, dlam_bias = _given(grads, (*tokens, initial_state, beta_bias, lam_bias))
    return dstate, *dtokens, dbeta_bias, dlam_bias


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
        rows = fused.Rows(token_mask, cu_seqlens, max_seqlen)
        out, lse, reads, final_state, tape, k_prep, v_prep = fused.attention_forward(
            kernels(direct, backend), q, k, v, None if memory[0] is None else fused.Memory(*memory), scan,
            initial_state, fix, rows, softmax, True,
        )  # fmt: skip
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
    @_once
    def backward(ctx, dout, dreads, dfinal_state, dlse):
        (
            token_mask, cu_seqlens, positions, q, k, v, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight,
            rotary_cos, rotary_sin, initial_state, k_prep, v_prep, out, lse, reads, tape, *memory,
        ) = ctx.saved_tensors  # fmt: skip
        dout, dreads, dfinal_state = _dense(dout), _dense(dreads), _dense(dfinal_state)
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
            scan_grads = _scan_grads(
                (ctx.direct, ctx.backend, ctx.scan), tape, token_mask, cu_seqlens, initial_state, *memory,
                dreads=dreads, dfinal_state=dfinal_state,
            )  # fmt: skip
        return (*[None] * 10, dq, dk, dv, *dfix, *scan_grads)


class DeltaOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, direct, backend, rms_eps, attn_proj, reads, delta_o, rms_weight, residual):
        ctx.direct, ctx.backend, ctx.rms_eps = direct, backend, rms_eps
        ctx.save_for_backward(reads, delta_o, rms_weight)
        return kernels(direct, backend)["delta_output_fwd"](attn_proj, reads, delta_o, rms_weight, rms_eps, residual)

    @staticmethod
    @_once
    def backward(ctx, dy):
        reads, delta_o, rms_weight = ctx.saved_tensors
        dy = _dense(dy)
        grads = kernels(ctx.direct, ctx.backend)["delta_output_bwd"](dy, reads, delta_o, rms_weight, ctx.rms_eps)
        dreads, ddelta_o, drms_weight = _given(grads, (reads, delta_o, rms_weight))
        dresidual = dy if ctx.needs_input_grad[7] else None
        return None, None, None, dy, dreads, ddelta_o, drms_weight, dresidual
