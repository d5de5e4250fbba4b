"""What ``make emulated`` builds: modules and programs that run CUDA kernels on the CPU."""

import importlib.util
import os
import sys
from pathlib import Path

FOLDER = Path(os.environ.get("DELTAMEM_EMULATED", Path(__file__).parent.parent / "build" / "emulated"))


def load(name, file, folder=FOLDER):
    """The module in ``file``, known as ``name`` from now on; None where it is not built."""
    path = next(folder.glob(f"{file}.*.so"), None)
    if path is None:
        return None
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
