"""The trainer: its loss, exact resumption, bad episodes, and one gradient whoever computes it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import error
from safetensors.torch import load_file

pytest.importorskip("accelerate", reason="the trainer needs accelerate")
sys.path.append(str(Path(__file__).parents[1] / "examples"))
import episodes
import train_adapter
import train_data
from accelerate.state import AcceleratorState, GradientState
from train_process import gradients

from deltamem_kernels import hf

COMMON = "--dtype float32 --learning-rate 0.02 --batch-size 4 --cpu"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    episodes.checkpoint(folder / "model")
    episodes.save(folder / "train.jsonl", map(episodes.episode, range(12)))
    return folder


def options(files, output, more=""):
    given = f"--model {files}/model --train {files}/train.jsonl --output {output} {COMMON} {more}"
    return train_adapter.arguments(given.split())


def forget():
    """accelerate remembers how a process began."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def built(files, output, more=""):
    forget()
    return train_adapter.build(options(files, output, more))


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_memory_alone_learns_and_lands_in_the_published_format(files, tmp_path):
    forget()
    given = f"--model {files}/model --train {files}/train.jsonl --eval {files}/train.jsonl --output {tmp_path} {COMMON}"
    assert train_adapter.main([*given.split(), "--steps", "24", "--micro-batch-size", "2", "--eval-steps", "12"]) == 0
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(25))
    evaluated = {row["step"]: row for row in rows if "eval_loss" in row}
    assert list(evaluated) == [0, 12, 24]
    first, last = evaluated[0], evaluated[24]
    assert last["eval_loss"] < 0.5 * first["eval_loss"] and last["eval_token_accuracy"] > 0.5
    # the backbone learned nothing: without a memory, all is as it was
    assert last["eval_loss_empty_memory"] == pytest.approx(first["eval_loss_empty_memory"], rel=1e-6)
    assert rows[1]["learning_rate"] == 0 and rows[3]["learning_rate"] == pytest.approx(0.02)
    assert rows[1]["gate"] == pytest.approx(torch.sigmoid(torch.tensor(-1.5)).item(), rel=1e-5)
    assert any((tmp_path / "tensorboard").iterdir())
    model = train_adapter.load_model(options(files, tmp_path), hf.DeltaMemConfig(rank=2), None)
    backbone = {n: p.clone() for n, p in model.named_parameters() if "delta_mem" not in n}
    hf.detach(model)
    config = hf.load_adapter(model, tmp_path)
    assert (tmp_path / "delta_mem_adapter.pt").exists()
    assert config.delta_heads == ("q", "o") and config.output_init == "base_slice_fixed"
    assert all(torch.equal(p, backbone[n]) for n, p in model.named_parameters() if n in backbone)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("more", ["", "--micro-batch-size 2 --no-gradient-checkpointing --weight-decay 0.1"])
