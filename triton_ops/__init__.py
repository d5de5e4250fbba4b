"""Triton kernels with their launchers, one module per op family."""
