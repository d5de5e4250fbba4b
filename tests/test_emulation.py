"""The emulation runs CUDA kernels right, and finds what it is for: each mistake planted into a test kernel."""

import os
import re
import subprocess
from pathlib import Path

import emulated
import pytest

SCHEDULES = ("order", "random:1", "random:2", "random:3", "priority:1", "priority:2", "priority:3")
CUDA_SOURCES = sorted((Path(__file__).parent.parent / "csrc" / "cuda").iterdir())

built = pytest.mark.skipif(not (emulated.FOLDER / "planted_plain").exists(), reason="needs make emulated")


def run(program, argument, schedule="order", **environment):
    """The exit status and all that is printed."""
    sanitizers = {
        "ASAN_OPTIONS": "detect_leaks=0",  # a grid that ends by an error keeps what its threads held
        "UBSAN_OPTIONS": "halt_on_error=1",
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
    }
    environment = os.environ | sanitizers | {"DELTAMEM_EMULATION_SCHEDULE": schedule} | environment

    def start(*prefix):
        command = [*prefix, emulated.FOLDER / program, argument]
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    done = start()
    if "unexpected memory mapping" in done.stdout:  # TSan of GCC 12 where the kernel spreads addresses wider
        done = start("setarch", "-R")
    return done.returncode, done.stdout


def run_planted(build, *arguments, **environment):
    """0: the result is right; 1: a rule is broken; 2: the result is wrong."""
    return run(f"planted_{build}", *arguments, **environment)


@built
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("build", ["plain", "address", "thread"])
def test_right_kernel(build, schedule):
    assert run_planted(build, "none", schedule) == (0, "error 0\n")


# Some schedule shows a wrong result, without a sanitizer.
@built
@pytest.mark.parametrize(
    "plant",
    [
        "missing_barrier",
        "overwritten_stage",
        "missing_wait",
        "weak_wait",
        "missing_sync_warp",
        "global_read",
        "shared_read",
        "shared_read_behind",
    ],
)
def test_wrong_values(plant):
    assert 2 in {run_planted("plain", plant, schedule)[0] for schedule in SCHEDULES}


# Whatever the schedule, an error names the rule, the line and the thread.
HERE = r"block \d thread \d+, planted.cu:\d+"
RULES = {
    "skipped_shuffle": r"lanes of one warp part: block \d thread \d+ is in shfl at planted.cu:(\d+), and here is shfl "
    r"\(block \d thread \d+, planted.cu:(?!\1)\d+\)",
    "other_barrier": r"lanes of one warp part: block \d thread \d+ is in sync_block at planted.cu:(\d+), and here is "
    r"sync_block \(block \d thread \d+, planted.cu:(?!\1)\d+\)",
    "early_end": r"it ends while block \d thread \d+ waits in sync_block"
    rf"|sync_block wants all lanes of the warp, and lane 5 has ended \({HERE}\)",
    "misaligned_copy": rf"cp_async takes addresses aligned to 16 bytes \({HERE}\)",
    "shared_write": r"something was stored behind an array, at byte \d+ of the shared memory of block \d",
    "deadlock": r"deadlock: 288 threads from block \d thread 0 in sync_block at planted.cu:\d+, "
    r"96 threads from block \d thread 32 in sync_named at planted.cu:\d+",
    "endless_wait": r"threads wait for each other without end: \d+ threads from block 0 thread \d+ in a loop "
    r"over atomics",
    "missing_grid_wait": r"it overlaps the previous kernel and never calls wait_for_previous_kernel",
}


@built
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("plant", RULES)
def test_broken_rules(plant, schedule):
    status, text = run_planted("plain", plant, schedule)
    assert status == 1
    assert re.search(RULES[plant], text), text
    assert re.search(rf"^emulated kernel .*product<.*; schedule {schedule}$", text), text


