"""Which backends are installed, what each covers, the ``auto`` table, and ``explain``."""

import importlib
import importlib.util
import inspect
import os
import re
from pathlib import Path

import torch

from deltamem_kernels import fused
from deltamem_kernels.ops import LAUNCHERS, NATIVE_MODULES, ROOMS, SCHEMAS

# What `auto` tries, in order, per device type. A named backend is only ever itself.
AUTO = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

# public function -> the ops of its chain, forward then backward
CHAINS = {
    "delta_scan": (("delta_scan_fwd",), ("delta_scan_bwd",)),
    "delta_scan_with_state_pool": (("delta_scan_with_state_pool",), ()),
    "fused_delta_attention": (
        ("delta_scan_fwd", "delta_prep_fwd", "delta_attention_fwd"),
        ("delta_attention_bwd", "delta_prep_bwd", "delta_scan_bwd"),
    ),
    "fused_delta_attention_with_kvcache": (
        (
            "delta_decode",
            "delta_scan_with_state_pool",
            "delta_prep_with_kvcache",
            "delta_attention_with_kvcache",
        ),
        (),
    ),
    "delta_output": (("delta_output_fwd", "delta_output_out"), ("delta_output_bwd",)),
}

# What `auto` means on this process; anything else than "auto" overrides the table. Read at import.
DEFAULT = os.environ.get("DELTAMEM_BACKEND", "auto")

MAX_RANK = 64  # of every backend but the reference
MAX_HEAD_SIZE = 256  # of Triton's attention: wider tiles do not fit a multiprocessor's shared memory
CUDA_HEAD_SIZES = (64, 128)  # of the CUDA attention; decode also has 256
CUDA_OLDEST = 8  # compute capability's first number: mma of bf16, cp.async
OLDEST_TRITON = "3.6"  # whose compiler and interpreter take our kernels


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its package is absent
        return False


def _version_of(module: str) -> str | None:
    """As its __init__.py writes it: distributions of Triton have several names, and to import it takes a second."""
    origin = importlib.util.find_spec(module).origin
    found = re.search(r"""^__version__ = ["'](.+)["']""", Path(origin).read_text(), re.MULTILINE) if origin else None
    return found and found[1]


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _missing(backend: str) -> str | None:
    if backend == "triton":
        wanted = f"pip install 'triton>={OLDEST_TRITON}'"
        if not _has_module("triton"):
            return f"Triton is not installed ({wanted})"
        version = _version_of("triton")
        if version and _release(version) < _release(OLDEST_TRITON):
            return f"Triton {version} ({wanted})"
    if backend == "cpu":
        try:
            importlib.import_module("deltamem_kernels._cpu")
        except ImportError as error:
            return f"no native module (reinstall deltamem-kernels where a C++ compiler is): {error}"
    if backend == "cuda":
        try:
            importlib.import_module("deltamem_kernels._cuda")
        except ImportError as error:
            return f"no CUDA module ({_why_no_cuda(error)}; reinstall deltamem-kernels where nvcc is)"
    return None


def _why_no_cuda(error: ImportError) -> str:
    try:
        from deltamem_kernels._build import CUDA_MISSING
    except ImportError:
        return "the package was not built"
    return CUDA_MISSING or str(error)


# backend -> why it cannot run on this installation and how to get it, or None
MISSING = {backend: _missing(backend) for backend in ROOMS}

# The CUDA module that tests load where no device is: its kernels run on the CPU.
EMULATED = MISSING["cuda"] is None and importlib.import_module(NATIVE_MODULES["cuda"]).emulated

# backend -> the ops that it has kernels for
COVERED = {
    backend: {op for op in LAUNCHERS[backend] if _has_module(f"{ROOMS[backend]}.{SCHEMAS[op][0]}")} for backend in ROOMS
}


