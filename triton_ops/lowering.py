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


def _described(kernel, args, kwargs):
    """(signature, constexprs, options) of one launch, specialised as Triton's own launch would."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constexprs = {}, {}
    for parameter in kernel.params:
        value = given.pop(parameter.name)
        fixed = parameter.is_constexpr or value is None
        if fixed or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
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
        dtype = next(kind[1:] for kind in signature.values() if kind.startswith("*"))
        yield f"{kernel.__name__} {dtype} {name}", kernel, signature, constexprs, options
