"""Adapter files: read whole or refused by name with the model untouched, written whole or not at all."""

import json
import pickle
import shutil

import pytest
import torch
from hf_models import GOLDEN, NAMES, attached, golden, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltamem_kernels import hf
from deltamem_kernels.hf.config import ARCHIVED

NAME = "qwen3_tsw_qo"
FILES = {"pt": "delta_mem_adapter.pt", "safetensors": "delta_mem_adapter.safetensors"}


def _parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".delta_mem." in n}


@pytest.fixture
def folder(tmp_path):
    for name in ("delta_mem_config.json", "delta_mem_adapter.pt"):
        shutil.copy(GOLDEN / NAME / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, format, tmp_path):
    model, _ = golden(name)
    hf.save_adapter(model, tmp_path / "new" / "folder", format=format)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == sorted(
        [FILES[format], "delta_mem_config.json"]
    )
    fresh, _ = golden(name, attached=False)
    config = hf.load_adapter(fresh, tmp_path / "new" / "folder")
    assert config == model._delta_mem.config
    ours, theirs = _parameters(fresh), _parameters(model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_published_file_names_and_leaves(tmp_path):
    model, _ = golden(NAME)
    hf.save_adapter(model, tmp_path, format="pt")
    written = torch.load(tmp_path / FILES["pt"], weights_only=True)
    published = torch.load(GOLDEN / NAME / FILES["pt"], weights_only=True)
    assert written.keys() == published.keys()
    assert all(torch.equal(written[n], published[n]) for n in written)


def test_loading_over_an_attached_memory(folder):
    model, _ = golden(NAME)
    expected = _parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
    hf.load_adapter(model, folder)
    assert all(torch.equal(p, expected[n]) for n, p in _parameters(model).items())
    other = attached(rank=2)
    with pytest.raises(ValueError, match="must describe the attached memory"):
        hf.load_adapter(other, folder)


def test_smaller_key_sets_and_retired_keys():
    options = json.loads((GOLDEN / NAME / "delta_mem_config.json").read_text())
    config = hf.DeltaMemConfig.from_dict(options)
    assert set(ARCHIVED) <= set(options)
    assert hf.DeltaMemConfig.from_dict({k: v for k, v in options.items() if k not in ARCHIVED}) == config
    assert hf.DeltaMemConfig.from_dict({"delta_heads": ["o", "q"]}) == config
    assert hf.DeltaMemConfig.from_dict({}).delta_heads == ("q", "k", "v", "o")
    assert hf.DeltaMemConfig.from_dict(config.to_dict()) == config
    for name, legal in ARCHIVED.items():
        assert hf.DeltaMemConfig.from_dict({name: list(legal) if legal == () else legal}) == hf.DeltaMemConfig()
        with pytest.raises(ValueError, match=f"{name} must be .* \\(a retired option\\)"):
            hf.DeltaMemConfig.from_dict({name: "other"})


BAD_OPTIONS = [
    ({"rank": 0}, ValueError, "rank must be >= 1, got 0"),
    ({"rank": "8"}, TypeError, "rank must be of type int, got '8'"),
    ({"rank": True}, TypeError, "rank must be of type int, got True"),
    ({"rank": 8.0}, TypeError, "rank must be of type int"),
    ({"alpha": float("nan")}, ValueError, "alpha must be finite"),
    ({"state_update_mode": "Standard"}, ValueError, "state_update_mode must be one of standard, lambda_outside"),
    ({"delta_scale_parameterization": "alpha"}, ValueError, "must be one of alpha_over_rank, got 'alpha'"),
    ({"delta_heads": ["q", "x"]}, ValueError, "delta_heads must hold only q, k, v, o"),
    ({"delta_heads": "qo"}, TypeError, "delta_heads must be a sequence of str, got 'qo'"),
    ({"target_layers": [-1]}, ValueError, "target_layers must hold indices >= 0"),
    ({"target_modules": []}, ValueError, "target_modules must name at least one module"),
    ({"delta_scale_init": 2.0}, ValueError, "delta_scale_init must be less than delta_scale_max"),
    ({"delta_o_rmsnorm_eps": 0.0}, ValueError, "delta_o_rmsnorm_eps must be > 0"),
    ({"num_memory_partitions": 2}, ValueError, "num_memory_partitions must be 1"),
    ({"tie_memory_partition_read_write": 0}, ValueError, "tie_memory_partition_read_write must be False"),
    ({"rnak": 8}, ValueError, "options must hold only known keys .*, got 'rnak'"),
    ([1], TypeError, "options must be a mapping, got list"),
]


@pytest.mark.parametrize("options, kind, text", BAD_OPTIONS)
def test_bad_options_are_refused_by_name(options, kind, text):
    with pytest.raises(kind, match=f"DeltaMemConfig: .*{text}"):
        hf.DeltaMemConfig.from_dict(options)


class _Code:
    def __reduce__(self):
        return eval, ("open('ran', 'w').close()",)


def _edit(change):
    def edit(folder):
        tensors = torch.load(folder / FILES["pt"], weights_only=True)
        change(tensors)
        torch.save(tensors, folder / FILES["pt"])

    return edit


KEY = "model.layers.1.self_attn.memory_k_proj"
BAD_FILES = {
    "truncated": (lambda f: _cut(f / FILES["pt"]), ValueError, "must be a whole file|must hold tensors alone"),
    "empty": (lambda f: (f / FILES["pt"]).write_bytes(b""), ValueError, "must be a whole file"),
    "code": (lambda f: torch.save({KEY: _Code()}, f / FILES["pt"]), ValueError, "must hold tensors alone"),
    "plain pickle": (lambda f: (f / FILES["pt"]).write_bytes(pickle.dumps(_Code())), ValueError, "must "),
    "list": (lambda f: torch.save([torch.zeros(2)], f / FILES["pt"]), ValueError, "must be a mapping of names"),
    "number": (_edit(lambda t: t.update({KEY: 3})), ValueError, "must be a mapping of names to tensors"),
    "missing": (_edit(lambda t: t.pop(KEY)), ValueError, f"must hold every tensor .* got none for {KEY}"),
    "extra": (_edit(lambda t: t.update(more=torch.zeros(1))), ValueError, "must hold no tensor but .* got more"),
    "shape": (_edit(lambda t: t.update({KEY: t[KEY].T})), ValueError, rf"{KEY} must have shape \(8, 64\)"),
    "integers": (_edit(lambda t: t.update({KEY: t[KEY].int()})), TypeError, f"{KEY} must be float32, bfloat16"),
    "double": (_edit(lambda t: t.update({KEY: t[KEY].double()})), TypeError, f"{KEY} must be float32, bfloat16"),
    "NaN": (_edit(lambda t: t[KEY].fill_(float("nan"))), ValueError, f"{KEY} must be finite"),
    "inf": (_edit(lambda t: t[KEY][0].fill_(float("inf"))), ValueError, f"{KEY} must be finite"),
    "sparse": (_edit(lambda t: t.update({KEY: t[KEY].to_sparse()})), ValueError, f"{KEY} must be a dense tensor"),
    "no tensors": (lambda f: (f / FILES["pt"]).unlink(), FileNotFoundError, "directory must hold delta_mem_adapter"),
    "no config": (lambda f: (f / "delta_mem_config.json").unlink(), FileNotFoundError, "delta_mem_config.json"),
    "config is no JSON": (lambda f: (f / "delta_mem_config.json").write_text("{"), ValueError, "must be JSON"),
    "config is binary": (lambda f: (f / "delta_mem_config.json").write_bytes(b"\xff\xfe\x00"), ValueError, "be JSON"),
    "bad safetensors": (lambda f: (f / FILES["safetensors"]).write_bytes(b"\x08" * 40), ValueError, "be a whole file"),
}


def _as_safetensors(change):
    """The damage, in a folder that holds safetensors instead."""

    def edit(folder):
        tensors = torch.load(folder / FILES["pt"], weights_only=True)
        (folder / FILES["pt"]).unlink()
        change(tensors)
        save_file(tensors, folder / FILES["safetensors"])

    return edit


BAD_FILES |= {
    "truncated safetensors": (
        lambda f: (_as_safetensors(lambda t: None)(f), _cut(f / FILES["safetensors"])),
        ValueError,
        "delta_mem_adapter.safetensors must be a whole file of tensors",
    ),
    "NaN in safetensors": (
        _as_safetensors(lambda t: t[KEY][1].fill_(float("nan"))), ValueError, f"{KEY} must be finite",
    ),
    "extra in safetensors": (
        _as_safetensors(lambda t: t.update(more=torch.zeros(1))), ValueError, "must hold no tensor but .* got more",
    ),
    "integers in safetensors": (
        _as_safetensors(lambda t: t.update({KEY: t[KEY].int()})), TypeError, f"{KEY} must be float32, bfloat16",
    ),
}  # fmt: skip


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("held", [False, True], ids=["fresh", "attached"])
def test_damaged_files_are_refused_and_the_model_untouched(case, held, folder, monkeypatch):
    monkeypatch.chdir(folder)
    damage, kind, text = BAD_FILES[case]
    damage(folder)
    model, _ = golden(NAME, attached=held)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    trains = [p.requires_grad for p in model.parameters()]
    with pytest.raises(kind, match=text):
        hf.load_adapter(model, folder)
    assert not (folder / "ran").exists()
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert [p.requires_grad for p in model.parameters()] == trains
    assert hasattr(model, "_delta_mem") == held


def test_wrong_backbone_is_refused(folder):
    for model in (random_model(), random_model(num_hidden_layers=1)):
        with pytest.raises(ValueError, match=r"load_adapter: adapter must hold|is this its backbone"):
            hf.load_adapter(model, folder)
        assert not hasattr(model, "_delta_mem")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(sorted(FILES)))
