"""Launchers of the C++ and CUDA kernels: allocate results, pass pointers on, call. One module per op family.

The compiled modules take tensors through the DLPack exchange table of torch.Tensor (``csrc/bind.h``)."""

from deltamem_kernels import _cpu

__all__ = ["_cpu"]
