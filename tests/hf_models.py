"""Tiny models with memories: the golden ones, and random ones of every family."""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from deltamem_kernels import hf

GOLDEN = Path(__file__).parent / "data" / "golden" / "models"
NAMES = sorted(path.name for path in GOLDEN.iterdir())

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOW = 8
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# family -> (config class, what is its own)
FAMILIES = {
    "qwen3": ("Qwen3Config", {}),
    "qwen3_sliding": (
        "Qwen3Config",
        {"use_sliding_window": True, "sliding_window": _WINDOW, "layer_types": _MIXED},
    ),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": _WINDOW, "layer_types": _MIXED}),
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
    "mistral": ("MistralConfig", {"sliding_window": _WINDOW}),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": _WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 8},
    ),
}


def golden(name, attn_implementation="eager", attached=True):
    """-> the golden model with its adapter, and the expected tensors."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDEN / name, attn_implementation=attn_implementation, dtype=torch.float32
    ).eval()
    if attached:
        hf.load_adapter(model, GOLDEN / name)
    return model, load_file(GOLDEN / name / "expected.safetensors")


def random_model(family="qwen3", attn_implementation="sdpa", seed=0, **options):
    """A random decoder; its norms and biases too, so that no term is trivial."""
    kind, own = FAMILIES[family]
    options = _SIZES | own | options
    config = getattr(transformers, kind)(**options)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.add_(0.2 * torch.randn_like(p))
            else:
                p.copy_(0.15 * torch.randn_like(p))
    return model.eval()


def attached(family="qwen3", seed=0, attn_implementation="sdpa", model=None, **options):
    """A random model with a random memory that visibly acts."""
    model = random_model(family, attn_implementation, seed) if model is None else model
    hf.attach(model, hf.DeltaMemConfig(**{"rank": 4, "alpha": 8.0, **options}))
    randomize(model, seed)
    return model


def randomize(model, seed=0):
    """Random values for every trainable parameter of the memories."""
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) * (0.15 if "bias" not in name else 0.5))
    return model


def error(ours, expected):
    """Largest difference, relative to the largest expected value."""
    return ((ours - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def paths(model):
    """How each layer's last call went."""
    return [module.delta_mem.path for module in model._delta_mem.attentions.values()]
