"""Every test starts from one seed, and fresh memory is NaN until something writes it.

A test marked ``gpu`` makes its tensors on the CUDA device; without one it is skipped. Triton's own tests are such where
a device is; elsewhere its kernels are interpreted, and those of the CUDA backend emulated: ``make emulated`` compiles
them for the CPU, and their module takes the place of ``deltamem_kernels._cuda``.
"""

import contextlib
import os

import emulated
import pytest
import torch

# Triton looks when it is first imported, the package when it looks for its modules, cuBLAS when it is first used: eager
# baselines must repeat, too.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    emulated.load("deltamem_kernels._cuda", "_cuda")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import calls

from deltamem_kernels import backends

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"

# Backends whose absence is a failure and not a skip; CI names those that it builds.
EXPECTED = os.environ.get("DELTAMEM_TEST_BACKENDS", "reference,cpu").split(",")


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marker
def pytest_collection_modifyitems(items):
    for item in items:
        if ON_GPU and item.path.name.startswith("test_triton_delta_"):
            item.add_marker(pytest.mark.gpu)
        elif not ON_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if not ON_GPU and any(item.path.name.startswith("test_triton_delta_") for item in items):
        import interpreter

        interpreter.as_a_gpu()


def pytest_runtest_setup(item):
    backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
    if backend in backends.MISSING and (reason := backends.MISSING[backend]):
        if backend in EXPECTED:
            pytest.fail(f"backend {backend} is expected here: {reason}")
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def calls_that_the_backend_covers(request, monkeypatch):
    backend = getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend")
    if backend == "cuda":
        monkeypatch.setattr(calls, "D", 64)
        monkeypatch.setattr(calls, "DTYPE", torch.bfloat16)


@pytest.fixture(autouse=True)
def seeded_and_poisoned(request):
    torch.manual_seed(0)
    # torch.empty and its kin come filled with NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with torch.device("cuda") if request.node.get_closest_marker("gpu") else contextlib.nullcontext():
        yield
    torch.use_deterministic_algorithms(False)
