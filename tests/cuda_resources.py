"""What every CUDA kernel takes of every GPU it is built for, without one: `make static` prints the table.

Registers and spills are ptxas's. Threads and shared memory of a block are those of the largest launch that the tests of
the emulated module make (a log that the emulation writes, --launches); blocks and warps that live on a multiprocessor
follow from both. Exits with 1 if a kernel spills or asks for more shared memory than a chip grants.
"""

import argparse
import os
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
PTXAS_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


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
    spilled: int  # bytes


def plain_name(text: str) -> str:
    """`name<arguments>` of a kernel, from how either compiler writes it."""
    found = re.search(r"(\w+_kernel)(<[^()]*>)?", text)
    arguments = found[2] or ""
    for spelled, plain in {"deltamem::ptx::": "", "deltamem::": "", "__nv_bfloat16": "bf16", "__half": "f16"}.items():
        arguments = arguments.replace(spelled, plain)
    arguments = re.sub(r"\((?:bool|int)\)", "", arguments).replace("true", "1").replace("false", "0")
    return found[1] + arguments.replace(", ", ",").replace("> >", ">>")


def compile_one(source: Path, arch: str) -> list[Kernel]:
    command = ["nvcc", "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]
    done = subprocess.run([*command, "-o", os.devnull, str(source)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    entries = PTXAS_ENTRY.findall(done.stderr)
    mangled = "\n".join(entry[0] for entry in entries)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True)
    return [
        Kernel(plain_name(name), arch, int(registers), int(stores) + int(loads))
        for name, (_, _, stores, loads, registers) in zip(names.stdout.splitlines(), entries, strict=True)
    ]


def launches(log: Path) -> dict[str, tuple[int, int]]:
    """kernel -> threads and shared bytes of its largest launch"""
    largest = defaultdict(lambda: (0, 0))
    for line in log.read_text().splitlines():
        threads, shared, text = line.split(" ", 2)
        name = plain_name(re.search(r"kKernel = (.*?)[;\]]", text)[1])
        largest[name] = max(largest[name], (int(threads), int(shared)), key=lambda shape: shape[1])
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
        if kernel.spilled:
            cell += "!"
            faults.append(f"{name} spills {kernel.spilled} bytes on sm_{kernel.arch}")
        if shape:
            blocks = resident_blocks(kernel, *shape)
            cell += f" {blocks}x{-(-shape[0] // 32)}"
            if shape[1] > CHIPS[kernel.arch].shared_kib_per_block * 1024:
                faults.append(f"{name} asks for {shape[1]} bytes of shared memory on sm_{kernel.arch}")
        cells.append(f"{cell:>9}")
    launched = f"{shape[0]:>7} {shape[1] / 1024:>7.1f}" if shape else f"{'-':>7} {'-':>7}"
    return f"{name:<58} {launched} {' '.join(cells)}", faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launches", type=Path, required=True, help="the emulation's log of launches")
    parser.add_argument("--output", type=Path, help="a file for the table")
    parser.add_argument("--archs", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    jobs = [(source, arch) for source in SOURCES for arch in options.archs]
    with ThreadPoolExecutor(options.processes) as pool:
        compiled = [kernel for kernels in pool.map(lambda job: compile_one(*job), jobs) for kernel in kernels]
    shapes = launches(options.launches)
    kernels = defaultdict(list)
    for kernel in compiled:
        kernels[kernel.name].append(kernel)
    heads = " ".join(f"{'sm_' + arch:>9}" for arch in options.archs)
    lines = [
        "Registers of a thread (! spills); blocks x warps that a multiprocessor holds; KiB of shared memory a block.\n",
        f"{'kernel':<58} {'threads':>7} {'shared':>7} {heads}",
    ]
    faults = []
    for name in sorted(kernels):
        line, wrong = row(name, kernels[name], shapes.get(name))
        lines.append(line)
        faults += wrong
    never = ", ".join(sorted(set(kernels) - set(shapes))) or "none"
    lines.append(f"\n{len(kernels)} kernels, {len(options.archs)} chips; never launched by the tests: {never}")
    lines += faults or ["no spills; shared memory within every chip's limit"]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
