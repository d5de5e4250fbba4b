"""What the tests of every compiled backend share: the error budget against fp64, thread counts, instruction sets."""

from contextlib import contextmanager

import pytest
import torch

from deltamem_kernels import _cpu, ops

ISAS = _cpu.supported_isas()
ON_DEVICE = [pytest.mark.gpu] if torch.cuda.is_available() else []  # elsewhere emulated
CUDA = pytest.param("cuda", marks=ON_DEVICE)
TRITON = pytest.param("triton", marks=pytest.mark.gpu)  # at these sizes the interpreter would take hours


@contextmanager
def instruction_set(name):
    before = _cpu.isa()
    _cpu.set_isa(name)
    try:
        yield
    finally:
        _cpu.set_isa(before)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def call(op, backend, args):
    results = ops.handle(op, backend)(*args.values())
    return (results,) if isinstance(results, torch.Tensor) else results


def map_tensors(args, change):
    return {name: change(x) if isinstance(x, torch.Tensor) else x for name, x in args.items()}


def as_fp64(args):
    return map_tensors(args, lambda x: x.double() if x.is_floating_point() else x)


def same_bits(a, b):
    words = {2: torch.int16, 4: torch.int32}
    return a.dtype == b.dtype and torch.equal(*(x.contiguous().view(words[x.element_size()]) for x in (a, b)))


def assert_within_budget(got, plain, want, name=""):
    """|got - want| <= 2 max |plain - want| + one rounding unit; plain: the reference in the inputs' own dtypes."""
    assert got.shape == plain.shape and got.dtype == plain.dtype, (name, got.shape, got.dtype, plain.dtype)
    if not want.numel():
        return
    error, allowed = (got.double() - want).abs(), 2 * (plain.double() - want).abs().max()
    unit = torch.finfo(got.dtype).eps * want.abs()
    worst = (error - unit).max()
    assert (error <= allowed + unit).all(), f"{name}: error {worst:.3e} beyond the rounding unit, allowed {allowed:.3e}"


def check_against_reference(op, backend, args):
    """Runs the op and compares every result with the fp64 reference; returns the results."""
    got = call(op, backend, args)
    plain, want = call(op, "reference", args), call(op, "reference", as_fp64(args))
    for i, results in enumerate(zip(got, plain, want, strict=True)):
        assert_within_budget(*results, f"{op} result {i}")
    return got
