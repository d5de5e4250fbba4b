"""What happens to a raw projection x [B, T, heads, D] before attention, rounded once at the end:

    x' = RoPE(RMSNorm(x + delta_x reads)),     RMSNorm(x) = x / sqrt(mean(x^2) + eps) * weight over D

A step without operands is skipped; v is only corrected. RoPE turns pairs of the first rotary_dim channels by
the angle of the token's position, (a, b) -> (a cos - b sin, b cos + a sin), pairing halves (NeoX) or
neighbours (interleaved). Its reverse is the turn by the opposite angle.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .delta_scan import delta_scan_fwd
from .precision import compute_dtype, widen, without_autocast
from .rows import cached_spans, covered, slot_index, slot_positions, spans


class Rotary(NamedTuple):
    """The tables at every token, [B, T, rotary_dim/2]."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


def gather_rotary(
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, at: Tensor, dtype: torch.dtype
) -> Rotary | None:
    """Tables [S, rotary_dim/2] at positions `at` [B, T]; three-dimensional ones are gathered already."""
    if cos is None:
        return None
    cos, sin = widen(dtype, cos, sin)
    return Rotary(cos, sin, interleaved) if cos.dim() == 3 else Rotary(cos[at], sin[at], interleaved)


def split_pairs(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """(a, b), each [B, T, heads, rotary_dim/2]."""
    if interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    cos, sin = rotary.cos[:, :, None], rotary.sin[:, :, None]  # the same for all heads
    half = cos.shape[-1]
    a, b = split_pairs(x, half, rotary.interleaved)
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((a, b), -1).flatten(-2) if rotary.interleaved else torch.cat((a, b), -1)
    return torch.cat((turned, x[..., 2 * half :]), -1)


def rotate_bwd(dy: Tensor, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dcos, dsin); the tables' gradients [B, T, rotary_dim/2] are summed over the heads."""
    half = rotary.cos.shape[-1]
    a, b = split_pairs(x, half, rotary.interleaved)
    da, db = split_pairs(dy, half, rotary.interleaved)
    return rotate(dy, rotary._replace(sin=-rotary.sin)), (da * a + db * b).sum(2), (db * a - da * b).sum(2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rms_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(dx, dweight)."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed = x * scale
    dnormed = dy * weight
    dx = scale * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    return dx, (dy * normed).flatten(0, -2).sum(0)


def correct(x: Tensor, reads: Tensor | None, delta: Tensor | None) -> Tensor:
    """x + delta reads; delta [heads D, H R]."""
    return x if delta is None else x + (reads.flatten(2) @ delta.T).unflatten(-1, x.shape[2:])


def clean(x: Tensor | None, live: Tensor, dtype: torch.dtype) -> Tensor | None:
    """x [B, T, ., .] in the arithmetic's dtype; what dead tokens hold (NaN, even) is 0."""
    return None if x is None else x.to(dtype).masked_fill(~live[:, :, None, None], 0)


def prepare(
    x: Tensor,
    reads: Tensor | None,
    delta: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    rotary: Rotary | None,
    live: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """x' in x's dtype, 0 where live [B, T] is False; everything but x is in the arithmetic's dtype."""
    y = correct(clean(x, live, dtype), clean(reads, live, dtype), delta)
    if norm_weight is not None:
        y = rms_norm(y, norm_weight, norm_eps)
    if rotary is not None:
        y = rotate(y, rotary)
    return clean(y, live, dtype).to(x.dtype).contiguous()


def prepare_bwd(
    dy: Tensor | None,
    x: Tensor,
    reads: Tensor | None,
    delta: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    rotary: Rotary | None,
    live: Tensor,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Gradients of prepare by the names of its arguments, and of the tables cos, sin: those there are."""
    x, reads = clean(x, live, dtype), clean(reads, live, dtype)
    corrected = correct(x, reads, delta)
    normed = corrected if norm_weight is None else rms_norm(corrected, norm_weight, norm_eps)
    grad = torch.zeros_like(x) if dy is None else clean(dy, live, dtype)
    grads = {}
    if rotary is not None:
        grad, grads["cos"], grads["sin"] = rotate_bwd(grad, normed, rotary)
    if norm_weight is not None:
        grad, grads["norm_weight"] = rms_norm_bwd(grad, corrected, norm_weight, norm_eps)
    grads["x"] = grad
    if delta is not None:
        grads["reads"] = (grad.flatten(2) @ delta).reshape(reads.shape)
        grads["delta"] = grad.flatten(2).flatten(0, 1).T @ reads.flatten(2).flatten(0, 1)
    return grads


def token_positions(x: Tensor, given: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(position, live), both [B, T]: by default a token is at its index in its row."""
    batch, tokens = x.shape[:2]
    found = spans(batch, tokens, cu_seqlens)
    live = covered(found, batch, tokens, x.device)
    if given is not None:
        return torch.where(live, given.long(), 0), live
    return slot_positions(found, [0] * len(found), batch, tokens, x.device), live


@without_autocast
def delta_prep_fwd(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    reads: Tensor | None,
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
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q', k', v' of those given; an absent one stays absent (empty)."""
    some = next(x for x in (q, k, v) if x is not None)
    weights = (reads, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight)
    dtype = compute_dtype(q, k, v, *weights, rotary_cos, rotary_sin)
    reads, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight = widen(dtype, *weights)
    at, live = token_positions(some, positions, cu_seqlens)
    rotary = gather_rotary(rotary_cos, rotary_sin, rotary_interleaved, at, dtype)
    jobs = (
        (q, delta_q, q_norm_weight, rotary),
        (k, delta_k, k_norm_weight, rotary),
        (v, delta_v, None, None),
    )
    return tuple(
        some.new_empty(0) if x is None else prepare(x, reads, delta, weight, norm_eps, turn, live, dtype)
        for x, delta, weight, turn in jobs
    )


@without_autocast
def delta_scan_prep_fwd(
    mem_q: Tensor,
    mem_k: Tensor | None,
    mem_v: Tensor | None,
    beta: Tensor | None,
    lam: Tensor | None,
    initial_state: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    beta_bias: Tensor | None,
    lam_bias: Tensor | None,
    update_rule: str,
    write: bool,
    use_qk_activation_in_kernel: bool,
    use_gate_in_kernel: bool,
    segment_len: int,
    save_tape: bool,
    k: Tensor | None,
    v: Tensor | None,
    delta_k: Tensor | None,
    delta_v: Tensor | None,
    k_norm_weight: Tensor | None,
    norm_eps: float,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    positions: Tensor | None,
) -> tuple[Tensor, ...]:
    """The scan's results, then k', v' corrected by its reads."""
    reads, final_state, tape = delta_scan_fwd(
        mem_q, mem_k, mem_v, beta, lam, initial_state, token_mask, cu_seqlens, beta_bias, lam_bias, update_rule, write,
        use_qk_activation_in_kernel, use_gate_in_kernel, segment_len, save_tape,
    )  # fmt: skip
    _, k_prep, v_prep = delta_prep_fwd(
        None, k, v, reads, None, delta_k, delta_v, None, k_norm_weight, norm_eps,
        rotary_cos, rotary_sin, rotary_interleaved, positions, cu_seqlens,
    )  # fmt: skip
    return reads, final_state, tape, k_prep, v_prep


@without_autocast
def delta_prep_bwd(
    dq_prep: Tensor | None,
    dk_prep: Tensor | None,
    dv_prep: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    reads: Tensor | None,
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
    cu_seqlens: Tensor | None,
    rotary_grad: bool,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, reads, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight and the tables.

    Those of rotary_cos, rotary_sin are per token [B, T, rotary_dim/2], summed over the heads of q and k.
    """
    some = next(x for x in (q, k, v) if x is not None)
    given = (reads, delta_q, delta_k, delta_v, q_norm_weight, k_norm_weight)
    dtype = compute_dtype(q, k, v, *given, rotary_cos, rotary_sin)
    wide = widen(dtype, *given)
    at, live = token_positions(some, positions, cu_seqlens)
    rotary = gather_rotary(rotary_cos, rotary_sin, rotary_interleaved, at, dtype)
    jobs = {
        "q": (dq_prep, q, wide[0], wide[1], wide[4], norm_eps, rotary),
        "k": (dk_prep, k, wide[0], wide[2], wide[5], norm_eps, rotary),
        "v": (dv_prep, v, wide[0], wide[3], None, norm_eps, None),
    }
    grads = {name: {} if job[1] is None else prepare_bwd(*job, live, dtype) for name, job in jobs.items()}

    def result(grad: Tensor | None, like: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        if like is None:
            return some.new_empty(0, dtype=dtype)
        return (torch.zeros_like(like) if grad is None else grad).to(dtype or like.dtype).contiguous()

    def total(name: str) -> Tensor | None:
        parts = [g[name] for g in grads.values() if name in g]
        return sum(parts) if parts else None

    table = rotary.cos if rotary_grad and rotary is not None else None
    return (
        *(result(grads[name].get("x"), x) for name, x in (("q", q), ("k", k), ("v", v))),
        result(total("reads"), reads),
        *(result(grads[name].get("delta"), w) for name, w in zip("qkv", given[1:4], strict=True)),
        *(result(grads[name].get("norm_weight"), w) for name, w in zip("qk", given[4:], strict=True)),
        result(total("cos"), table, dtype),
        result(total("sin"), table, dtype),
    )


@without_autocast
@torch.no_grad()
def delta_prep_with_kvcache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    reads: Tensor | None,
    delta_k: Tensor | None,
    delta_v: Tensor | None,
    k_norm_weight: Tensor | None,
    norm_eps: float,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    positions: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    state_indices: Tensor | None,
) -> None:
    """Stores k', v' of token i of row b at slot cache_seqlens[b] + i: its position, too, unless given."""
    weights = (reads, delta_k, delta_v, k_norm_weight)
    dtype = compute_dtype(k, v, *weights, rotary_cos, rotary_sin)
    reads, delta_k, delta_v, k_norm_weight = widen(dtype, *weights)
    batch, tokens = k.shape[:2]
    found = cached_spans(batch, tokens, token_mask, cu_seqlens, state_indices)
    live = covered(found, batch, tokens, k.device)
    slots = slot_positions(found, cache_seqlens.tolist(), batch, tokens, k.device)
    at = slots if positions is None else torch.where(live, positions.long(), 0)
    rotary = gather_rotary(rotary_cos, rotary_sin, rotary_interleaved, at, dtype)
    k_prep = prepare(k, reads, delta_k, k_norm_weight, norm_eps, rotary, live, dtype)
    v_prep = prepare(v, reads, delta_v, None, norm_eps, None, live, dtype)
    for span in found:
        where = slot_index(k_cache, block_table, span.row, slots[span.tokens])
        k_cache[where] = k_prep[span.tokens].to(k_cache.dtype)
        v_cache[where] = v_prep[span.tokens].to(v_cache.dtype)
