"""Tiny models with memories: the golden ones, and random ones of every family."""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from deltamem_kernels import hf

GOLDEN = Path(__file__).parent / "data" / "golden" / "models"
NAMES = sorted(path.name for path in GOLDEN.iterdir())


def golden(name, attn_implementation="eager", attached=True):
    """-> the golden model, eager, with its adapter, and the expected tensors."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDEN / name, attn_implementation=attn_implementation, dtype=torch.float32
    ).eval()
    if attached:
        hf.load_adapter(model, GOLDEN / name)
    return model, load_file(GOLDEN / name / "expected.safetensors")


def error(ours, expected):
    """Largest difference, relative to the largest expected value."""
    return ((ours - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
