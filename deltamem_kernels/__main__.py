"""``python -m deltamem_kernels``: what is built here, for which GPUs, and what is missing and why."""

import importlib
import platform

import torch

import deltamem_kernels
from deltamem_kernels import backends, ops


def describe(backend: str) -> str:
    """One line on a backend of this installation."""
    if backends.MISSING[backend]:
        return f"missing: {backends.MISSING[backend]}"
    if backend == "cpu":
        kernels = importlib.import_module(ops.NATIVE_MODULES[backend])
        return f"built for {', '.join(kernels.supported_isas())} of this processor; uses {kernels.isa()}"
    if backend == "cuda":
        kernels = importlib.import_module(ops.NATIVE_MODULES[backend])
        if kernels.emulated:
            return "emulated on the CPU"
        return f"built for {kernels.architectures}, and as PTX for later GPUs"
    if backend == "triton":
        return f"Triton {importlib.import_module('triton').__version__}"
    return "pure PyTorch"


def main() -> None:
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"deltamem_kernels {deltamem_kernels.__version__}, {versions}")
    for backend in ops.ROOMS:
        print(f"  {backend:<10} {describe(backend)}")
    if not torch.cuda.is_available():
        print("  no CUDA device here")
        return
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        print(f"  cuda:{index}     {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")


if __name__ == "__main__":
    main()
