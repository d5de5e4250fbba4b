"""Fused kernels for δ-mem (arXiv 2605.12357): an online associative memory beside frozen attention."""
