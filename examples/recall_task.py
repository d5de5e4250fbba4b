"""In-context recall: keys with values, perhaps written again, perhaps followed by fillers; then questions.

An episode is ``k1 v1 .. kn vn [k v' ..] [fillers]``, k1 .. kn distinct. A question is ``ASK k``; the answer is the
value last written to k. A combination (k, v) with (v - k) % 8 = 0 is held out: two of the 16 values of each key.
"""

from typing import NamedTuple

import torch

Tensor = torch.Tensor

KEYS, VALUES, FILLERS = 64, 16, 16
ASK = KEYS + VALUES  # tokens: keys, values, ASK, fillers
VOCABULARY = ASK + 1 + FILLERS
CHANCE = 1 / VALUES
HELD_OUT_STEP = 8
GENERATOR = (
    f"{KEYS} keys, {VALUES} values, {FILLERS} fillers; keys of an episode distinct and uniform; a value uniform over "
    f"those seen (training: (value - key) % {HELD_OUT_STEP} != 0), held out (= 0) or any"
)


class Episodes(NamedTuple):
    tokens: Tensor  # [B, T]
    keys: Tensor  # [B, n], in the order of their first writes
    values: Tensor  # [B, n] tokens of the values last written to them
    before: Tensor  # [B, n] tokens of those first written


def draw_values(keys: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """A value for each key: ``seen`` in training, ``held out``, or ``any``."""
    if kind == "any":
        return torch.randint(VALUES, keys.shape, generator=generator)
    held_out = VALUES // HELD_OUT_STEP
    if kind == "held out":
        return (keys + HELD_OUT_STEP * torch.randint(held_out, keys.shape, generator=generator)) % VALUES
    drawn = torch.randint(VALUES - held_out, keys.shape, generator=generator)
    return (keys + 1 + drawn + drawn // (HELD_OUT_STEP - 1)) % VALUES


def draw_other(keys: Tensor, values: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """As ``draw_values``, but another value for each key than it has."""
    drawn = draw_values(keys, kind, generator)
    while bool((same := drawn == values).any()):
        drawn = torch.where(same, draw_values(keys, kind, generator), drawn)
    return drawn


def draw(
    generator: torch.Generator, batch: int, pairs: int, kind: str = "seen", rewritten: int = 0, fillers: int = 0
) -> Episodes:
    """``batch`` episodes; of their keys, ``rewritten`` get another value after all pairs."""
    keys = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :pairs]
    before = draw_values(keys, kind, generator)
    values = before.clone()
    tokens = [torch.stack([keys, KEYS + before], 2).flatten(1)]
    if rewritten:
        chosen = torch.rand(batch, pairs, generator=generator).argsort(1)[:, :rewritten]
        again = keys.gather(1, chosen)
        replaced = draw_other(again, before.gather(1, chosen), kind, generator)
        values.scatter_(1, chosen, replaced)
        tokens.append(torch.stack([again, KEYS + replaced], 2).flatten(1))
    if fillers:
        tokens.append(ASK + 1 + torch.randint(FILLERS, (batch, fillers), generator=generator))
    return Episodes(torch.cat(tokens, 1), keys, KEYS + values, KEYS + before)
