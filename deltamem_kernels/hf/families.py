"""Attention modules that the fused path knows, and where it finds their parts."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Family(NamedTuple):
    """What differs between decoders whose attention is q/k/v/o projections, optional QK-norm and RoPE in halves."""

    name: str
    # module -> (q_norm_weight, k_norm_weight, eps) as RMSNorm multiplies them, or (None, None, 0)
    norms: Callable = lambda module: (None, None, 0.0)
    # module -> tokens that a query sees, itself included, or None
    sliding_window: Callable = lambda module: None
    rotates: Callable = lambda module: True


def _qwen3_norms(module):
    return module.q_norm.weight, module.k_norm.weight, module.q_norm.variance_epsilon


def _gemma3_norms(module):
    return 1 + module.q_norm.weight.float(), 1 + module.k_norm.weight.float(), module.q_norm.eps


def _own_window(module):
    return module.sliding_window


# class of transformers.models.<name> -> its family
FAMILIES = {
    "Qwen3Attention": Family("qwen3", norms=_qwen3_norms, sliding_window=_own_window),
    "Qwen2Attention": Family("qwen2", sliding_window=_own_window),
    "LlamaAttention": Family("llama"),
    "SmolLM3Attention": Family("smollm3", sliding_window=_own_window, rotates=lambda module: bool(module.use_rope)),
    "MistralAttention": Family("mistral", sliding_window=lambda module: module.config.sliding_window),
    "Gemma3Attention": Family("gemma3", norms=_gemma3_norms, sliding_window=_own_window),
}


def family(module: torch.nn.Module) -> Family | None:
    """The family whose forward this module runs, or None."""
    kind = type(module)
    found = FAMILIES.get(kind.__name__)
    if found is None or kind.__module__ != f"transformers.models.{found.name}.modeling_{found.name}":
        return None
    return found


def features(linear: torch.nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, quantised or not."""
    return linear.in_features, linear.out_features


def float_weight(linear: torch.nn.Module) -> torch.Tensor | None:
    """Its weight ``[out, in]`` where it is stored as such."""
    weight = getattr(linear, "weight", None)
    plain = isinstance(weight, torch.Tensor) and weight.is_floating_point()
    return weight if plain and tuple(weight.shape) == (linear.out_features, linear.in_features) else None