def test_an_interrupted_run_goes_on_to_the_same_bits(files, tmp_path, more, monkeypatch):
    more += " --steps 5 --save-steps 2"
    built(files, tmp_path / "whole", more).run()
    trainer = built(files, tmp_path / "cut", more)
    update = trainer.update

    def interrupted():
        if trainer.step == 3:
            raise Interrupted
        return update()

    trainer.update = interrupted
    with pytest.raises(Interrupted):
        trainer.run()
    assert [x.name for x in train_adapter.checkpoints(tmp_path / "cut")] == ["checkpoint-2"]
    assert [row["step"] for row in metrics(tmp_path / "cut")] == [1, 2, 3]
    with pytest.raises(ValueError, match="--output must be a folder without checkpoints"):
        built(files, tmp_path / "cut", more)
    with pytest.raises(ValueError, match=r"--resume: seed must be that of .*checkpoint-2, 42, got 7"):
        built(files, tmp_path / "cut", more + " --resume --seed 7")
    built(files, tmp_path / "cut", more + " --resume").run()
    ours, theirs = (tmp_path / name / "checkpoint-5" for name in ("cut", "whole"))
    parameters, expected = (load_file(x / "delta_mem_adapter.safetensors") for x in (ours, theirs))
    assert all(torch.equal(parameters[n], expected[n]) for n in expected)
    moments, expected = (torch.load(x / "trainer.pt", weights_only=True)["optimizer"]["state"] for x in (ours, theirs))
    assert all(torch.equal(moments[n][m], x) for n in expected for m, x in expected[n].items())
    timeless = [
        [{k: x for k, x in row.items() if k != "seconds"} for row in metrics(tmp_path / n)] for n in ("cut", "whole")
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 5


def test_one_gradient_for_any_cut_into_micro_batches(files, tmp_path):
    variants = ["--micro-batch-size 4", "--micro-batch-size 1", "--no-gradient-checkpointing --micro-batch-size 4"]
    found = [gradients(built(files, tmp_path / str(i), more)) for i, more in enumerate(variants)]
    for other in found[1:]:
        for n, grad in found[0].items():
            assert grad.abs().max() > 0 and error(other[n], grad) < 5e-6, n


def test_sparsity_pulls_the_written_gates_to_their_target(files, tmp_path):
    # gates at the target give no gradient; the term's gradient is that of its formula, by finite differences
    def grads(more):
        return gradients(built(files, tmp_path / more.replace(" ", ""), more))

    without, light, heavy = (grads(f"--sparsity {x}") for x in (0, 1, 3))
    bias = [n for n in without if n.endswith("beta_bias")]
    for n in without:
        assert error(3 * (light[n] - without[n]), heavy[n] - without[n]) < 1e-3 or "delta_o" in n, n
    trainer = built(files, tmp_path / "value", "--sparsity 1")
    batch = train_data.collate(trainer.data.step(0, 4, 42))

    def distance():
        state = hf.DeltaMemState.zeros(trainer.memory, 4)
        train_adapter.write(trainer.model, batch, state)
        return (torch.stack(state.gates).double() - 0.05).square().mean().item()

    for n in bias:
        p = trainer.memory.get_parameter(n.replace("beta_bias", "delta_mem.beta_bias"))
        values = []
        for h in (1e-2, -2e-2):
            with torch.no_grad():
                p.add_(h)
            values.append(distance())
        with torch.no_grad():
            p.add_(1e-2)
        assert (values[0] - values[1]) / 2e-2 == pytest.approx((light[n] - without[n]).sum().item(), rel=2e-2), n
        assert (light[n] - without[n]).min() > 0  # gates of 0.18 are above 0.05: descent closes them


@pytest.mark.parametrize("granularity", ["message_mean", "sentence_mean"])
def test_segments_are_the_messages_or_sentences(files, granularity, tmp_path):
    tokenizer = episodes.tokenizer()
    lines = [{
        "context": [{"role": "system", "content": "w1 . w2"}, {"role": "user", "content": "w3 . w4 w5 ."}],
        "question": "what ?", "answer": "red",
    }]  # fmt: skip
    path = episodes.save(tmp_path / "one.jsonl", lines)
    found = train_data.Dataset(path, tokenizer, train_data.Limits(), granularity).episodes[0]
    words = tokenizer.convert_ids_to_tokens(found.context.tolist())
    assert words == "<system> w1 . w2 <eos> <user> w3 . w4 w5 . <eos>".split()
    messages, sentences = [0] * 5 + [1] * 7, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    assert found.segments.tolist() == (messages if granularity == "message_mean" else sentences)
    assert tokenizer.decode(found.question) == "<system> w1 . w2 <eos> <user> what ? <eos> <assistant>"
    assert tokenizer.decode(found.answer) == "red <eos>"
    more = f'--memory {{"memory_write_granularity":"{granularity}"}} --micro-batch-size'
    whole, single = (gradients(built(files, tmp_path / x, f"{more} {x}")) for x in "41")
    for n, grad in whole.items():
        assert error(single[n], grad) < 1e-5, n


def test_without_a_chat_template(files, tmp_path):
    tokenizer = episodes.tokenizer(template=None)
    path = episodes.save(tmp_path / "one.jsonl", [episodes.episode(1)])
    found = train_data.Dataset(path, tokenizer, train_data.Limits()).episodes[0]
    assert tokenizer.decode(found.question) == "what is the code of w1 ?"
    assert tokenizer.decode(found.answer) == "blue . <eos>"


def test_steps_draw_every_episode_once_an_epoch(files):
    data = train_data.Dataset(files / "train.jsonl", episodes.tokenizer(), train_data.Limits())
    drawn = [id(e) for step in range(9) for e in data.step(step, 4, seed=1)]
    for epoch in range(3):
        assert sorted(drawn[12 * epoch : 12 * epoch + 12]) == sorted(map(id, data.episodes))
    assert drawn[:12] != drawn[12:24]
    assert [id(e) for e in data.step(1, 5, 1)] == drawn[5:10] and len(data.step(0, 30, 1)) == 30


GOOD = episodes.episode(2)
BAD_LINES = {
    "no JSON": ("{", "line must be JSON"),
    "list": ("[1]", "line must be an object, got list"),
    "no answer": ({"context": GOOD["context"], "question": "w1"}, "answer must be given, got only context, question"),
    "empty answer": (GOOD | {"answer": " "}, "answer must be a text that is not empty, got ' '"),
    "number": (GOOD | {"question": 3}, "question must be a text that is not empty, got 3"),
    "no messages": (GOOD | {"context": []}, r"context must be a list of messages, at least one, got \[\]"),
    "text as context": (GOOD | {"context": "w1"}, "context must be a list of messages, at least one, got 'w1'"),
    "no content": (GOOD | {"context": [{"role": "user"}]}, r"context\[0\] must be an object with role and content"),
    "null": (
        GOOD | {"context": [*GOOD["context"], {"role": "user", "content": None}]},
        r"context\[3\].content must be a text that is not empty, got None",
    ),
    "long context": (
        GOOD | {"context": [{"role": "user", "content": "w1 " * 60}]},
        r"context must have at most 50 tokens \(or be cut by --truncate-context\), got 62",
    ),
    "long question": (
        GOOD | {"question": "w1 " * 30},
        r"question and answer must have at most 30 tokens, got 33 \+ 2",
    ),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_episodes_are_refused_by_file_line_and_field(case, tmp_path):
    line, text = BAD_LINES[case]
    path = tmp_path / "episodes.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line if isinstance(line, str) else json.dumps(line)}\n")
    with pytest.raises(train_data.EpisodeError, match=f"episodes.jsonl:3: {text}"):
        train_data.Dataset(path, episodes.tokenizer(), train_data.Limits(50, 30))


def test_truncation_keeps_the_latest_tokens(tmp_path):
    messages = [{"role": "user", "content": "w1 " * 60}, {"role": "user", "content": "w2 w3"}]
    path = episodes.save(tmp_path / "long.jsonl", [GOOD | {"context": messages}])
    limits = train_data.Limits(6, 30, truncate_context=True)
    found = train_data.Dataset(path, episodes.tokenizer(), limits, "message_mean").episodes[0]
    assert episodes.tokenizer().decode(found.context) == "w1 <eos> <user> w2 w3 <eos>"
    assert found.segments.tolist() == [0, 0, 1, 1, 1, 1]


def test_bad_calls_end_with_one_sentence(files, tmp_path, capsys):
    for name, data in {"empty": b"\n", "binary": b"\xff\xfe"}.items():
        (tmp_path / name).write_bytes(data)
    cases = {
        "--batch-size 6 --micro-batch-size 4": "--batch-size must be a multiple of processes x --micro-batch-size = 4",
        f"--train {tmp_path}/empty": "empty: file must hold at least one episode, got none",
        f"--train {tmp_path}/binary": "binary: file must be UTF-8",
        f"--train {tmp_path}/missing": "No such file",
        f"--model {tmp_path}/missing": "missing",
        '--memory {"rnak":8}': "DeltaMemConfig: options must hold only known keys",
    }
    for more, text in cases.items():
        given = f"--model {files}/model --train {files}/train.jsonl --output {tmp_path}/out {COMMON} {more}"
        forget()
        assert train_adapter.main(given.split()) == 1
        assert text in capsys.readouterr().err, more
    with pytest.raises(SystemExit):
        options(files, tmp_path, "--save-steps 0")
    assert "--save-steps must be >= 1, got 0" in capsys.readouterr().err


def test_two_processes_compute_the_gradients_of_one(files, tmp_path):
    more = f"--eval {files}/train.jsonl --steps 3 --save-steps 2"
    alone = built(files, tmp_path / "alone", more)
    expected = gradients(alone)
    alone.optimizer.zero_grad()
    alone.run()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = f"--model {files}/model --train {files}/train.jsonl {COMMON} {more}"
    command = [sys.executable, Path(__file__).with_name("train_process.py"), tmp_path, shared, "ddp", "fsdp2"]
    two = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            command, env=os.environ | two | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)[-4000:]
    for kind in ("ddp", "fsdp2"):
        found = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for n, grad in expected.items():
            # fp32 sums over the batch in another order: ten rounding units
            assert error(found[n], grad) < 16 * torch.finfo(torch.float32).eps, (kind, n)
        for row, one in zip(metrics(tmp_path / kind), metrics(tmp_path / "alone"), strict=True):
            assert {k: x for k, x in row.items() if k != "seconds"} == pytest.approx(
                {k: x for k, x in one.items() if k != "seconds"}, rel=1e-4
            )
        # whole parameters in its files, which one process goes on from
        adapter = torch.load(tmp_path / kind / "delta_mem_adapter.pt", weights_only=True)
        one = torch.load(tmp_path / "alone" / "delta_mem_adapter.pt", weights_only=True)
        assert all(x.shape == one[n].shape and error(x, one[n]) < 1e-3 for n, x in adapter.items() if one[n].any())
        resumed = built(files, tmp_path / kind, more + " --resume")
        assert resumed.step == 3
        for name, p in resumed.memory.named_parameters():
            if p.requires_grad:
                assert torch.equal(p, adapter[name.replace(".delta_mem", "")])
