"""The terminal chat, fed from a pipe."""

import importlib.util
import io
import re
import sys
from pathlib import Path

import pytest
from hf_models import attached, random_model
from session_process import byte_tokenizer

from deltamem_kernels import hf

EXAMPLE = Path(__file__).parents[1] / "examples" / "chat.py"


@pytest.fixture
def chat(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("chat_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(lines, *options, code=0):
        monkeypatch.setattr(sys, "argv", ["chat.py", "--max-new-tokens", "6", "--device", "cpu", *map(str, options)])
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        assert module.main() == code
        captured = capsys.readouterr()
        return captured.out.splitlines()[1:] if code == 0 else captured.err

    run.module = module
    return run


def test_commands(chat, tmp_path):
    folder = tmp_path / "s"
    lines = ["hello there", "/save", "and now?", "/undo", "and now?", "/forget", "/memory", "/clear", "/memory"]
    lines += ["/undo", "/what", "", f"/load {tmp_path / 'none'}", "/load", "/memory", "/quit", "never read"]
    out = chat(lines, "--random", "--session", folder, "--temperature", 0)
    at = [i for i, line in enumerate(out) if "tokens/s" in line]
    stats = [out[i] for i in at]
    assert [re.sub(r"[\d.,]+ (s|tokens/s) ", r"x \1 ", line) for line in stats] == [
        "[11 tokens entered in x s · 6 came at x tokens/s · context 17]",
        "[8 tokens entered in x s · 6 came at x tokens/s · context 31]",
        "[8 tokens entered in x s · 6 came at x tokens/s · context 31]",
    ]
    assert out[at[0] + 1] == f"[saved to {folder}]"
    # rolled back, the same words get the same reply
    rolled = out.index("[turn rolled back · context 17]")
    assert out[at[0] + 2 : at[1]] == out[rolled + 1 : at[2]]
    assert out[at[2] + 1] == "[context dropped, memory kept]"
    shown = [line for line in out if line.startswith("layer")]
    assert len(shown) == 12
    norms = [float(line.split()[2]) for line in shown]
    assert min(norms[:4]) > 0.1 and norms[4:8] == [0.0] * 4 and min(norms[8:]) > 0.1
    # the norms are those of the session that was saved
    model, tokenizer = chat.module.random_model()
    saved = hf.DeltaMemSession.load(folder, model, tokenizer)
    assert norms[8:] == [round(x, 4) for x in saved.memory_norms()]
    assert out[-8:-3] == [
        "[undo: session must have a turn to roll back, got none]",
        "[no command /what; /help lists them]",
        f"[load: folder must hold session.json, got {tmp_path / 'none'}]",
        f"[17 tokens from {folder}, 17 in the context]",
        shown[8],
    ]
    # a second start goes on where the folder is
    again = chat(["and now?"], "--random", "--session", folder, "--temperature", 0)
    assert again[0].startswith("A line is") and again[1:-1] == out[at[0] + 2 : at[1]]


def test_local_checkpoint(chat, tmp_path):
    model = attached(model=random_model(vocab_size=258))
    hf.save_adapter(model, tmp_path / "adapter")
    hf.detach(model).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    options = ("--model", tmp_path / "model", "--adapter", tmp_path / "adapter", "--session", tmp_path / "s")
    out = chat(["grüß", "/save"], *options)
    framed = len("<begin>be kind\n[user]grüß<end>\n[assistant]".encode()) - len("<begin><end>") + 2
    assert out[-2].startswith(f"[{framed} tokens entered in ")
    assert out[-1] == f"[saved to {tmp_path / 's'}]"
    assert "got Qwen3ForCausalLM of" in chat([], "--random", "--session", tmp_path / "s", code=1)


def test_interrupted_turn_is_rolled_back(chat, monkeypatch):
    build, calls = chat.module.random_model, []

    def interrupted():
        model, tokenizer = build()

        def count(*_):
            calls.append(None)
            if len(calls) == 3:
                raise KeyboardInterrupt

        model.model.layers[2].register_forward_pre_hook(count)
        return model, tokenizer

    monkeypatch.setattr(chat.module, "random_model", interrupted)
    out = chat(["hello", "/undo", "hello"], "--random", "--session", "none")
    first = out.index("[turn rolled back]")
    assert out[first - 1].endswith(" (interrupted)")
    assert out[first + 1] == "[undo: session must have a turn to roll back, got none]"
    assert out[-1].startswith("[5 tokens entered in ") and out[-1].endswith("context 11]")


def test_model_needs_its_adapter(chat):
    with pytest.raises(SystemExit):
        chat([], "--model", "x")
