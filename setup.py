"""Builds the native modules with CMake: the CPU kernels where a C++ compiler is, the CUDA kernels where nvcc is, too.

What cannot be built is left out; the package installs all the same and says at run time what is missing and why.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# Of these GPUs, those that the compiler found knows. PTX is the same within a group: it is made once, for the first.
CUDA_ARCHS = (("80", "86", "89"), ("90a",), ("100", "120"))


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for place in places if place and (found := shutil.which(place))), None)


def cuda_code(nvcc: str) -> list[str]:
    """DELTAMEM_CUDA_ARCHS, or the default ones, as nvcc's --generate-code; PTX of the newest serves later ones."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    known = re.findall(r"compute_(\d+)", listed)
    default = [arch for group in CUDA_ARCHS for arch in group]
    asked = os.environ.get("DELTAMEM_CUDA_ARCHS")
    if asked:
        archs = re.split(r"[;, ]+", asked)
        for arch in archs:
            if arch.rstrip("af") not in known:
                raise SystemExit(f"DELTAMEM_CUDA_ARCHS must name what {nvcc} knows ({', '.join(known)}), got {arch!r}")
    else:
        archs = [arch for arch in default if arch.rstrip("a") in known]
        if not archs:
            raise SystemExit(f"{nvcc} must know one of {', '.join(default)}; DELTAMEM_CUDA=0 leaves CUDA out")
    groups = [[arch for arch in group if arch in archs] for group in CUDA_ARCHS]
    groups += [[arch] for arch in archs if arch not in default]
    groups = sorted(filter(None, groups), key=lambda group: int(group[0].rstrip("af")))
    newest = groups[-1][0].rstrip("af")
    code = [f"arch=compute_{group[0]},code=[{','.join(f'sm_{arch}' for arch in group)}]" for group in groups]
    return [*code, f"arch=compute_{newest},code=[compute_{newest}]"]


def cuda_arguments() -> tuple[list[str], str | None]:
    """CMake's arguments for the CUDA module, and why it is left out, or None."""
    wish = os.environ.get("DELTAMEM_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"DELTAMEM_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return [], "left out by DELTAMEM_CUDA=0 when the package was built"
    nvcc = find_nvcc()
    if nvcc is None:
        if wish == "1":
            raise SystemExit("DELTAMEM_CUDA=1 needs nvcc: put it on PATH, or name it by CUDACXX or CUDA_HOME")
        return [], "no nvcc was found when the package was built (PATH, CUDACXX, CUDA_HOME)"
    return [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DDELTAMEM_CUDA_CODE={';'.join(cuda_code(nvcc))}"], None


class CMakeBuild(build_ext):
    def run(self):
        target = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        target.mkdir(parents=True, exist_ok=True)
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        cuda, cuda_missing = cuda_arguments() if compiler else ([], "no C++ compiler was found when it was built")
        (target / "_build.py").write_text(
            f'"""Written when the package was built."""\n\nCUDA_MISSING = {cuda_missing!r}\n'
        )
        if cuda_missing:
            self.extensions = [extension for extension in self.extensions if not extension.name.endswith("_cuda")]
        if compiler is None:
            self.warn("no C++ compiler found: the cpu backend is left out (install g++ and reinstall to have it)")
            self.extensions = []
            return
        import pybind11

        build = Path(self.build_temp).resolve()
        # An isolated build has tools of its own, so a kept build folder must not remember the last ones.
        arguments = [
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDELTAMEM_SANITIZE={os.environ.get('DELTAMEM_SANITIZE', '')}",
            f"-DDELTAMEM_CUDA={'OFF' if cuda_missing else 'ON'}",
            *cuda,
        ]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *arguments], check=True)
        subprocess.run(["cmake", "--build", build], check=True)


setup(
    ext_modules=[Extension(f"deltamem_kernels.{name}", sources=[], optional=True) for name in ("_cpu", "_cuda")],
    cmdclass={"build_ext": CMakeBuild},
)
