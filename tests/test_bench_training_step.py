"""The benchmark of a training step: its rows compute one gradient, and a wrong one is refused."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hf_models import error

sys.path.append(str(Path(__file__).parents[1] / "bench"))
training_step = pytest.importorskip("training_step", reason="the benchmarks need tqdm")
import generate_models as models  # noqa: E402
import timing  # noqa: E402


def _rows(dtype):
    model = models.backbone("tiny", None, 2, dtype, torch.device("cpu"))
    memories = models.Memories(model, None)
    fused, loop = memories.attach(models.sharing(model)), models.with_eager_memory(models.sharing(model), memories)
    for row in (fused, loop):
        for p in training_step.parameters(row).values():
            p.requires_grad_(True)
    return model, memories, {training_step.KERNEL: fused, training_step.EAGER: loop}


def test_rows_compute_the_same_gradients():
    _, _, rows = _rows(torch.float32)
    tokens = torch.randint(512, (2, 60))
    found = [training_step.step(row, tokens[:, :40], tokens[:, 40:]) for row in rows.values()]
    assert found[0].keys() == found[1].keys() and len(found[0]) == 2 * 7
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0 and error(found[1][name], gradient) < 1e-4, name


def test_gate_refuses_a_wrong_gradient():
    model, memories, rows = _rows(torch.float32)
    tokens = torch.randint(512, (1, 256))
    assert training_step.check(rows, memories, model, tokens, torch.float32) <= 1
    with torch.no_grad():
        rows[training_step.KERNEL]._delta_mem.memories[0].beta_bias.add_(0.01)
    with pytest.raises(timing.GateError, match="training step: gradient of 0"):
        training_step.check(rows, memories, model, tokens, torch.float32)


def test_run(monkeypatch, tmp_path):
    path = tmp_path / "out.json"
    options = f"--write 24 --read 8 --seconds 0 --device cpu --output {path}"
    monkeypatch.setattr(sys, "argv", ["training_step.py", *options.split()])
    training_step.main()
    rows = json.loads(path.read_text())["results"]
    assert [row["row"] for row in rows] == [training_step.FROZEN, training_step.KERNEL, training_step.EAGER]
    loop = rows[2]
    for row in rows:
        assert row["speedup_over_eager"] == pytest.approx(loop["ms"] / row["ms"])
        assert row["tokens_per_s"] == pytest.approx(32e3 / row["ms"]) and row["ms_low"] <= row["ms"] <= row["ms_high"]