ADDRESS_REPORTS = {
    "global_read": ("heap-buffer-overflow", "planted.cu"),
    "shared_read": ("use-after-poison", "planted.cu"),
    "shared_write": ("use-after-poison", "planted.cu"),
    "shared_read_behind": ("heap-buffer-overflow", "planted.cu"),
    "misaligned_load": ("misaligned address", "planted.cu"),
}


@built
@pytest.mark.parametrize("plant", ADDRESS_REPORTS)
def test_address_sanitizer(plant):
    status, text = run_planted("address", plant, "random:5")
    assert status not in (0, 2, 3)
    for part in ADDRESS_REPORTS[plant]:
        assert part in text, text
    if "AddressSanitizer" in text:
        assert re.search(r"emulation: block \d thread \d+, schedule random:5", text), text


RACES = ("missing_barrier", "overwritten_stage", "missing_sync_warp", "missing_fence")


@built
@pytest.mark.parametrize("schedule", ["order", "random:1", "priority:1"])
@pytest.mark.parametrize("plant", RACES)
def test_thread_sanitizer(plant, schedule):
    status, text = run_planted("thread", plant, schedule)
    assert status == 66
    assert "ThreadSanitizer: data race" in text and text.count("planted.cu:") >= 2, text


@built
def test_values_do_not_see_a_missing_fence():
    """Memory of an emulated device is consistent at once: only TSan finds these."""
    assert {run_planted("plain", "missing_fence", schedule)[0] for schedule in SCHEDULES} == {0}


@built
def test_limits_of_the_device():
    _, text = run_planted("plain", "none", DELTAMEM_EMULATION_SHARED_MEMORY="4096")
    assert "a block has at most 4096 bytes of shared memory, got " in text
    _, text = run_planted("plain", "none", "backwards")
    assert "DELTAMEM_EMULATION_SCHEDULE must be order, random:N or priority:N" in text


# ---- the package's own kernels ---------------------------------------------------------------------------

OPS = (
    "delta_scan_fwd",
    "delta_scan_fwd_of_many_segments",
    "delta_scan_bwd",
    "delta_scan_bwd_of_many_segments",
    "delta_scan_with_state_pool",
    "delta_prep_fwd",
    "delta_prep_bwd",
    "delta_prep_with_kvcache",
    "delta_attention_fwd",
    "delta_attention_bwd",
    "delta_attention_with_kvcache",
    "delta_decode",
    "delta_decode_of_3_tokens_in_2_splits",
    "delta_output_fwd",
    "delta_output_bwd",
)


@built
@pytest.mark.parametrize("schedule", ["order", "random:1", "priority:1"])
@pytest.mark.parametrize("op", OPS)
def test_ops_do_not_race(op, schedule):
    """The op, twice, under TSan: no race, no broken rule, counters zero again."""
    assert run("races", op, schedule) == (0, "")


# ---- what kernels may not name ---------------------------------------------------------------------------

WORDS = {
    "a compiler or the emulation": r"#\s*(if|ifdef|ifndef|elif)\b.*(__CUDACC__|__CUDA_ARCH__|__NVCC__|\w*EMULAT\w*)",
    "the emulation": r"kEmulated",
    "shared memory without the carver": r"__shared__",
    "a launch without launch.cuh": r"<<<",
    "assembly": r"\basm\b",
    "intrinsics of a warp": r"__shfl|__ballot|__any_sync|__all_sync|__syncwarp|__match|__reduce\w*sync",
    "barriers": r"__syncthreads|__threadfence|cooperative_groups",
    "atomics": r"\batomic[A-Z]\w*\(",
    "the thread's place": r"\b(threadIdx|blockIdx|blockDim|gridDim)\b",
}


def test_only_ptx_knows_the_device():
    found = []
    for path in CUDA_SOURCES:
        if path.name == "ptx.cuh":
            continue
        # host code, not kernels: what the package is told, and which launches may overlap
        allowed = {"the emulation"} if path.name in ("device.cu", "launch.cuh") else set()
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            named = {what for what, word in WORDS.items() if re.search(word, code)}
            found += [f"{path.name}:{number} names {what}" for what in named - allowed]
    assert found == []
