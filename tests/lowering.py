"""Compiles Triton kernels for GPUs that are not there, and says what came out of it.

``python lowering.py`` prints a table of every kernel and configuration that the launchers can pick, on every
target, with what is wrong with it; ``--sample`` a few of each module, over all targets; ``--json`` as one JSON object
per line; ``--summary FILE`` also writes a line per kernel and target. Arguments are parts of names: only
configurations that contain one of them. Must run without TRITON_INTERPRET. TRITON_CACHE_DIR names a place for what is
compiled: a second run then compiles what has changed.
"""

import argparse
import importlib.metadata
import importlib.util
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

MODULES = ("delta_scan", "delta_prep", "delta_attention", "delta_decode", "delta_output")
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# as the launchers' tables name the devices
CAPABILITY = {"sm_80": (8, 0), "sm_86": (8, 6), "sm_89": (8, 9), "sm_90": (9, 0), "sm_100": (10, 0), "gfx942": (0, 0)}
# bytes of shared memory that one block may have
SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
SHARED_LIMIT = {target: kib * 1024 for target, kib in SHARED_LIMIT.items()}

# Modules whose arithmetic is fp32 FMA, whose products belong on tensor cores, whose time is memory's.
EXACT = ("delta_scan", "delta_prep", "delta_output")
PRODUCTS = ("delta_attention", "delta_decode")
STREAMING = ("delta_prep", "delta_output")
HALF, MAIN = re.compile(r"^\w+ (bf16|fp16) "), re.compile(r"^(attention|decode|prep|output)_\w*kernel .*")
SPIN = 32  # instructions: a shorter loop only waits for a barrier
SAMPLE = 8  # configurations per module that a test run compiles
COLUMNS = ("registers", "spills", "in loops", "shared", "warps")

# what a table row counts in a kernel's assembly
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\b(?:mma\.sync|v_mfma_)",
    "tcgen05": r"tcgen05\.mma",
    "tf32": r"\.tf32\b|_xf32",
    "ld16": r"ld\.global[\w.:]*\.(?:v4\.b32|v2\.b64)|cp\.async\.c[ag][\w.:]* \[[^]]*\], \[[^]]*\], (?:0x10|16)"
    r"|cp\.async\.bulk|(?:global|buffer)_load_dwordx4",
    "st16": r"st\.global[\w.:]*\.(?:v4\.b32|v2\.b64)|(?:global|buffer)_store_dwordx4",
    "atomic": r"\b(?:atom|red)\.global|(?:global|buffer)_atomic",
}


def lowerings(module, target):
    """What the module's launchers pick; on that target, where they pick by device."""
    found = importlib.import_module(f"deltamem_kernels.triton_ops.{module}").lowerings
    return found(CAPABILITY[target]) if inspect.signature(found).parameters else found()


def compiled(module, index, target):
    """One configuration compiled for one target, as a row of the table."""
    import triton
    from triton.backends.compiler import GPUTarget

    configuration = next(x for i, x in enumerate(lowerings(module, target)) if i == index)
    name, kernel, signature, constexprs, options = configuration
    row = {"module": module, "name": name, "target": target}
    # Pointers are those of fresh tensors, integers that launches specialise on are strides: both multiples of 16.
    # A tuple is a tensor with its own strides, of which nothing is known.
    free = {p.name for p in kernel.params if p.do_not_specialize}
    aligned = [
        (i,)
        for i, (argument, kind) in enumerate(signature.items())
        if isinstance(kind, str) and (kind.startswith("*") or (kind in ("i32", "i64") and argument not in free))
    ]
    aligned += [
        (i, j)
        for i, kinds in enumerate(signature.values())
        if isinstance(kinds, tuple)
        for j, kind in enumerate(kinds)
        if kind.startswith("*")
    ]
    attrs = {path: [["tt.divisibility", 16]] for path in aligned}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    try:
        binary = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(options))
    except Exception as error:  # a row of its own, so that the table shows all that fail
        return row | {"error": f"{type(error).__name__}: {error}"[:2000]}
    assembly = binary.asm["amdgcn" if target.startswith("gfx") else "ptx"]
    counts = {word: len(re.findall(pattern, assembly)) for word, pattern in INSTRUCTIONS.items()}
    used = _amd_usage(assembly) if target.startswith("gfx") else _nvidia_usage(binary.asm["cubin"], triton)
    return row | used | {"shared": binary.metadata.shared, "warps": binary.metadata.num_warps} | counts


