"""Arguments of one complete call of each public function, every feature on, small enough for any test.

D and DTYPE are what every backend covers; conftest sets others for the tests of one that covers less.
"""

import torch

import deltamem_kernels as dk

B, T, HQ, HKV, D, H, R, HIDDEN = 2, 5, 4, 2, 16, 2, 4, 24
DTYPE = torch.float32


def memory(tokens=T, batch=B, dtype=None):
    def randn(*shape):
        return torch.randn(*shape, dtype=dtype or DTYPE)

    return {name: randn(batch, tokens, H, R) for name in ("mem_q", "mem_k", "mem_v", "beta", "lam")} | {
        "beta_bias": torch.randn(H, R),
        "lam_bias": torch.randn(H, R),
        "use_qk_activation_in_kernel": True,
        "use_gate_in_kernel": True,
    }


def projections(dtype=None):
    def randn(*shape):
        return torch.randn(*shape, dtype=dtype or DTYPE)

    angles = torch.randn(64, D // 2)
    return {
        "delta_q": 0.3 * randn(HQ * D, H * R),
        "delta_k": 0.3 * randn(HKV * D, H * R),
        "delta_v": 0.3 * randn(HKV * D, H * R),
        "q_norm_weight": 1 + 0.1 * randn(D),
        "k_norm_weight": 1 + 0.1 * randn(D),
        "rotary_cos": angles.cos().to(dtype or DTYPE),
        "rotary_sin": angles.sin().to(dtype or DTYPE),
    }


def qkv(tokens=T, batch=B, dtype=None):
    shapes = {"q": (batch, tokens, HQ, D), "k": (batch, tokens, HKV, D), "v": (batch, tokens, HKV, D)}
    return {name: torch.randn(*shape, dtype=dtype or DTYPE) for name, shape in shapes.items()}


def delta_scan(dtype=None):
    return dk.delta_scan, memory(dtype=dtype) | {"initial_state": torch.randn(B, H, R, R)}


def delta_scan_with_state_pool(dtype=None):
    return dk.delta_scan_with_state_pool, memory(dtype=dtype) | {
        "state_pool": torch.randn(4, H, R, R),
        "state_indices": torch.tensor([2, 0], dtype=torch.int32),
    }


def fused_delta_attention(dtype=None):
    state = {"initial_state": torch.randn(B, H, R, R)}
    return dk.fused_delta_attention, qkv(dtype=dtype) | memory(dtype=dtype) | projections(dtype) | state


def fused_delta_attention_with_kvcache(dtype=None, tokens=T):
    return dk.fused_delta_attention_with_kvcache, (
        qkv(tokens, dtype=dtype)
        | memory(tokens, dtype=dtype)
        | projections(dtype)
        | {
            "k_cache": torch.randn(B, 40, HKV, D, dtype=dtype or DTYPE),
            "v_cache": torch.randn(B, 40, HKV, D, dtype=dtype or DTYPE),
            "state_pool": torch.randn(4, H, R, R),
            "state_indices": torch.tensor([2, 0], dtype=torch.int32),
            "cache_seqlens": torch.tensor([7, 11], dtype=torch.int32),
        }
    )


def delta_output(dtype=None):
    return dk.delta_output, {
        "attn_proj": torch.randn(B, T, HIDDEN, dtype=dtype or DTYPE),
        "reads": torch.randn(B, T, H, R),
        "delta_o": torch.randn(HIDDEN, H * R, dtype=dtype or DTYPE),
        "rms_weight": torch.randn(HIDDEN, dtype=dtype or DTYPE),
        "residual": torch.randn(B, T, HIDDEN, dtype=dtype or DTYPE),
    }


FUNCTIONS = (
    delta_scan,
    delta_scan_with_state_pool,
    fused_delta_attention,
    fused_delta_attention_with_kvcache,
    delta_output,
)


def clone(arguments):
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
