"""What validation found about a call, remembered by the call's signature.

The signature is the metadata of the tensors (dtype, device, sizes, strides) and the options: everything that
validation and the choice of a backend look at, and nothing else. A step of a model repeats it in every layer, so
checks that would cost more than the launch run once. Tracing, tensor subclasses and installations without the
native module have no signature and are checked at every call.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from deltamem_kernels import ops

try:
    from deltamem_kernels._cpu import signature
except ImportError:
    signature = None

# Those who may observe a call, by one name each: every call asks for them.
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.maybe_current_level
_is_profiled = torch.autograd._profiler_enabled

_MOST_PLANS = 8192  # lengths differ from step to step where caches grow; then older plans are forgotten


class Plan(NamedTuple):
    backend: str
    sizes: tuple  # what the function needs of its shapes: (N, H, R) for example


_plans: dict[tuple, Plan] = {}


def find(function: str, tensors: tuple, options: tuple) -> tuple[tuple | None, Plan | None]:
    """The call's key (None: it has no signature) and its plan (None: not seen before)."""
    if signature is None or _is_compiling():
        return None, None
    metadata = signature(tensors)
    if metadata is None:
        return None, None
    key = (function, metadata, options)
    return key, _plans.get(key)


def remember(key: tuple | None, plan: Plan) -> None:
    if key is not None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = plan


def kernels(direct: bool, backend: str) -> dict[str, Callable]:
    """How a call reaches its kernels: the launchers themselves, or the ops where someone is watching.

    The dispatcher takes about 0.2 µs an argument. A call that has a signature (``direct``), so is one on plain tensors,
    and that no compiler, dispatch mode, functorch level or profiler observes gets the same result without it.
    """
    if not direct or _is_compiling() or _dispatch_modes() or _functorch_level() is not None or _is_profiled():
        return ops.OVERLOADS[backend]
    return ops.LAUNCHERS[backend]