def refusal(function: str, backend: str, x: torch.Tensor, R: int) -> Exception | None:
    """The error that choosing ``backend`` for inputs like ``x`` deserves; None when it runs them."""
    if backend == "reference":
        return None
    if MISSING[backend]:
        return RuntimeError(
            f"{function}: backend '{backend}' must be installed, got {MISSING[backend]}; backend='reference' does it"
        )
    for op in (*CHAINS[function][0], *CHAINS[function][1]):
        if op not in COVERED[backend]:
            return NotImplementedError(
                f"{function}: the {backend} backend has no kernel for {op}; backend='reference' does it"
            )
    wanted = "cpu" if backend == "cpu" or _runs_on_cpu(backend) else "cuda"
    if x.device.type != wanted:
        there = "cpu" if x.device.type == "cpu" and backend != "cpu" and not MISSING["cpu"] else "reference"
        return ValueError(
            f"{function}: tensors must be on {wanted} for backend '{backend}', got {x.device.type}; "
            f"backend='{there}' does it there"
        )
    if x.dtype == torch.float64:
        return NotImplementedError(f"{function}: float64 is covered by backend='reference' only, got '{backend}'")
    if R > MAX_RANK:
        return NotImplementedError(
            f"{function}: ranks above {MAX_RANK} are covered by backend='reference' only, got {R} on '{backend}'"
        )
    if backend == "triton" and "attention" in function and x.shape[-1] > MAX_HEAD_SIZE:
        return NotImplementedError(
            f"{function}: head sizes above {MAX_HEAD_SIZE} are not covered by backend 'triton', got {x.shape[-1]}; "
            "backend='reference' does it"
        )
    return _cuda_refusal(function, x) if backend == "cuda" else None


def _runs_on_cpu(backend: str) -> bool:
    """Whether a GPU backend's kernels are interpreted, or emulated, over CPU tensors in this process."""
    if backend == "cuda":
        return EMULATED
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def _cuda_refusal(function: str, x: torch.Tensor) -> Exception | None:
    if not EMULATED:
        device = torch.cuda.get_device_properties(x.device)
        if device.major < CUDA_OLDEST:
            return NotImplementedError(
                f"{function}: GPUs of compute capability below {CUDA_OLDEST}.0 are not covered by backend 'cuda', "
                f"got {device.major}.{device.minor}; backend='triton' may run there"
            )
    if "attention" not in function:
        return None
    if x.dtype == torch.float32:
        return NotImplementedError(
            f"{function}: float32 attention is not covered by backend 'cuda'; backend='triton' does it"
        )
    decodes = function == "fused_delta_attention_with_kvcache" and x.shape[1] <= fused.MAX_DECODE_TOKENS
    covered = (*CUDA_HEAD_SIZES, 256) if decodes else CUDA_HEAD_SIZES
    if x.shape[-1] not in covered:
        return NotImplementedError(
            f"{function}: head sizes other than {', '.join(map(str, covered))} are not covered by backend 'cuda' here, "
            f"got {x.shape[-1]}; backend='triton' does it"
        )
    return None


def choose(function: str, backend: str, x: torch.Tensor, R: int) -> str:
    """The backend that runs ``function`` on inputs like ``x``, or the reason why the named one does not."""
    if backend == "auto":
        backend = DEFAULT
    if backend == "auto":
        for candidate in AUTO.get(x.device.type, ("reference",)):
            if refusal(function, candidate, x, R) is None:
                return candidate
    if backend not in ROOMS:
        raise ValueError(f"{function}: backend must be one of auto, {', '.join(ROOMS)}, got {backend!r}")
    error = refusal(function, backend, x, R)
    if error is not None:
        raise error
    return backend


def explain(function, *args, **kwargs) -> None:
    """Print the ops that ``function(*args, **kwargs)`` would run, who runs them, and why not the others.

    ``function`` is one of the public functions; nothing is computed.

    Raises:
        ValueError: ``function`` is not a public function; or what choosing its backend raises.
    """
    name = getattr(function, "__name__", repr(function))
    if name not in CHAINS:
        raise ValueError(f"explain: function must be one of {', '.join(CHAINS)}, got {name}")
    arguments = inspect.signature(function).bind(*args, **kwargs)
    arguments.apply_defaults()
    given = arguments.arguments
    x = next(given[key] for key in ("q", "mem_q", "attn_proj") if given.get(key) is not None)
    R = max((given[key].shape[-1] for key in ("mem_q", "reads") if given.get(key) is not None), default=1)
    chosen = choose(name, given["backend"], x, R)
    print(f"{name} on {x.device.type}, {str(x.dtype).removeprefix('torch.')}, R = {R}:")
    for op in fused.chain(name, given, COVERED[chosen]):
        print(f"  deltamem::{op}.{chosen}")
    for other in ROOMS:
        if other != chosen:
            error = refusal(name, other, x, R)
            reason = str(error).removeprefix(f"{name}: ") if error else f"would run it; {_why(given, chosen)}"
            print(f"  not {other}: {reason}")


def _why(given: dict, chosen: str) -> str:
    if given["backend"] != "auto":
        return f"backend={chosen!r} was asked for"
    if DEFAULT != "auto":
        return f"DELTAMEM_BACKEND={chosen} was asked for"
    return f"the auto table prefers {chosen}"
