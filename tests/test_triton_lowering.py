"""What Triton makes of every kernel on GPUs that are not here: a sample of the table that ``make static`` prints.

DELTAMEM_LOWERING=all compiles every configuration for every target.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import lowering
import pytest


@pytest.fixture(scope="module")
def table():
    """target -> rows. Its own process: kernels interpreted by this one do not compile."""
    arguments = [] if os.environ.get("DELTAMEM_LOWERING") == "all" else ["--sample"]
    run = subprocess.run(
        [sys.executable, Path(lowering.__file__), "--json", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    found = defaultdict(list)
    for line in run.stdout.splitlines():
        row = json.loads(line)
        found[row["target"]].append(row)
    assert found, run.stderr
    return found


@pytest.mark.parametrize("target", lowering.TARGETS)
def test_lowering(table, target):
    faults = [f"{row['name']}: {fault}" for row in table[target] for fault in lowering.faults(row)]
    assert not faults, "\n".join(faults)


def sass(*code):
    return "".join(f"        /*{16 * i:04x}*/                   {text} ;   /* 0x0 */\n" for i, text in enumerate(code))


def test_spills_count_where_loops_use_them():
    spill, body, back = "STL [R1], R2", ["FFMA R0, R1, R2, R0"] * lowering.SPIN, "@P0 BRA 0x10"
    used = lowering._local_in_loops
    assert used(sass(spill, *body, "LDL R3, [R1]", back, "EXIT")) == 1
    assert used(sass(spill, *body, back, "LDL R3, [R1]", "EXIT")) == 0
    assert used(sass(spill, *body, "LDL R3, [R1]", "EXIT")) == 2  # no loop
    assert used(sass(spill, "LDL R3, [R1]", back, "EXIT")) == 2  # a wait's spin is none
    outer = sass(spill, spill, *body, "@P0 BRA 0x20", "LDL R3, [R1]", back, "EXIT")
    assert used(outer) == 0


def test_summary():
    plain = dict.fromkeys((*lowering.COLUMNS, *lowering.INSTRUCTIONS), 0)
    rows = [
        plain | {"module": "delta_scan", "name": "replay_kernel bf16 a", "target": "sm_90", "registers": 40},
        plain | {"module": "delta_scan", "name": "replay_kernel fp32 b", "target": "sm_90", "registers": 30, "tf32": 1},
    ]
    head, line = lowering.summary(rows)
    assert head.split() == ["kernel", "target", "count", "wrong", "registers", "spills", "in", "loops", "shared"]
    assert line.split() == ["replay_kernel", "sm_90", "2", "1", "40", "0", "0", "0"]
