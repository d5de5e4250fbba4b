"""Launchers of the correction behind the output projection."""


def delta_output_fwd(kernels, attn_proj, reads, delta_o, rms_weight, rms_eps, residual):
    y = attn_proj.new_empty(attn_proj.shape)
    delta_output_out(kernels, attn_proj, reads, delta_o, rms_weight, rms_eps, residual, y)
    return y


def delta_output_out(kernels, attn_proj, reads, delta_o, rms_weight, rms_eps, residual, out):
    kernels.delta_output_fwd(attn_proj, reads, delta_o, rms_weight, rms_eps, residual, out)


def delta_output_bwd(kernels, dy, reads, delta_o, rms_weight, rms_eps):
    dreads = reads.new_empty(reads.shape)
    ddelta_o = delta_o.new_empty(delta_o.shape)
    drms_weight = None if rms_weight is None else rms_weight.new_empty(rms_weight.shape)
    kernels.delta_output_bwd(dy, reads, delta_o, rms_weight, rms_eps, dreads, ddelta_o, drms_weight)
    return dreads, ddelta_o, dy.new_empty((0,)) if drms_weight is None else drms_weight
