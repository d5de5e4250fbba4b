"""Launchers of the delta-rule scan's backward.

    reverse maps of segments -> group maps -> every segment from the gradient at its end: scan_reverse

The transition of a token is symmetric, so the reverse map of a segment is the transpose of its forward one; it is
computed again (3 R^3 operations a token, a few microseconds where the segments fill the machine) and not saved.
"""

import torch

from deltamem_kernels.ops import SEGMENT_LEN

from .scan_activation import activation_gradient_kernel
from .scan_build import activated, build_maps, gate_flags
from .scan_plan import BLOCKS, WARP, given, plan, width
from .scan_reverse import reverse_kernel, sum_bias_kernel, sum_states_kernel


def _like(x, mem_q):
    return mem_q.new_empty((0,)) if x is None else x.new_empty(x.shape)


def delta_scan_bwd(
    dreads, dfinal_state, mem_q, mem_k, mem_v, beta, lam, initial_state, token_mask, cu_seqlens, beta_bias, lam_bias,
    update_rule, write, use_qk_activation_in_kernel, use_gate_in_kernel, segment_len, tape,
):  # fmt: skip
    B, T, H, R = mem_q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    inputs = (mem_q, mem_k, mem_v, beta, lam, initial_state, beta_bias, lam_bias)
    grads = [_like(x, mem_q) for x in inputs]
    dq, dk, dv, dbeta, dlam, dstart, dbeta_bias, dlam_bias = (
        None if x is None else grad for x, grad in zip(inputs, grads, strict=True)
    )
    cut = plan(mem_q, beta, lam, cu_seqlens, update_rule, write, segment_len, reverse=True)
    flags = gate_flags(beta, lam, update_rule, use_gate_in_kernel)
    RP, CW = cut.RP, cut.RP // cut.NB
    slots, programs = cut.slots[0], cut.blocks(cut.slots[0], H)
    tape_len = segment_len or SEGMENT_LEN

    def scratch(*shape):
        return mem_q.new_empty(shape, dtype=torch.float32)

    zq, zk, dzq, dzk = mem_q, mem_k if write else None, dq, dk
    if use_qk_activation_in_kernel:
        zq, zk = activated(zq, zk)
        dzq, dzk = (None if x is None else scratch(*x.shape) for x in (dq, dk))
    beta_share, lam_share = (None if x is None else scratch(slots, H, RP) for x in (dbeta_bias, dlam_bias))
    if programs:
        maps = biases = None
        if cut.levels:
            maps, biases = build_maps(
                cut, zq, dreads, zk, beta, lam, beta_bias, lam_bias, token_mask, cu_seqlens, flags, True
            )
        elif not write:
            biases = scratch(slots, H, RP, RP)
        forward, block = BLOCKS[RP]
        checkpoints = scratch(-(-min(tape_len, T) // block), programs * cut.LANES, CW)
        memory = (zk, mem_v, beta, lam) if write else (None,) * 4
        reverse_kernel[(programs,)](
            given(dreads), given(dfinal_state), given(zq), *map(given, memory), given(beta_bias), given(lam_bias),
            given(token_mask), cu_seqlens, given(initial_state), tape, maps, biases, checkpoints,
            dzq, dzk, dv, dbeta, dlam, given(dstart), beta_share, lam_share,
            T, N, H, cut.L, slots, cut.second, cut.third,
            R=R, RP=RP, NB=cut.NB, MAP_SHARED=cut.map_shared, **flags, WRITE=write, TAPE=tape_len,
            LEVELS=cut.levels, G1=cut.group, G2=cut.supergroup, LANES=cut.LANES, F=forward, U=block,
            WQ=width(zq, R, CW), WK=width(zk, R, CW), WS=width(initial_state, R, CW), WF=width(dfinal_state, R, CW),
            WT=width(tape, R, CW), WM=min(CW, 4), num_warps=cut.num_warps, num_stages=1,
        )  # fmt: skip
    if use_qk_activation_in_kernel and mem_q.numel():
        total = B * T * H
        activation_gradient_kernel[(-(-total // WARP),)](
            given(mem_q), given(mem_k), dzq, dzk, dq, dk, given(token_mask), cu_seqlens, T, N, H, total,
            R=R, RP=RP, LANES=WARP, WQ=width(mem_q, R, RP), WK=width(mem_k, R, RP), WZ=width(dzq, R, RP),
            WDQ=width(dq, R, RP), WDK=width(dk, R, RP), num_warps=1, num_stages=1,
        )  # fmt: skip
    if not write and dstart is not None and N:
        sum_states_kernel[(-(-N * H * R * R // 128),)](
            given(dfinal_state), biases, cu_seqlens, given(dstart), T, N, H, cut.L, R=R, RP=RP, LANES=128, num_warps=4
        )
    for share, grad in ((beta_share, dbeta_bias), (lam_share, dlam_bias)):
        if grad is not None:
            sum_bias_kernel[(H,)](share, grad, slots, H, C=grad.shape[-1], RP=RP, BLOCK=max(1, 256 // RP), num_warps=4)
    return tuple(grads)
