"""setup.py's choices: which native modules are built, for which GPUs, and what is said where something is missing."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

SETUP = Path(__file__).parent.parent / "setup.py"
LISTED = "compute_80\ncompute_86\ncompute_90\ncompute_120\n"


@pytest.fixture
def choices(monkeypatch):
    """setup.py's functions, on a machine whose nvcc lists LISTED, or has none."""

    def load(nvcc="/opt/nvcc", **env):
        for name in ("DELTAMEM_CUDA", "DELTAMEM_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
        monkeypatch.setattr(shutil, "which", lambda name: nvcc if name == "nvcc" else None)
        monkeypatch.setattr(
            subprocess, "run", lambda command, **kwargs: subprocess.CompletedProcess(command, 0, stdout=LISTED)
        )
        return runpy.run_path(str(SETUP))

    return load


def test_cuda_for_every_gpu_that_nvcc_knows(choices):
    arguments, missing = choices()["cuda_arguments"]()
    assert missing is None
    assert arguments == [
        "-DCMAKE_CUDA_COMPILER=/opt/nvcc",
        "-DDELTAMEM_CUDA_CODE=arch=compute_80,code=[sm_80,sm_86];arch=compute_90a,code=[sm_90a];"
        "arch=compute_120,code=[sm_120];arch=compute_120,code=[compute_120]",
    ]


def test_cuda_for_named_gpus(choices):
    arguments, _ = choices(DELTAMEM_CUDA_ARCHS="90a, 80")["cuda_arguments"]()
    assert arguments[1] == (
        "-DDELTAMEM_CUDA_CODE=arch=compute_80,code=[sm_80];arch=compute_90a,code=[sm_90a];"
        "arch=compute_90,code=[compute_90]"
    )


def test_a_gpu_that_nvcc_does_not_know(choices):
    with pytest.raises(SystemExit) as caught:
        choices(DELTAMEM_CUDA_ARCHS="80,100")["cuda_arguments"]()
    assert caught.value.code == ("DELTAMEM_CUDA_ARCHS must name what /opt/nvcc knows (80, 86, 90, 120), got '100'")


@pytest.mark.parametrize(
    ("env", "missing"),
    [
        ({}, "no nvcc was found when the package was built (PATH, CUDACXX, CUDA_HOME)"),
        ({"DELTAMEM_CUDA": "0"}, "left out by DELTAMEM_CUDA=0 when the package was built"),
    ],
)
def test_cuda_left_out(choices, env, missing):
    assert choices(nvcc=None, **env)["cuda_arguments"]() == ([], missing)


@pytest.mark.parametrize(
    ("wish", "error"),
    [
        ("1", "DELTAMEM_CUDA=1 needs nvcc: put it on PATH, or name it by CUDACXX or CUDA_HOME"),
        ("yes", "DELTAMEM_CUDA must be auto, 0 or 1, got 'yes'"),
    ],
)
def test_cuda_asked_for_in_vain(choices, wish, error):
    with pytest.raises(SystemExit) as caught:
        choices(nvcc=None, DELTAMEM_CUDA=wish)["cuda_arguments"]()
    assert caught.value.code == error


def test_the_package_describes_itself():
    text = subprocess.run([sys.executable, "-m", "deltamem_kernels"], check=True, capture_output=True, text=True).stdout
    lines = text.splitlines()
    assert lines[0].startswith("deltamem_kernels 0.1.0, torch ")
    backends = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[1:5]}
    assert list(backends) == ["reference", "cpu", "triton", "cuda"]
    assert backends["reference"] == "pure PyTorch"
    assert backends["cpu"].startswith("built for portable")
    built = r"built for sm_\w+(, sm_\w+)*, and as PTX for later GPUs"
    assert re.fullmatch(rf"{built}|missing: no CUDA module \(.+\)", backends["cuda"])
