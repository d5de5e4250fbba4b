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
