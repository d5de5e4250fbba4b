"""Softmax attention, row by row, on queries prepared as q' = RoPE(RMSNorm(q + delta_q reads)):

    s = (q' . k) scale      s = softcap tanh(s / softcap) where softcap > 0      lse = log sum_visible exp(s)
    out = sum_visible exp(s - lse) v

Query head h uses kv head h // (HQ / HKV). A query at slot p sees the keys at slots p - left .. p + right (-1:
unbounded), of which causal leaves those up to p. One that sees no key gives out 0 and lse -inf.
"""

import torch
from torch import Tensor

from .delta_prep import clean, gather_rotary, prepare, token_positions
from .precision import compute_dtype, widen, without_autocast
from .rows import cached_spans, covered, slot_index, slot_positions, spans


def visible(queries: Tensor, keys: Tensor, causal: bool, left: int, right: int) -> Tensor:
    """bool [Tq, Tk] from the slots of the queries [Tq] and the keys [Tk]."""
    ahead = keys - queries[:, None]
    sees = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        right = 0
    if left >= 0:
        sees = sees & (ahead >= -left)
    if right >= 0:
        sees = sees & (ahead <= right)
    return sees


def grouped(q: Tensor, kv_heads: int) -> Tensor:
    """[Tq, HQ, D] -> [Tq, HKV, G, D]: query heads beside the kv head that they use."""
    return q.unflatten(1, (kv_heads, q.shape[1] // kv_heads))


def scores(q: Tensor, k: Tensor, softmax_scale: float, softcap: float) -> Tensor:
    """[HKV, G, Tq, Tk] from q [Tq, HKV, G, D], k [Tk, HKV, D]."""
    s = torch.einsum("ihgd,jhd->hgij", q, k) * softmax_scale
    return softcap * torch.tanh(s / softcap) if softcap > 0 else s


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, softmax_scale: float, softcap: float):
    """(out [Tq, HQ, D], lse [HQ, Tq]) of one row."""
    s = scores(grouped(q, k.shape[1]), k, softmax_scale, softcap)
    blind = ~sees.any(-1, keepdim=True)  # [Tq, 1]; finite scores keep their softmax, and its gradient, defined
    s = s.masked_fill(~sees, -torch.inf).masked_fill(blind, 0)
    lse = torch.logsumexp(s, -1, keepdim=True)
    out = torch.einsum("hgij,jhd->ihgd", torch.exp(s - lse), v).flatten(1, 2)
    return out.masked_fill(blind[..., None], 0), lse.masked_fill(blind, -torch.inf).flatten(0, 1)[..., 0]


def attend_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sees: Tensor,
    softmax_scale: float,
    softcap,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one row, from P = exp(s - lse) and delta = dout . out:

    dv = P^T dout     ds = scale P (dout v^T - delta) (1 - (s / softcap)^2)     dq = ds k     dk = ds^T q
    """
    kv_heads = k.shape[1]
    q, dout, out = (grouped(x, kv_heads) for x in (q, dout, out))
    s = scores(q, k, softmax_scale, softcap)
    lse = lse.unflatten(0, s.shape[:2])[..., None]
    p = torch.exp(s - lse).masked_fill(~sees, 0)
    delta = torch.einsum("ihgd,ihgd->hgi", dout, out)[..., None]
    ds = p * (torch.einsum("ihgd,jhd->hgij", dout, v) - delta) * softmax_scale
    if softcap > 0:
        ds = ds * (1 - (s / softcap) ** 2)
    dq = torch.einsum("hgij,jhd->ihgd", ds, k).flatten(1, 2)
    return dq, torch.einsum("hgij,ihgd->jhd", ds, q), torch.einsum("hgij,ihgd->jhd", p, dout)


def live_tokens(q: Tensor, token_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """bool [B, T]: a token of a row that is not masked."""
    inside = covered(spans(*q.shape[:2], cu_seqlens), *q.shape[:2], q.device)
    return inside if token_mask is None else inside & token_mask


@without_autocast
def delta_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: Tensor | None,
    delta_q: Tensor | None,
    q_norm_weight: Tensor | None,
    norm_eps: float,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    positions: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """out [B, T, HQ, D] and lse [B, HQ, T] over the call's own, prepared, k and v [B, T, HKV, D]."""
    weights = (reads, delta_q, q_norm_weight)
    dtype = compute_dtype(q, k, v, *weights, rotary_cos, rotary_sin)
    live = live_tokens(q, token_mask, cu_seqlens)
    at, _ = token_positions(q, positions, cu_seqlens)
    rotary = gather_rotary(rotary_cos, rotary_sin, rotary_interleaved, torch.where(live, at, 0), dtype)
    q_prep = prepare(q, *widen(dtype, *weights), norm_eps, rotary, live, dtype)

    batch, tokens, heads, _ = q.shape
    wide_q, wide_k, wide_v = (clean(x, live, dtype) for x in (q_prep, k, v))
    out = wide_q.new_zeros(q.shape)
    lse = wide_q.new_full((batch, heads, tokens), -torch.inf)
    for span in spans(batch, tokens, cu_seqlens):
        b, where = span.tokens
        slots = torch.arange(span.length, device=q.device)
        shown = live[b, where]
        sees = visible(slots, slots, causal, window_left, window_right) & shown & shown[:, None]
        out[b, where], lse[b, :, where] = attend(
            wide_q[b, where], wide_k[b, where], wide_v[b, where], sees, softmax_scale, softcap
        )
    return out.to(q.dtype), lse


@without_autocast
def delta_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the prepared q, k, v; dout of masked tokens counts as 0."""
    dtype = compute_dtype(q, k, v, lse)
    live = live_tokens(q, token_mask, cu_seqlens)
    wide = [clean(x, live, dtype) for x in (dout, q, k, v, out)]
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    for span in spans(*q.shape[:2], cu_seqlens):
        b, where = span.tokens
        slots = torch.arange(span.length, device=q.device)
        shown = live[b, where]
        sees = visible(slots, slots, causal, window_left, window_right) & shown & shown[:, None]
        row = [x[b, where] for x in wide]
        dq[b, where], dk[b, where], dv[b, where] = attend_bwd(
            *row, lse[b, :, where].to(dtype), sees, softmax_scale, softcap
        )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@without_autocast
@torch.no_grad()
def delta_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    reads: Tensor | None,
    delta_q: Tensor | None,
    q_norm_weight: Tensor | None,
    norm_eps: float,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    positions: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    cache_seqlens: Tensor,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    state_indices: Tensor | None,
    appended: bool,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    num_splits: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Over a cache. A row's keys fill slots cache_leftpad .. end; its queries are the last slots before end.

    end = cache_seqlens + the row's valid tokens where this call's keys are appended, else cache_seqlens.
    """
    weights = (reads, delta_q, q_norm_weight)
    dtype = compute_dtype(q, k_cache, v_cache, *weights, rotary_cos, rotary_sin)
    batch, tokens = q.shape[:2]
    found = cached_spans(batch, tokens, token_mask, cu_seqlens, state_indices)
    live = covered(found, batch, tokens, q.device)
    first = cache_seqlens.tolist()  # the slot of a row's first query
    if not appended:
        for span in found:
            first[span.row] -= span.length
    hidden = [0] * len(first) if cache_leftpad is None else cache_leftpad.tolist()
    slots = slot_positions(found, first, batch, tokens, q.device)
    # a query before slot 0 sees nothing when causal; its rotation must still be a row of the table
    at = slots.clamp_min(0) if positions is None else torch.where(live, positions.long(), 0)
    rotary = gather_rotary(rotary_cos, rotary_sin, rotary_interleaved, at, dtype)
    q_prep = prepare(q, *widen(dtype, *weights), norm_eps, rotary, live, dtype).to(dtype)

    out.zero_()
    lse.fill_(-torch.inf)
    for span in found:
        b, where = span.tokens
        keys = torch.arange(hidden[span.row], max(hidden[span.row], first[span.row] + span.length), device=q.device)
        index = slot_index(k_cache, block_table, span.row, keys)
        row_out, row_lse = attend(
            q_prep[b, where],
            k_cache[index].to(dtype),
            v_cache[index].to(dtype),
            visible(slots[b, where], keys, causal, window_left, window_right),
            softmax_scale,
            softcap,
        )
        out[b, where] = row_out.to(out.dtype)
        lse[b, :, where] = row_lse
