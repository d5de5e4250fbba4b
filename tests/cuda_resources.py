"""What every CUDA kernel takes of every GPU it is built for, without one: `make static` prints the table.

Registers and stack are read from what nvcc built (a spill is an error there). Threads and shared memory of a block are
those of the largest launch that the tests of the emulated module make (a log that the emulation writes, --launches);
blocks and warps that live on a multiprocessor follow from both. Exits with 1 if a kernel asks for more shared memory
than a chip grants.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import triton

ENTRY = re.compile(r"arch = sm_(\w+)|Function (\w+):\s+REG:(\d+) STACK:(\d+)")


class Chip(NamedTuple):
    """Per multiprocessor, unless it says per block (CUDA programming guide, compute capabilities)."""

    warps: int
    blocks: int
    shared_kib: int
    shared_kib_per_block: int


CHIPS = {
    "80": Chip(64, 32, 164, 163),
    "86": Chip(48, 16, 100, 99),
    "89": Chip(48, 24, 100, 99),
    "90a": Chip(64, 32, 228, 227),
    "100": Chip(64, 32, 228, 227),
    "120": Chip(48, 24, 100, 99),
}
REGISTERS = 65536


class Kernel(NamedTuple):
    name: str
    arch: str
    registers: int
    stack: int  # bytes


def plain_name(text: str) -> str:
    """`name<arguments>` of a kernel, from how either compiler writes it."""
    found = re.search(r"(\w+_kernel)(<[^()]*>)?", text)
    arguments = found[2] or ""
    for spelled, plain in {"deltamem::ptx::": "", "deltamem::": "", "__nv_bfloat16": "bf16", "__half": "f16"}.items():
        arguments = arguments.replace(spelled, plain)
    arguments = re.sub(r"\((?:bool|int)\)", "", arguments).replace("true", "1").replace("false", "0")
    return found[1] + arguments.replace(", ", ",").replace("> >", ">>")


def cuobjdump() -> str:
    """CUDA's, or the one in Triton's wheel."""
    packages = Path(triton.__file__).parent
    return shutil.which("cuobjdump") or str(packages / "backends" / "nvidia" / "bin" / "cuobjdump")


def kernels_in(built: Path) -> list[Kernel]:
    command = [cuobjdump(), "--dump-resource-usage", str(built)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found, arch = [], ""
    for arch_now, mangled, registers, stack in ENTRY.findall(text):
        if arch_now:
            arch = arch_now
        else:
            found.append((mangled, arch, int(registers), int(stack)))
    mangled = "\n".join(name for name, *_ in found)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    return [Kernel(plain_name(name), *rest) for name, (_, *rest) in zip(names, found, strict=True)]


def launches(log: Path) -> dict[str, tuple[int, int]]:
    """kernel -> threads and shared bytes of its largest launch"""
    largest = defaultdict(lambda: (0, 0))
    for line in log.read_text().splitlines():
        threads, shared, text = line.split(" ", 2)
        name = plain_name(re.search(r"kKernel = (.*?)[;\]]", text)[1])
        largest[name] = max(largest[name], (int(threads), int(shared)), key=lambda shape: shape[::-1])
    return largest


def resident_blocks(kernel: Kernel, threads: int, shared: int) -> int:
    chip = CHIPS[kernel.arch]
    warps = -(-threads // 32)
    by_registers = REGISTERS // (-(-kernel.registers * 32 // 256) * 256 * warps)
    by_shared = chip.shared_kib * 1024 // (shared + 1024)  # 1 KiB of each block is the system's
    return min(chip.blocks, chip.warps // warps, by_registers, by_shared)


def row(name: str, kernels: list[Kernel], shape: tuple[int, int] | None) -> tuple[str, list[str]]:
    """The table's line, and what is wrong."""
    cells, faults = [], []
    for kernel in kernels:
        cell = str(kernel.registers)
        if kernel.stack:
            cell += f"+{kernel.stack}"
        if shape:
            blocks = resident_blocks(kernel, *shape)
            cell += f" {blocks}x{-(-shape[0] // 32)}"
            if shape[1] > CHIPS[kernel.arch].shared_kib_per_block * 1024:
                faults.append(f"{name} asks for {shape[1]} bytes of shared memory on sm_{kernel.arch}")
        cells.append(f"{cell:>11}")
    launched = f"{shape[0]:>7} {shape[1] / 1024:>7.1f}" if shape else f"{'-':>7} {'-':>7}"
    return f"{name:<58} {launched} {' '.join(cells)}", faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("built", type=Path, nargs="+", help="the CUDA module, or objects of it")
    parser.add_argument("--launches", type=Path, required=True, help="the emulation's log of launches")
    parser.add_argument("--output", type=Path, help="a file for the table")
    options = parser.parse_args()
    compiled = [kernel for built in options.built for kernel in kernels_in(built)]
    archs = [arch for arch in CHIPS if any(kernel.arch == arch for kernel in compiled)]
    shapes = launches(options.launches)
    kernels = defaultdict(list)
    for kernel in compiled:
        kernels[kernel.name].append(kernel)
    heads = " ".join(f"{'sm_' + arch:>11}" for arch in archs)
    lines = [
        "Registers + bytes of stack of a thread; blocks x warps a multiprocessor; KiB of shared memory of a block.\n",
        f"{'kernel':<58} {'threads':>7} {'shared':>7} {heads}",
    ]
    faults = []
    for name in sorted(kernels):
        line, wrong = row(name, sorted(kernels[name], key=lambda kernel: archs.index(kernel.arch)), shapes.get(name))
        lines.append(line)
        faults += wrong
    never = ", ".join(sorted(set(kernels) - set(shapes))) or "none"
    lines.append(f"\n{len(kernels)} kernels, {len(archs)} chips; never launched by the tests: {never}")
    lines += faults or ["nothing spills (the build would fail); shared memory is within every chip's limit"]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
