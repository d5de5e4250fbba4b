"""Builds the native modules with CMake. Without a C++ compiler the package installs all the same, with the
backends that are pure Python, and says at run time what is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def run(self):
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            self.warn("no C++ compiler found: the cpu backend is left out (install g++ and reinstall to have it)")
            self.extensions = []
            return
        import pybind11

        build = Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        # An isolated build has tools of its own, so a kept build folder must not remember the last ones.
        arguments = [
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDELTAMEM_SANITIZE={os.environ.get('DELTAMEM_SANITIZE', '')}",
        ]
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *arguments], check=True)
        subprocess.run(["cmake", "--build", build], check=True)


setup(
    ext_modules=[Extension("deltamem_kernels._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
