"""The benchmarks' engine of a library's attention behind our scan and preparation computes, and trains, the layer."""

import sys
from pathlib import Path

import pytest
import torch

from deltamem_kernels import fused_delta_attention

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import eager
from library_engine import prepared_attention


def kernel(backend, attention, layer, memory):
    result = fused_delta_attention(*(layer[x] for x in "qkv"), backend=backend, **eager.kernel_arguments(layer, memory))
    return result.out, result.reads


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("memory", (True, False))
def test_engine_is_the_layer(backend, memory):
    layer = eager.random_layer(2, 19, 4, 2, 16, 19, torch.float32, "cpu")
    leaves = {name: x for name, x in layer.items() if not name.startswith("rotary")}
    if not memory:
        leaves = {name: x for name, x in leaves.items() if name not in eager.MEMORY_ARGUMENTS}
    dout, dreads = torch.randn_like(layer["q"]), torch.randn(2, 19, 1, 8)
    found = []
    for engine in (prepared_attention, kernel):
        trained = {name: x.clone().requires_grad_() for name, x in leaves.items()}
        out, reads = engine(backend, eager.causal_sdpa, layer | trained, memory)
        results, cotangents = ((out, reads), (dout, dreads)) if memory else ((out,), (dout,))
        found.append((*results, *torch.autograd.grad(results, list(trained.values()), cotangents)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
