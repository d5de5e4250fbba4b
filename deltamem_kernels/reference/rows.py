"""Which tokens belong to which row, and where a row's slots lie in a cache.

A row is one sequence: entry b of a batch, or tokens cu_seqlens[n] .. cu_seqlens[n + 1] of a packed batch.
Loops take rows as spans. The scan, which advances all rows at once, takes them padded: [N, T_max].
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Tokens [batch, start:stop] are those of a row."""

    row: int
    batch: int
    start: int
    stop: int

    @property
    def tokens(self) -> tuple[int, slice]:
        return self.batch, slice(self.start, self.stop)

    @property
    def length(self) -> int:
        return self.stop - self.start


def spans(batch: int, tokens: int, cu_seqlens: Tensor | None) -> list[Span]:
    """One span per row."""
    if cu_seqlens is None:
        return [Span(b, b, 0, tokens) for b in range(batch)]
    ends = cu_seqlens.tolist()
    return [Span(n, 0, start, stop) for n, (start, stop) in enumerate(pairwise(ends))]


def cached_spans(
    batch: int,
    tokens: int,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state_indices: Tensor | None,
) -> list[Span]:
    """One span per row that is not padding (state_indices < 0), without the row's masked tail."""
    found = spans(batch, tokens, cu_seqlens)
    if state_indices is not None:
        found = [span for span, index in zip(found, state_indices.tolist(), strict=True) if index >= 0]
    if token_mask is not None:
        found = [span._replace(stop=span.start + int(token_mask[span.tokens].sum())) for span in found]
    return found


def covered(found: list[Span], batch: int, tokens: int, device: torch.device) -> Tensor:
    """bool [B, T]: the token lies in one of the spans."""
    inside = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
    for span in found:
        inside[span.tokens] = True
    return inside


def slot_positions(found: list[Span], first: list[int], batch: int, tokens: int, device: torch.device) -> Tensor:
    """int64 [B, T]: token i of a span is at first[row] + i; 0 outside the spans."""
    where = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
    for span in found:
        where[span.tokens] = first[span.row] + torch.arange(span.length, device=device)
    return where


def slot_index(cache: Tensor, block_table: Tensor | None, row: int, slots: Tensor) -> tuple[int | Tensor, Tensor]:
    """Index of a row's slots in a dense cache [B, S, ...] or, given block_table, a paged [P, page, ...]."""
    if block_table is None:
        return row, slots
    page_size = cache.shape[1]
    return block_table[row, slots // page_size].long(), slots % page_size


def _grid(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Token index and whether there is such a token, both [N, T_max]."""
    found = spans(1, 0, cu_seqlens)
    step = torch.arange(max((span.length for span in found), default=0), device=cu_seqlens.device)
    start, stop = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    inside = start + step < stop
    return torch.where(inside, start + step, 0), inside


def to_rows(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[1, T, ...] -> [N, T_max, ...], 0 (False) where a row has ended; a batch is its rows already."""
    if cu_seqlens is None:
        return x
    index, inside = _grid(cu_seqlens)
    return x[0, index].masked_fill(~inside.view(*inside.shape, *[1] * (x.dim() - 2)), 0)


def from_rows(x: Tensor, cu_seqlens: Tensor | None, tokens: int) -> Tensor:
    """[N, T_max, ...] -> [1, T, ...], 0 past the last row."""
    if cu_seqlens is None:
        return x
    index, inside = _grid(cu_seqlens)
    return x.new_zeros(tokens, *x.shape[2:]).index_put((index[inside],), x[inside])[None]
