"""Fused kernels for δ-mem (arXiv 2605.12357): an online associative memory beside frozen attention."""

from deltamem_kernels.api import (
    DeltaScanOutput,
    FusedDeltaAttentionOutput,
    delta_output,
    delta_scan,
    fused_delta_attention,
)
from deltamem_kernels.backends import explain
from deltamem_kernels.serving import delta_scan_with_state_pool, fused_delta_attention_with_kvcache

__version__ = "0.1.0"

__all__ = [
    "DeltaScanOutput",
    "FusedDeltaAttentionOutput",
    "delta_output",
    "delta_scan",
    "delta_scan_with_state_pool",
    "explain",
    "fused_delta_attention",
    "fused_delta_attention_with_kvcache",
]
