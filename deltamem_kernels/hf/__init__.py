"""δ-mem on transformers models: attach a memory to a frozen decoder, load and save adapters, carry the state."""

try:
    from deltamem_kernels.hf.adapter import load_adapter, save_adapter
    from deltamem_kernels.hf.attach import attach, detach, prepare_cache
    from deltamem_kernels.hf.config import DeltaMemConfig
    from deltamem_kernels.hf.explain import explain
    from deltamem_kernels.hf.session import DeltaMemSession
    from deltamem_kernels.hf.state import DeltaMemState
except ModuleNotFoundError as error:
    raise ImportError(
        f"deltamem_kernels.hf: {error.name} must be installed (pip install 'deltamem-kernels[hf]'), got {error}"
    ) from error

__all__ = [
    "DeltaMemConfig",
    "DeltaMemSession",
    "DeltaMemState",
    "attach",
    "detach",
    "explain",
    "load_adapter",
    "prepare_cache",
    "save_adapter",
]
