"""Launchers of the correction behind the output projection."""

import torch

from deltamem_kernels import _cpu


def delta_output_fwd(attn_proj, reads, delta_o, rms_weight, rms_eps, residual):
    y = attn_proj.new_empty(attn_proj.shape)
    delta_output_out(attn_proj, reads, delta_o, rms_weight, rms_eps, residual, y)
    return y


def delta_output_out(attn_proj, reads, delta_o, rms_weight, rms_eps, residual, out):
    _cpu.delta_output_fwd(attn_proj, reads, delta_o, rms_weight, rms_eps, residual, out, torch.get_num_threads())


def delta_output_bwd(dy, reads, delta_o, rms_weight, rms_eps):
    dreads = reads.new_empty(reads.shape)
    ddelta_o = delta_o.new_empty(delta_o.shape)
    drms_weight = None if rms_weight is None else rms_weight.new_empty(rms_weight.shape)
    _cpu.delta_output_bwd(
        dy, reads, delta_o, rms_weight, rms_eps, dreads, ddelta_o, drms_weight, torch.get_num_threads()
    )
    return dreads, ddelta_o, dy.new_empty((0,)) if drms_weight is None else drms_weight