def _nvidia_usage(cubin, triton):
    """Registers per thread, bytes of local memory (stack and spills) per thread, accesses to it in innermost loops."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def dump(option):
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = dump("-res-usage")
        registers, stack, local = (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK", "LOCAL"))
        hot = _local_in_loops(dump("-sass")) if stack + local else 0
    return {"registers": registers, "spills": stack + local, "in loops": hot}


def _local_in_loops(sass):
    """Loads and stores of local memory inside the innermost loops, each of which ends in a branch back. Only there does
    a spill cost; all of them where there is no loop."""
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    branches = [(int(m[1], 16), at) for at, text in code if (m := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text))]
    loops = {(first, last) for first, last in branches if last - first >= SPIN * 16}  # of 16 bytes each
    inner = [x for x in loops if not any(x[0] <= y[0] and y[1] <= x[1] and x != y for y in loops)]
    local = [at for at, text in code if re.search(r"\b(LDL|STL)\b", text)]
    return sum(not inner or any(first <= at <= last for first, last in inner) for at in local)


def _amd_usage(assembly):
    """Vector registers per lane and those that spilled, wherever."""
    count, spilled = (int(re.search(rf"\.{word}:\s+(\d+)", assembly)[1]) for word in ("vgpr_count", "vgpr_spill_count"))
    return {"registers": count, "spills": spilled, "in loops": spilled}


def faults(row):
    """What is wrong with a row, in words."""
    if "error" in row:
        yield row["error"]
        return
    nvidia, module, name, limit = (
        row["target"].startswith("sm_"),
        row["module"],
        row["name"],
        SHARED_LIMIT[row["target"]],
    )
    if row["in loops"]:
        yield f"spills {row['spills']} bytes, used {row['in loops']} times in its innermost loops"
    if row["shared"] > limit:
        yield f"{row['shared']} bytes of shared memory, {row['target']} has {limit}"
    if row["tf32"] or row["atomic"]:
        yield f"{row['tf32']} TF32 instructions and {row['atomic']} atomics, where results must be exact and repeatable"
    products = row["wgmma"] + row["mma"] + row["tcgen05"]
    if module in EXACT and products:
        yield f"{products} tensor-core instructions in fp32 arithmetic"
    if module in PRODUCTS and HALF.search(name) and MAIN.search(name) and not products:
        yield "no tensor-core instructions"
    if name.startswith("attention_fwd") and HALF.search(name) and row["target"] == "sm_90" and not row["wgmma"]:
        yield "no wgmma"
    if module in STREAMING and nvidia and MAIN.search(name) and not row["ld16"]:
        yield "no 16-byte loads"


def jobs(sample, targets, wanted):
    """(module, index, target) to compile; a sample takes about SAMPLE of each module, evenly over all of them."""
    for module in MODULES:
        if importlib.util.find_spec(f"deltamem_kernels.triton_ops.{module}") is None:
            continue
        found = [
            (module, index, target)
            for target in targets
            for index, (name, *_) in enumerate(lowerings(module, target))
            if not wanted or any(part in f"{module} {name}" for part in wanted)
        ]
        yield from found[:: max(1, len(found) // SAMPLE) if sample else 1]


def rows(sample=False, targets=tuple(TARGETS), wanted=(), processes=2):
    """Table rows, compiled by a few processes."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            yield from pool.imap(_compiled, jobs(sample, targets, wanted), chunksize=1)


def _compiled(job):
    return compiled(*job)


def summary(found):
    """A line per kernel and target: its configurations, those with faults, and what one of them takes at most."""
    kernels = {}
    for row in found:
        kernels.setdefault((row["name"].split()[0], row["target"]), []).append(row)
    yield f"{'kernel':30}{'target':8}" + "".join(f"{word:>11}" for word in ("count", "wrong", *COLUMNS[:-1]))
    for (kernel, target), group in sorted(kernels.items()):
        most = (max(row.get(column, 0) for row in group) for column in COLUMNS[:-1])
        wrong = sum(any(faults(row)) for row in group)
        yield f"{kernel:30}{target:8}" + "".join(f"{number:>11}" for number in (len(group), wrong, *most))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wanted", nargs="*")
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--summary", type=Path)
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("lowering.py: TRITON_INTERPRET must be unset, got 1: interpreted kernels do not compile")
    columns = (*COLUMNS, *INSTRUCTIONS)
    if not args.json:
        print(f"{'kernel':78}{'target':8}", *(f"{column:>9}" for column in columns))
    found = []
    for row in rows(args.sample, tuple(args.target or TARGETS), args.wanted, args.processes):
        found.append(row)
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        if "error" not in row:
            figures = " ".join(f"{row[column]:>9}" for column in columns)
            print(f"{row['name']:78}{row['target']:8}", figures, flush=True)
        for fault in faults(row):
            print(f"{row['name']:78}{row['target']:8} WRONG: {fault}", flush=True)
    if args.summary:
        version = importlib.metadata.version("triton")
        args.summary.write_text("\n".join((f"Compiled by Triton {version} with no device.\n", *summary(found))) + "\n")
    sys.exit(any(any(faults(row)) for row in found))


if __name__ == "__main__":
    main()
