"""Every test starts from one seed, and fresh memory is NaN until something writes it."""

import os

import pytest
import torch

from deltamem_kernels import backends

# Without a GPU Triton kernels are interpreted; Triton looks when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Backends whose absence is a failure and not a skip; CI names those that it builds.
EXPECTED = os.environ.get("DELTAMEM_TEST_BACKENDS", "reference,cpu").split(",")


def pytest_runtest_setup(item):
    backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
    if backend and (reason := backends.MISSING[backend]):
        if backend in EXPECTED:
            pytest.fail(f"backend {backend} is expected here: {reason}")
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    torch.manual_seed(0)
    # torch.empty and its kin come filled with NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
