"""What a launcher would launch, without launching it: for compiling every configuration with no device."""

import contextlib

import torch
from triton.runtime.jit import JITFunction

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def _kind(value, path, constexprs, specialise=True):
    """Type of an argument; None and a 1 that Triton specialises on are constexprs. Tuples hold arguments."""
    if isinstance(value, tuple):
        return tuple(_kind(x, (*path, i), constexprs, specialise) for i, x in enumerate(value))
    if value is None or (type(value) is int and value == 1 and specialise):
        constexprs[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _described(kernel, args, kwargs):
    """(signature, constexprs, options) of one launch, specialised as Triton's own launch would."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constexprs = {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given.pop(parameter.name)
        if parameter.is_constexpr:
            signature[parameter.name], constexprs[i,] = "constexpr", value
        else:
            signature[parameter.name] = _kind(value, (i,), constexprs, not parameter.do_not_specialize)
    given.pop("grid"), given.pop("warmup")
    return signature, constexprs, given


@contextlib.contextmanager
def _recorded(found):
    launch = JITFunction.run
    JITFunction.run = lambda kernel, *args, **kwargs: found.append((kernel, *_described(kernel, args, kwargs)))
    try:
        yield
    finally:
        JITFunction.run = launch


def launches(name, launcher, *args):
    """(name, kernel, signature, constexprs, options) of every launch of launcher(*args); tensors may be on meta."""
    found = []
    with _recorded(found):
        launcher(*args)
    for kernel, signature, constexprs, options in found:
        kinds = (kind[0] if isinstance(kind, tuple) else kind for kind in signature.values())
        dtype = next(kind[1:] for kind in kinds if kind.startswith("*"))
        yield f"{kernel.__name__} {dtype} {name}", kernel, signature, constexprs, options


def unique(lowerings):
    """The first of each kind of launch."""
    seen = set()
    for name, *launch in lowerings:
        kind = repr(launch)
        if kind not in seen:
            seen.add(kind)
            yield name, *launch
