"""The generation benchmark: its rows compute what they are named for, and its figures are those of its samples."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hf_models import error

sys.path.append(str(Path(__file__).parents[1] / "bench"))
generate = pytest.importorskip("generate", reason="the benchmarks need tqdm")
import generate_models as models  # noqa: E402
import timing  # noqa: E402

CPU = torch.device("cpu")


@torch.no_grad()
def test_rows_differ_in_who_computes_and_in_the_memory_alone():
    model = models.backbone("tiny", None, None, torch.float32, CPU)
    memories = models.Memories(model, None)
    rows = models.variants(model, memories)
    weights = {p.data_ptr() for p in model.parameters()}
    for row in rows.values():
        shared = {p.data_ptr() for name, p in row.named_parameters() if "delta_mem" not in name}
        assert weights >= shared  # one copy of the backbone serves all
    prompt = generate.prompt_ids(None, 512, 40, CPU)
    assert torch.equal(prompt[0, :11], prompt[0, 11:22])
    seen = {}
    for name, row in rows.items():
        again = []
        for _ in range(2):  # the second run meets nothing of the first
            run = generate.Run(row, prompt, 64, static=False)
            for _ in range(3):
                run.advance(1)
            again.append(row(run.token, past_key_values=run.cache).logits)
        assert torch.equal(*again), name
        assert len(run.seconds()) == 3 and min(run.seconds()) > 0
        seen[name] = again[0]
    assert error(seen[models.FROZEN], seen[models.STOCK]) < 1e-5
    assert error(seen[models.FUSED], seen[models.EAGER]) < 1e-5
    assert error(seen[models.FUSED], seen[models.STOCK]) > 0.01
    paths = [m.delta_mem.path for m in rows[models.FUSED]._delta_mem.attentions.values()]
    assert paths == ["fused"] * 3


@torch.no_grad()
def test_gate_refuses_wrong_results(monkeypatch):
    model = models.backbone("tiny", None, 2, torch.bfloat16, CPU)
    memories = models.Memories(model, None)
    assert len(memories.values) == 2
    shares = models.check(model, memories, torch.bfloat16)
    assert shares.keys() == {models.FROZEN, models.FUSED} and max(shares.values()) <= 1
    variants = models.variants

    def altered(model, memories):
        rows = variants(model, memories)
        rows[models.FUSED]._delta_mem.memories[0].delta_o_proj.mul_(1.5)
        return rows

    monkeypatch.setattr(models, "variants", altered)
    with pytest.raises(timing.GateError, match="delta-mem, fused: hidden states of 2 layers: error"):
        models.check(model, memories, torch.bfloat16)


def test_figures():
    # per round: prefill, then steps
    samples = {"a": [[2.0, 0.1, 0.3], [4.0, 0.1, 0.1]], "b": [[1.0, 0.2, 0.2], [1.0, 0.2, 0.6]]}
    found = generate.summary("a", samples, 3, {"ours": "b", "stock": "a"})
    assert found["prefill_s"] == 3.0
    assert found["full_generate_tokens_per_s"] == pytest.approx((3 / 2.4 + 3 / 4.2) / 2)
    assert found["decode_only_tokens_per_s"] == pytest.approx((2 / 0.4 + 2 / 0.2) / 2)
    assert [found[f"p{x}_ms"] for x in (50, 90, 99)] == pytest.approx([100, 300, 300])
    assert found["prefill_speed_vs_ours"] == pytest.approx((0.5 + 0.25) / 2)
    assert found["decode_speed_vs_ours"] == pytest.approx((1.0 + 4.0) / 2)
    assert found["median_step_speed_vs_ours"] == pytest.approx(2.0)
    assert "prefill_speed_vs_stock" not in found
    shorter = generate.summary("a", samples, 2, {"ours": "b"})  # the first tokens of the same runs
    assert shorter["decode_only_tokens_per_s"] == pytest.approx(10.0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_run(monkeypatch, capsys, tmp_path, cache):
    path = tmp_path / "out.json"
    options = f"--geometry tiny --layers 2 --prompts 24 50000 --new 3 5 --rounds 2 --device cpu --cache {cache}"
    monkeypatch.setattr(sys, "argv", ["/somewhere/generate.py", *options.split(), "--output", str(path)])
    generate.main()
    result = json.loads(path.read_text())
    assert "skipped: over 40960 positions" in capsys.readouterr().out
    rows = result["results"]
    assert [(r["new"], r["row"]) for r in rows] == [
        (new, name) for new in (3, 5) for name in (models.STOCK, models.FROZEN, models.FUSED, models.EAGER)
    ]
    for row in rows:
        assert row["prefill_s"] > 0 and row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["full_generate_tokens_per_s"] < row["decode_only_tokens_per_s"] * row["new"] / (row["new"] - 1)
    assert max(result["environment"]["gate"].values()) <= 1
    assert result["environment"]["command"] == f"generate.py {options}"
