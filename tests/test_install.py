"""The wheel where a tool is missing."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "deltamem_kernels", "triton_ops")


def test_without_a_compiler(tmp_path):
    """It is built all the same, with every backend that is Python, and says what it leaves out."""
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", "dist"],
        cwd=tmp_path,
        env=os.environ | {"CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found: the cpu backend is left out (install g++ and reinstall to have it)" in done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith((".so", ".pyd", ".cpp"))]
    for room in ("reference", "triton_ops", "native", "hf"):
        assert f"deltamem_kernels/{room}/__init__.py" in names, room
