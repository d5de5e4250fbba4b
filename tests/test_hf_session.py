"""Sessions: equal to generate, to themselves after a restart, and to conversations that went as the rest did."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import attached, error, random_model, randomize
from session_process import CASES, byte_tokenizer, case_model, continue_session, decoder, message
from transformers import DynamicCache
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from deltamem_kernels import hf
from deltamem_kernels.hf import session_file


def say(session, number, tokens=19, new=6, **options):
    return list(session.stream(message(number, tokens), max_new_tokens=new, stop=(), **options))


def same(a, b):
    """Memory, transcript and, where both have one, context are equal to the bit."""
    assert a.tokens == b.tokens and a.context_length == b.context_length
    for x, y in zip(a.state.tensors, b.state.tensors, strict=True):
        assert torch.equal(x, y)
    held = a._held - a._start
    assert held == b._held - b._start
    for x, y in zip(a._cache.layers, b._cache.layers, strict=True):
        assert torch.equal(x.keys[:, :, :held], y.keys[:, :, :held])
        assert torch.equal(x.values[:, :, :held], y.values[:, :, :held])


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "smollm3", "granite"])
def test_turns_are_generate_of_the_whole_conversation(name):
    model = attached(model=decoder(name))
    session = hf.DeltaMemSession(model, prefill_chunk=7)
    text = []
    for seed, tokens in ((1, 23), (2, 5), (3, 1)):
        text += message(seed, tokens)
        ids = torch.tensor([text])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False, eos_token_id=None
        )
        text += say(session, seed, tokens, 7)
        assert text == expected[0].tolist()
    assert session.tokens == text and session.context_length == len(text)
    state = hf.DeltaMemState.zeros(model, 1)
    with torch.no_grad():
        model(torch.tensor([text[:-1]]), delta_state=state, use_cache=False)  # the last token was not fed yet
    for ours, expected in zip(session.state.tensors, state.tensors, strict=True):
        assert error(ours, expected) < 1e-5
    norms = [x.norm().item() for x in state.tensors]
    assert session.memory_norms() == pytest.approx(norms, rel=1e-5) and min(norms) > 0.1


def test_a_restart_changes_no_bit(tmp_path):
    live, saved = {}, {}
    for case in CASES:
        session = live[case] = hf.DeltaMemSession(case_model(case), prefill_chunk=6, seed=3)
        say(session, 1)
        session.forget_context()
        say(session, 2, temperature=0.7)
        session.save(tmp_path / case / "saved")
        saved[case] = session.tokens
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    script = Path(__file__).parent / "session_process.py"
    subprocess.run([sys.executable, script, tmp_path, *CASES], env=environment, check=True)
    for case, session in live.items():
        said = continue_session(session)
        assert session.tokens[:50] == saved[case] and len(said) == 12
        session.save(tmp_path / case / "live")
        theirs, ours = (tmp_path / case / name / session_file.INDEX for name in ("continued", "live"))
        # the sha256 of transcript, memory, keys, values, generator and what undo needs is in it
        assert theirs.read_text() == ours.read_text(), case
        # a loaded turn can be rolled back
        again = hf.DeltaMemSession.load(tmp_path / case / "continued", session.model)
        for _ in range(3):
            again.undo()
            session.undo()
            same(again, session)
        with pytest.raises(ValueError, match="undo: session must have a turn to roll back, got none"):
            again.undo()


@pytest.mark.parametrize("case", CASES)
def test_undone_turn_leaves_no_trace(case):
    model = case_model(case)
    ours, other = (hf.DeltaMemSession(model, prefill_chunk=6) for _ in range(2))
    for session in (ours, other):
        say(session, 1)
    assert say(ours, 2, new=8) != say(other, 3, new=8)  # the session depends on what was said
    ours.undo()
    other.undo()
    assert ours.undoable == 1
    assert say(ours, 4) == say(other, 4)
    same(ours, other)
    for _ in range(2):
        ours.undo()
    fresh = hf.DeltaMemSession(model, prefill_chunk=6)
    assert say(ours, 5) == say(fresh, 5)
    same(ours, fresh)


@pytest.mark.parametrize("case", CASES)
def test_turn_that_raises_is_rolled_back(case, monkeypatch):
    model = case_model(case)
    ours, other = (hf.DeltaMemSession(model, prefill_chunk=6) for _ in range(2))
    for session in (ours, other):
        say(session, 1)
    last = model.model.layers[-1].mlp
    for at in (1, 2, 4, 6):  # in the flush of the last token, in the prefill, in the reply
        calls = 0

        def interrupt(*_, at=at):
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt

        handle = last.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            say(ours, 2)
        handle.remove()
        assert ours.tokens == other.tokens
    assert say(ours, 3) == say(other, 3)
    same(ours, other)


def test_closed_turn_keeps_what_it_gave():
    model = attached()
    ours, other = hf.DeltaMemSession(model), hf.DeltaMemSession(model)
    turn = ours.stream(message(1), max_new_tokens=9, stop=())
    given = [next(turn) for _ in range(4)]
    for act in (ours.undo, ours.forget_context, ours.clear_memory, lambda: ours.save("x"), lambda: say(ours, 2)):
        with pytest.raises(RuntimeError, match="session must be between turns"):
            act()
    turn.close()
    assert say(other, 1, new=4) == given
    assert say(ours, 2) == say(other, 2)
    same(ours, other)


@torch.no_grad()
def test_memory_stays_when_the_context_is_dropped():
    model = attached(alpha=24.0)
    session = hf.DeltaMemSession(model)
    said = message(1) + say(session, 1)
    session.forget_context()
    assert session.context_length == 0 and session.tokens == said
    state = hf.DeltaMemState.zeros(model, 1)
    model(torch.tensor([said]), delta_state=state, use_cache=False)
    for ours, expected in zip(session.state.tensors, state.tensors, strict=True):
        assert error(ours, expected) < 1e-5
    reply = say(session, 2, new=8)
    question = torch.tensor([message(2)])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert reply == model.generate(question, delta_state=state, **options)[0, 19:].tolist()
    assert reply != say(hf.DeltaMemSession(model), 2, new=8)
    session.clear_memory()
    assert session.memory_norms() == [0.0] * 3 and session.context_length == 27
    session.forget_context()
    assert say(session, 2, new=8) == say(hf.DeltaMemSession(model), 2, new=8)


def test_turn_without_writes_only_reads(tmp_path):
    model = attached()
    session = hf.DeltaMemSession(model)
    say(session, 1)
    session.forget_context()
    before = session.state
    reply = say(session, 2, write=False)
    session.forget_context()
    for ours, expected in zip(session.state.tensors, before.tensors, strict=True):
        assert torch.equal(ours, expected)
    session.save(tmp_path, context=False)
    loaded = hf.DeltaMemSession.load(tmp_path, model)
    assert loaded.context_length == 0 and loaded.tokens == session.tokens
    assert say(loaded, 2, write=False) == reply != say(hf.DeltaMemSession(model), 2, write=False)


@torch.no_grad()
def test_segments_are_written_whole():
    model = case_model("segments")
    session = hf.DeltaMemSession(model, prefill_chunk=3)
    ids, reply = message(1), say(session, 1)
    session.forget_context()
    state, cache = hf.DeltaMemState.zeros(model, 1), DynamicCache()
    for part in (ids, reply):
        segment = {"delta_segment_ids": torch.zeros(1, len(part), dtype=torch.long)}
        model(torch.tensor([part]), past_key_values=cache, delta_state=state, **segment)
    for ours, expected in zip(session.state.tensors, state.tensors, strict=True):
        assert torch.equal(ours, expected)
    halves = hf.DeltaMemSession(model, segments=lambda part: [int(2 * i >= len(part)) for i in range(len(part))])
    say(halves, 1)
    halves.forget_context()
    assert all(error(a, b) > 0.01 for a, b in zip(halves.state.tensors, state.tensors, strict=True))


def test_sampling():
    model = attached()
    session = hf.DeltaMemSession(model)
    greedy = say(session, 1, new=12)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"top_k": 5, "top_p": 1e-6}):
        session.undo()
        assert say(session, 1, new=12, temperature=0.9, **options) == greedy
    drawn = []
    for seed in (5, 5, None):
        session.undo()
        drawn.append(say(session, 1, new=12, temperature=1.0, seed=seed))
    assert drawn[0] == drawn[1] != drawn[2] != greedy
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2))
    for top_k, top_p in ((0, 1.0), (7, 1.0), (0, 0.6), (20, 0.8)):
        scores = logits[None] / 0.8
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        expected = torch.softmax(scores[0], 0)
        counts = torch.zeros(50)
        for _ in range(2000):
            counts[session._pick(logits, 0.8, top_k, top_p)] += 1
        assert (counts[expected == 0] == 0).all()
        spread = (expected * (1 - expected) / 2000).sqrt()
        assert ((counts / 2000 - expected).abs() <= 4.5 * spread).all()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    model = attached()
    session = hf.DeltaMemSession(model)
    say(session, 1)
    session.save(folder)
    return folder, model


def _edit(folder, **changes):
    path = folder / session_file.INDEX
    body = json.loads(path.read_text()) | changes
    if "checksum" not in changes:
        del body["checksum"]
        body["checksum"] = session_file.hashlib.sha256(session_file._canonical(body)).hexdigest()
    path.write_text(json.dumps(body))


def _tensors(folder):
    return next(folder.glob("*.safetensors"))


DAMAGES = {
    "cut index": (lambda f: os.truncate(f / "session.json", 200), ValueError, "session.json must be JSON"),
    "no index": (lambda f: (f / "session.json").unlink(), FileNotFoundError, "folder must hold session.json"),
    "edited": (lambda f: _edit(f, context_start=3, checksum="0"), ValueError, "session.json must be as it was saved"),
    "other format": (lambda f: _edit(f, format="chat"), ValueError, "must be of format 'deltamem-session', got 'chat'"),
    "other version": (lambda f: _edit(f, version=2), ValueError, "session.json must be of version 1, got 2"),
    "cut tensors": (lambda f: os.truncate(_tensors(f), 999), ValueError, "must be the file that was saved, got 999 b"),
    "no tensors": (lambda f: _tensors(f).unlink(), FileNotFoundError, "which session.json names"),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "flipped bit"])
def test_damaged_folder_is_refused(saved, tmp_path, damage):
    shutil.copytree(saved[0], tmp_path / "copy")
    if damage == "flipped bit":
        path = _tensors(tmp_path / "copy")
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)
        kind, text = ValueError, "must be the file that was saved"
    else:
        act, kind, text = DAMAGES[damage]
        act(tmp_path / "copy")
    with pytest.raises(kind, match=text):
        hf.DeltaMemSession.load(tmp_path / "copy", saved[1])


def test_another_model_is_refused(saved):
    folder, _ = saved
    adapter = "load: model must carry the adapter of the session"
    backbone = "load: model must be the backbone of the session .Qwen3ForCausalLM of 36 weights in float32, sha256 "
    for match, model in {
        adapter: randomize(attached(), seed=4),
        adapter + " ": attached(alpha=9.0),
        backbone: attached(model=random_model(seed=3)),
        backbone + ".*weights in bfloat16": attached(model=random_model().bfloat16()),
        backbone + ".*MistralForCausalLM": attached("mistral"),
        "load: model must have a memory attached": random_model(),
    }.items():
        with pytest.raises(ValueError, match=match):
            hf.DeltaMemSession.load(folder, model)


@pytest.mark.parametrize("at", range(4))
def test_interrupted_save_leaves_the_session_before_it(saved, tmp_path, monkeypatch, at):
    folder = tmp_path / "copy"
    shutil.copytree(saved[0], folder)
    session = hf.DeltaMemSession.load(folder, saved[1])
    before = session.tokens
    say(session, 2)
    steps = 0

    def failing(step):
        def run(*arguments):
            nonlocal steps
            steps += 1
            if steps == at + 1:
                raise OSError("no space left")
            return step(*arguments)

        return run

    monkeypatch.setattr(session_file.os, "replace", failing(os.replace))
    monkeypatch.setattr(session_file, "_sync", failing(session_file._sync))
    with pytest.raises(OSError, match="no space left"):
        session.save(folder)
    monkeypatch.undo()
    loaded = hf.DeltaMemSession.load(folder, saved[1])
    assert loaded.tokens == before
    assert not list(folder.glob(".*"))
    session.save(folder)
    assert hf.DeltaMemSession.load(folder, saved[1]).tokens == session.tokens
    assert len(list(folder.iterdir())) == 2


def test_text():
    tokenizer = byte_tokenizer()
    model = attached(model=random_model(vocab_size=258))
    session = hf.DeltaMemSession(model, tokenizer)
    say_nothing = {"max_new_tokens": 0}
    list(session.stream("grüß", **say_nothing))
    assert tokenizer.decode(session.tokens) == "<begin>be kind\n[user]grüß<end>\n[assistant]"
    session._tokens.append(tokenizer.eos_token_id)  # the model ended its reply
    list(session.stream("more", **say_nothing))
    assert tokenizer.decode(session.tokens).endswith("[assistant]<end>\n[user]more<end>\n[assistant]")
    list(session.stream("even more", **say_nothing))  # after a reply that did not end
    assert tokenizer.decode(session.tokens).endswith("[assistant]<end>\n[user]even more<end>\n[assistant]")
    session.forget_context()
    list(session.stream("again", **say_nothing))
    assert tokenizer.decode(session.tokens).endswith("<begin>be kind\n[user]again<end>\n[assistant]")
    assert session._ends() == [2, tokenizer.eos_token_id]
    # characters of several tokens come whole
    ids = tokenizer.encode("aé€😀z", add_special_tokens=False)
    assert len(ids) == 11 and list(session._text.pieces(ids)) == ["a", "é", "€", "😀", "z"]
    assert "".join(session._text.pieces(ids[:-2])) == "aé€\ufffd"
    pair = (lambda text: list(text.encode()), lambda ids: bytes(x for x in ids if x < 256).decode(errors="replace"))
    bytewise = hf.DeltaMemSession(model, pair)
    reply = "".join(bytewise.stream_text("hi", max_new_tokens=20))
    assert bytewise.tokens[:2] == [104, 105] and reply == pair[1](bytewise.tokens[2:])


def test_arguments_are_checked():
    model = attached()
    session = hf.DeltaMemSession(model)
    for call, kind, text in (
        (lambda: session.stream("hi"), TypeError, "stream: message must be token ids"),
        (lambda: session.stream_text("hi"), TypeError, "stream_text: session must have a tokenizer, got none"),
        (lambda: session.stream([]), ValueError, "stream: message must have at least one token, got none"),
        (lambda: session.stream([3] * 257), ValueError, "must fit the model's 256 positions beside 0 .*got 257 tok"),
        (lambda: session.stream([3], top_p=0), ValueError, "stream: sampling must have .*, got 0.0, 0, 0"),
        (lambda: session.stream([3], max_new_tokens=-1), ValueError, "stream: max_new_tokens must be >= 0, got -1"),
        (lambda: hf.DeltaMemSession(model, "x"), TypeError, "tokenizer must be a tokenizer, a pair of callables or"),
        (lambda: hf.DeltaMemSession(random_model()), ValueError, "DeltaMemSession: model must have a memory attached"),
        (lambda: hf.DeltaMemSession(model, prefill_chunk=0), ValueError, "prefill_chunk must be >= 1, got 0"),
        (lambda: hf.DeltaMemSession(attached().train()), ValueError, "model must be in eval mode, got training mode"),
    ):
        with pytest.raises(kind, match=text):
            call()
    # a layer that carries a state of its own
    other = attached()
    other.config.layer_types[1] = "linear_attention"
    with pytest.raises(NotImplementedError, match="must keep keys and values alone in its cache, got a Linear"):
        hf.DeltaMemSession(other)
    # a reply ends where the positions do
    assert len(list(session.stream([3] * 250, stop=()))) == 6 and session.context_length == 256
