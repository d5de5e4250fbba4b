"""How every benchmark measures: environment, correctness gate, interleaved medians, ceilings, results.

Units are seconds, bytes and operations; only the printing scales them. A case is a list of calls, one per
buffer copy, and the copies together are larger than the last-level cache, so that no call finds its inputs
there. Cases are timed in turns inside one run, so that their ratios do not carry the machine's drift.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
METHOD = (
    "medians of interleaved rounds after warm-up, buffers rotated beyond the last-level cache, "
    "every case checked against fp64 before timing"
)
NVIDIA_SMI = {"driver": "driver_version", "sm_clock": "clocks.sm", "memory_clock": "clocks.mem"}
TURN_S = 0.03  # how long a case keeps the machine in each round
LEAST_ROUNDS = {"cpu": 3, "cuda": 20}


# ---------------------------------------------------------------- environment


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def environment(device: torch.device, dtype: str, method: str = METHOD) -> dict:
    """Everything that a number depends on."""
    found = {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "last_level_cache_bytes": cache_bytes(device),
        "threads": torch.get_num_threads(),
        "cores_busy_before": _cores_busy(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "deltamem_kernels": _version("deltamem_kernels") or _version("deltamem-kernels"),
        "commit": _commit(),
        "command": _command(),
        "dtype": dtype,
        "method": method,
    }
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda} | {name: _nvidia_smi(query) for name, query in NVIDIA_SMI.items()}
    return found


def print_header(title: str, env: dict) -> None:
    versions = " · ".join(f"{key} {env[key]}" for key in ("deltamem_kernels", "commit", "torch", "triton", "python"))
    device = f"driver {env['driver']} · CUDA {env['cuda']}" if "cuda" in env else f"{env['threads']} threads"
    print(
        f"{title} · {env['dtype']}\n{env['hardware']} · {device} · last-level cache "
        f"{env['last_level_cache_bytes'] >> 20} MiB\n{versions}\n{env['method']}\n",
        flush=True,
    )
    if (env["cores_busy_before"] or 0) > 0.25:
        print(f"Other processes keep {env['cores_busy_before']:.1f} cores busy: trust the ratios only.\n")


def _cores_busy(seconds: float = 0.25) -> float | None:
    """What other processes use of the machine."""

    def ticks():
        return [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]

    try:
        before = ticks()
        time.sleep(seconds)
        spent = [after - start for after, start in zip(ticks(), before, strict=True)]
    except OSError:
        return None
    return os.cpu_count() * (1 - (spent[3] + spent[4]) / max(1, sum(spent)))  # idle and waiting for a disk


def cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    with contextlib.suppress(OSError, ValueError):
        return max(int(size.read_text().strip().rstrip("K")) << 10 for size in sizes)
    return 32 << 20


def copies_beyond_cache(bytes_per_copy: int, device: torch.device) -> int:
    """Enough copies that a full turn touches four (GPU: six) times the last-level cache."""
    times = 6 if device.type == "cuda" else 4
    return max(1, math.ceil(times * cache_bytes(device) / bytes_per_copy))


def _cpu_name() -> str:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _nvidia_smi(query: str) -> str | None:
    return _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """A copy of the sources that git knows nothing of is told its commit by DELTAMEM_COMMIT."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = _output([*git, "rev-parse", "--short", "HEAD"])
    if commit is None:
        return os.environ.get("DELTAMEM_COMMIT") or None
    return commit + ("+changes" if _output([*git, "status", "--porcelain", "-uno"]) else "")


def _command() -> str:
    """What was run, without paths of this machine: where the results went says nothing of them."""
    output = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    output.add_argument("--output")
    return shlex.join([Path(sys.argv[0]).name, *output.parse_known_args(sys.argv[1:])[1]])


def _output(command: list[str]) -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return text.splitlines()[0] if text else None
    return None


# ---------------------------------------------------------------- correctness gate


class GateError(AssertionError):
    """A result outside its error budget: nothing about it is printed."""


