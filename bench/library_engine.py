"""A library's attention behind this package's scan and preparation: an engine that ``auto`` may take where it is the
faster one. It trains."""

import eager
import torch

from deltamem_kernels import delta_scan, fused, ops

SCAN_ARGUMENTS = ("mem_q", "mem_k", "mem_v", "beta", "beta_bias", "use_qk_activation_in_kernel", "use_gate_in_kernel")
WEIGHTS = ("delta_q", "q_norm_weight", "k_norm_weight", "rotary_cos", "rotary_sin")


class Prepare(torch.autograd.Function):
    """q and k as attention takes them; no gradients of the rotary tables."""

    @staticmethod
    def forward(ctx, backend, q, k, reads, *weights):
        ctx.backend = backend
        ctx.save_for_backward(q, k, reads, *weights)
        return fused.prepare(ops.LAUNCHERS[backend], q, k, None, reads, _corrections(*weights), None)[:2]

    @staticmethod
    def backward(ctx, dq, dk):
        q, k, reads, *weights = ctx.saved_tensors
        dq, dk, _, dreads, ddelta_q, _, _, dq_norm, dk_norm, *_ = ops.LAUNCHERS[ctx.backend]["delta_prep_bwd"](
            dq, dk, None, q, k, None, reads, *_corrections(*weights), None, False
        )
        of_memory = (None, None) if reads is None else (dreads, ddelta_q)
        return None, dq, dk, *of_memory, dq_norm, dk_norm, None, None


def _corrections(delta_q, q_norm_weight, k_norm_weight, cos, sin):
    return fused.Corrections(delta_q, None, None, q_norm_weight, k_norm_weight, eager.NORM_EPS, cos, sin, False, None)


def prepared_attention(backend, attention, layer, memory):
    """One layer of eager.random_layer. -> out [B, T, HQ, D], reads (None without memory)"""
    given = eager.kernel_arguments(layer, memory)
    reads = delta_scan(**{name: given[name] for name in SCAN_ARGUMENTS}, backend=backend).reads if memory else None
    weights = (given.get(name) for name in WEIGHTS)
    q, k = Prepare.apply(backend, layer["q"], layer["k"], reads, *weights)
    return attention(q, k, layer["v"]), reads
