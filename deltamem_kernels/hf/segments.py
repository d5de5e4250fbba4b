"""One write per message or sentence."""

import torch

from deltamem_kernels.hf.memory import Projected

Tensor = torch.Tensor


def segment_writes(projected: Projected, segments: Tensor, token_mask: Tensor | None) -> tuple[Projected, Tensor]:
    """Projections of the mean token of each segment, in the order of the segments' ids.

        x_m = mean of x over the tokens of segment m:  W x_m = mean of W x

    Args:
        projected: Raw projections of the tokens, ``[B, T, H, R or 1]``.
        segments: ``[B, T]`` integers, the tokens' segments; < 0: not written.
        token_mask: ``[B, T]`` bool; masked tokens are not written.

    Returns:
        The means, of the same shapes, first segment first, and a bool ``[B, T]`` mask of those that are.
    """
    B, T = segments.shape
    ids = segments if token_mask is None else segments.masked_fill(~token_mask, -1)
    # A token's slot is the number of smaller ids in its row; tokens without a segment go to slot T.
    order = ids.sort(dim=1)
    starts = torch.ones_like(order.values, dtype=torch.bool)
    starts[:, 1:] = order.values[:, 1:] != order.values[:, :-1]
    ranks = ((starts & (order.values >= 0)).cumsum(1) - 1).masked_fill(order.values < 0, T)
    slots = torch.empty_like(ranks).scatter_(1, order.indices, ranks)
    counts = torch.zeros(B, T + 1, device=ids.device).scatter_add_(1, slots, torch.ones_like(slots, dtype=torch.float))

    def mean(x):
        if x is None:
            return None
        flat = x.flatten(2).float()
        sums = flat.new_zeros(B, T + 1, flat.shape[2]).scatter_add(1, slots.unsqueeze(2).expand_as(flat), flat)
        return (sums / counts.clamp_min(1).unsqueeze(2))[:, :T].unflatten(2, x.shape[2:])

    return Projected(*map(mean, projected)), counts[:, :T] > 0


def reads_and_writes(call, projected: Projected, token_mask: Tensor | None):
    """-> projections of the attention's call, which alone reads where segments are written; those of the write with
    their mask."""
    if not call.writes_segments:
        return projected, projected, token_mask
    means, written = segment_writes(projected, call.segments(projected.mem_q.device), token_mask)
    return projected._replace(mem_k=None, mem_v=None, beta=None, lam=None), means, written
