"""Launchers of the native kernels: allocate results, pass tensors on, call. One module per op family.

The compiled modules take tensors through the DLPack exchange table of torch.Tensor (``csrc/bind.h``)."""