def test_files_with_random_damage_load_or_are_refused(tmp_path_factory, seed, format):
    folder = tmp_path_factory.mktemp("fuzz")
    tensors = torch.load(GOLDEN / NAME / FILES["pt"], weights_only=True)
    save = save_file if format == "safetensors" else torch.save
    save(tensors, folder / FILES[format])
    shutil.copy(GOLDEN / NAME / "delta_mem_config.json", folder)
    data = bytearray((folder / FILES[format]).read_bytes())
    dice = torch.Generator().manual_seed(seed)
    for _ in range(1 + seed % 5):
        data[int(torch.randint(len(data), (), generator=dice))] = int(torch.randint(256, (), generator=dice))
    (folder / FILES[format]).write_bytes(data)
    model = _fuzzed()
    try:
        hf.load_adapter(model, folder)
    except (ValueError, TypeError) as error:
        assert "load_adapter: " in str(error)
        assert not hasattr(model, "_delta_mem")
    else:
        assert all(torch.isfinite(p).all() for p in model.parameters())
        hf.detach(model)


_models = []


def _fuzzed():
    if not _models:
        _models.append(golden(NAME, attached=False)[0])
    return _models[0]


@pytest.mark.parametrize("format", FILES)
def test_a_save_that_fails_leaves_the_old_files(format, tmp_path, monkeypatch):
    model, _ = golden(NAME)
    hf.save_adapter(model, tmp_path, format=format)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr("deltamem_kernels.hf.adapter.save_file", full)
    monkeypatch.setattr("deltamem_kernels.hf.adapter.torch.save", full)
    with pytest.raises(OSError, match="disk full"):
        hf.save_adapter(model, tmp_path, format=format)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="save_adapter: format must be safetensors or pt, got 'bin'"):
        hf.save_adapter(model, tmp_path, format="bin")


def test_bf16_adapter(tmp_path):
    tensors = torch.load(GOLDEN / NAME / FILES["pt"], weights_only=True)
    half = {n: x.bfloat16() for n, x in tensors.items()}
    save_file(half, tmp_path / FILES["safetensors"])
    shutil.copy(GOLDEN / NAME / "delta_mem_config.json", tmp_path)
    model, _ = golden(NAME, attached=False)
    hf.load_adapter(model, tmp_path)
    assert all(torch.equal(p, half[n.replace(".delta_mem", "")].float()) for n, p in _parameters(model).items())
    hf.save_adapter(model, tmp_path)
    assert all(torch.equal(x, half[n].float()) for n, x in load_file(tmp_path / FILES["safetensors"]).items())
