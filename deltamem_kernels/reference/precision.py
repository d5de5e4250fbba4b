"""The arithmetic of the reference: fp64 when every tensor given is, else fp32, also under autocast."""

import functools

import torch


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if every given floating tensor is float64, else float32."""
    dtypes = {t.dtype for t in tensors if t is not None and t.is_floating_point()}
    return torch.float64 if dtypes == {torch.float64} else torch.float32


def widen(dtype: torch.dtype, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors in the arithmetic's dtype; an absent one stays absent."""
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def without_autocast(op):
    """An op fixes its own arithmetic: autocast would quietly turn the products inside into bf16."""

    @functools.wraps(op)
    def run(*args, **kwargs):
        device = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        with torch.autocast(device, enabled=False):
            return op(*args, **kwargs)

    return run
