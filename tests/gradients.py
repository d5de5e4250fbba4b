"""Gradients of a forward function by autograd, and small random fp64 inputs."""

import torch

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def given(args):
    """Names of the floating tensors among the arguments: what has a gradient."""
    return [name for name, x in args.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]


def autograd(forward, args, cotangents):
    """{name: gradient} of the forward function, by autograd; 0 where the results do not depend on it."""
    leaves = {name: args[name].detach().clone().requires_grad_() for name in given(args)}
    results = forward(**{**args, **leaves})
    results = results if isinstance(results, tuple) else (results,)
    pairs = [(y, dy) for y, dy in zip(results, cotangents, strict=False) if dy is not None and y.requires_grad]
    grads = torch.autograd.grad(
        [y for y, _ in pairs], list(leaves.values()), [dy for _, dy in pairs], allow_unused=True
    )
    return {n: torch.zeros_like(args[n]) if g is None else g for n, g in zip(leaves, grads, strict=True)}


def gradcheck(forward, args, results=1):
    names = given(args)
    leaves = [args[name].detach().clone().requires_grad_() for name in names]

    def run(*tensors):
        y = forward(**{**args, **dict(zip(names, tensors, strict=True))})
        return y[:results] if isinstance(y, tuple) else y

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def tail_mask(B, T):
    mask = torch.rand(B, T) > 0.4
    mask[0, :2] = False  # a row that starts masked
    return mask