def budget(eager: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Twice the eager same-dtype pipeline's error plus one rounding unit of the result, both against fp64."""
    eager_error = (eager.double() - want).abs().max() if want.numel() else 0.0
    return 2 * eager_error + torch.finfo(dtype).eps / 2 * want.abs()


def gate(name: str, got: torch.Tensor, want: torch.Tensor, allowed: torch.Tensor | float) -> None:
    """Raise unless |got - want| <= allowed everywhere; NaN never passes."""
    if got.shape != want.shape:
        raise GateError(f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    error = (got.double() - want.double()).abs()
    if not bool((error <= allowed).all()):
        limit = float(torch.as_tensor(allowed).max())
        raise GateError(f"{name}: error {float(error.max()):.3e} exceeds its budget of about {limit:.3e}")


# ---------------------------------------------------------------- timing


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and the 20th and 80th percentile as its noise band."""

    median: float
    low: float
    high: float
    samples: int


Case = Sequence[Callable[[], object]]


def measure(
    cases: dict[str, Case], device: torch.device, seconds: float, graph: bool = True, rounds: int | None = None
) -> dict[str, Timing]:
    """Time each case for about `seconds` and at least `rounds` times, in turns. On a GPU by events, from graph replays
    if `graph`; else a call that is shorter than its launches shows the time of those."""
    least = rounds or LEAST_ROUNDS[device.type]
    if device.type != "cuda":
        return _measure_cpu(cases, seconds, least)
    if not graph:
        return _measure_cuda(cases, dict.fromkeys(cases, 1), seconds, least)
    replays = {name: [_captured(calls)] for name, calls in cases.items()}
    return _measure_cuda(replays, {name: len(calls) for name, calls in cases.items()}, seconds, least)


def _measure_cpu(cases: dict[str, Case], seconds: float, least: int) -> dict[str, Timing]:
    samples: dict[str, list[float]] = {name: [] for name in cases}
    turn = dict.fromkeys(cases, 0)
    calls_per_round = {}
    for name, calls in cases.items():
        calls[0]()
        start = time.perf_counter()
        calls[-1]()
        calls_per_round[name] = max(1, int(TURN_S / max(time.perf_counter() - start, 1e-7)))
    deadline = time.perf_counter() + seconds * len(cases)
    rounds = 0
    while rounds < least or time.perf_counter() < deadline:
        rounds += 1
        for name, calls in cases.items():
            # The first call of a turn still meets the previous case's spinning threads: not counted.
            for index in range(calls_per_round[name] + (calls_per_round[name] > 1)):
                call = calls[turn[name] % len(calls)]
                turn[name] += 1
                start = time.perf_counter()
                call()
                elapsed = time.perf_counter() - start
                if index or calls_per_round[name] == 1:
                    samples[name].append(elapsed)
    return {name: _summary(values) for name, values in samples.items()}


def _captured(calls: Case) -> Callable[[], object]:
    """One replay runs every copy once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()
    return captured.replay


def _measure_cuda(
    cases: dict[str, Case], calls_per_sample: dict[str, int], seconds: float, least: int
) -> dict[str, Timing]:
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for calls in cases.values():
        for call in calls:
            call()
    torch.cuda.synchronize()
    deadline = time.perf_counter() + seconds * len(cases)
    rounds = 0
    while rounds < least or time.perf_counter() < deadline:
        for name, calls in cases.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            calls[(rounds + 1) % len(calls)]()  # not counted: the previous case owned the caches
            begin.record()
            calls[rounds % len(calls)]()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end) * 1e-3 / calls_per_sample[name])
        rounds += 1
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    pick = [ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.2, 0.8)]
    return Timing(statistics.median(ordered), pick[0], pick[1], len(ordered))


# ---------------------------------------------------------------- ceilings


@dataclass(frozen=True)
class Ceiling:
    """What the machine can do at best: `amount` (bytes or operations) per `call`. Timed beside the cases."""

    name: str
    call: Callable[[], object]
    amount: float

    def rate(self, timing: Timing) -> float:
        return self.amount / timing.median


def read_ceiling(device: torch.device) -> Ceiling:
    """CPU: the fastest torch reduction of a buffer far beyond the cache. GPU: a copy, counted twice."""
    size = 16 * cache_bytes(device)
    source = torch.empty(size // 4, device=device)
    fill_random(source)
    if device.type == "cuda":
        target = torch.empty_like(source)
        return Ceiling("copy bandwidth", lambda: target.copy_(source), 2 * size)
    rows, words = source.view(-1, 4096), source.view(torch.int64)
    candidates = {
        "sum": source.sum,
        "row maxima": lambda: rows.amax(1),
        "row sums": lambda: rows.sum(1),
        "int64 sum": words.sum,
    }
    times = measure({name: [call] for name, call in candidates.items()}, device, 0.2)
    best = min(times, key=lambda name: times[name].median)
    return Ceiling(f"read bandwidth ({best})", candidates[best], size)


def gemm_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """A square GEMM large enough to be bound by arithmetic."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    return Ceiling(f"{n}x{n}x{n} GEMM rate", lambda: torch.mm(a, b, out=out), 2.0 * n**3)


def fill_random(tensor: torch.Tensor) -> torch.Tensor:
    """Standard normal values, one drawn block repeated: zeros flatter the machine, drawing all is slow."""
    flat = tensor.view(-1)
    block = torch.randn(min(flat.numel(), (1 << 20) + 4099), device=tensor.device).to(tensor.dtype)
    for start in range(0, flat.numel(), block.numel()):
        part = flat[start : start + block.numel()]
        part.copy_(block[: part.numel()])
    return tensor


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """The call's highest point above the level before it, in bytes, result included; None if not observable.

    CPU: resident pages, scratch of C++ kernels included, in counters that lag by some hundred KiB.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the resident-set high-water mark
    except (OSError, AttributeError):
        return None
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) << 10


# ---------------------------------------------------------------- output


class Table:
    """Aligned rows, printed as they come, above a running progress bar. A negative width aligns to the left."""

    def __init__(self, columns: dict[str, int]):
        self.widths = list(columns.values())
        self.row(*columns)
        tqdm.write("-+-".join("-" * abs(width) for width in self.widths))

    def row(self, *cells: object) -> None:
        padded = [
            str(cell).rjust(width) if width > 0 else str(cell).ljust(-width)
            for cell, width in zip(cells, self.widths, strict=True)
        ]
        tqdm.write(" | ".join(padded).rstrip())


def progress(items: Iterable, label: str, total: int | None = None) -> tqdm:
    return tqdm(items, desc=label, total=total, leave=False, dynamic_ncols=True)


def microseconds(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f}%" if abs(share) >= 0.1 else f"{100 * share:.1f}%"


def write_results(path: str | None, env: dict, results: list[dict]) -> None:
    if path:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"environment": env, "results": results}, indent=1) + "\n")
        print(f"results: {target}")


def parser(doc: str, dtype: str, seconds: float = 1.0) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    shared = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shared.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    shared.add_argument("--dtype", default=dtype, choices=list(DTYPES))
    shared.add_argument("--backend", default="auto", help="auto, reference, cpu, triton or cuda")
    shared.add_argument("--seconds", type=float, default=seconds, help="measuring time per case")
    shared.add_argument("--output", help="JSON file for the results")
    return shared
