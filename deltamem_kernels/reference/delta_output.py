"""The correction behind the output projection:

    y = attn_proj + u (+ residual),     u = delta_o reads     or     u = RMSNorm(delta_o reads) * rms_weight

attn_proj, residual, y [B, T, hidden]; reads [B, T, H, R]; delta_o [hidden, H R]; RMSNorm over hidden.
y is rounded once, to attn_proj's dtype.
"""

import torch
from torch import Tensor

from .delta_prep import rms_norm, rms_norm_bwd
from .precision import compute_dtype, widen, without_autocast


@without_autocast
def delta_output_fwd(
    attn_proj: Tensor,
    reads: Tensor,
    delta_o: Tensor,
    rms_weight: Tensor | None,
    rms_eps: float,
    residual: Tensor | None,
) -> Tensor:
    given = (attn_proj, reads, delta_o, rms_weight, residual)
    x, r, w, weight, skip = widen(compute_dtype(*given), *given)
    u = r.flatten(2) @ w.T
    if weight is not None:
        u = rms_norm(u, weight, rms_eps)
    y = x + u
    return (y if skip is None else y + skip).to(attn_proj.dtype).contiguous()


@without_autocast
def delta_output_bwd(
    dy: Tensor, reads: Tensor, delta_o: Tensor, rms_weight: Tensor | None, rms_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dreads, ddelta_o, drms_weight); attn_proj and residual get dy itself."""
    dtype = compute_dtype(dy, reads, delta_o, rms_weight)
    du, r, w, weight = widen(dtype, dy, reads, delta_o, rms_weight)
    dweight = dy.new_empty(0)
    if weight is not None:
        du, dweight = rms_norm_bwd(du, r.flatten(2) @ w.T, weight, rms_eps)
        dweight = dweight.to(rms_weight.dtype)
    ddelta_o = du.flatten(0, 1).T @ r.flatten(2).flatten(0, 1)
    return (du @ w).reshape(reads.shape), ddelta_o.to(delta_o.dtype), dweight


@torch.no_grad()
def delta_output_out(
    attn_proj: Tensor,
    reads: Tensor,
    delta_o: Tensor,
    rms_weight: Tensor | None,
    rms_eps: float,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    """Into out, which may be attn_proj or residual."""
    out.copy_(delta_output_fwd(attn_proj, reads, delta_o, rms_weight, rms_eps, residual))
