"""Launchers of the native kernels: allocate results, pass tensors on, call. One module per op family.

``kernels`` is the compiled module, ``_cpu`` or ``_cuda``: both have the same functions and take tensors through the
DLPack exchange table of torch.Tensor (``csrc/bind.h``)."""
