"""A session's folder: ``session.json`` beside one safetensors file, whole or not there at all.

The tensors' file is named by its content and written first, the JSON last: until its rename the folder is the session
that it was, after it the other one.
"""

import hashlib
import json
import os
import uuid
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from deltamem_kernels.hf.adapter import _loadable, _umask
from deltamem_kernels.hf.attach import attachment

INDEX, FORMAT, VERSION = "session.json", "deltamem-session", 1
_SAMPLES = 256  # values of each of the backbone's weights in its fingerprint: reading all would take as long as loading


def identity(function: str, model) -> dict:
    """What a saved state belongs to: ``{"adapter": sha256, "backbone": sha256, "backbone_name": text}``.

    The adapter's digest is over all of its options and values, the backbone's over the names, shapes, dtypes and a
    sample of the values of its weights.

    Raises:
        ValueError: ``model`` has no memory attached.
    """
    record = attachment(function, model)
    adapter = hashlib.sha256(_canonical(_loadable(record.config)))
    for name, module in record.attentions.items():
        for leaf, parameter in module.delta_mem.named_parameters():
            _add(adapter, f"{name}.{leaf}", parameter, None)
    backbone = hashlib.sha256()
    dtypes = []
    for name, x in model.named_parameters():
        if ".delta_mem." not in name:
            _add(backbone, name, x, _SAMPLES)
            dtypes.append(str(x.dtype).removeprefix("torch."))
    for name, x in model.named_buffers():
        if not name.endswith("inv_freq") or name.endswith("original_inv_freq"):  # the others may follow the length
            _add(backbone, name, x, _SAMPLES)
    name = f"{type(model).__name__} of {len(dtypes)} weights in {', '.join(sorted(set(dtypes)))}"
    return {"adapter": adapter.hexdigest(), "backbone": backbone.hexdigest(), "backbone_name": name}


def write(folder, body: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Make ``folder`` the session of ``body`` and ``tensors`` (contiguous, on the CPU, without shared storage)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{uuid.uuid4().hex}.part"
    try:
        save_file(tensors, aside)
        os.chmod(aside, 0o666 & ~_umask())  # safetensors makes files for their owner alone
        _sync(aside)
        digest = file_digest(aside)
        kept = folder / _tensors_name(digest)
        os.replace(aside, kept)
        body = {"format": FORMAT, "version": VERSION, "sha256": digest, **body}
        body["checksum"] = hashlib.sha256(_canonical(body)).hexdigest()
        aside.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        _sync(aside)
        os.replace(aside, folder / INDEX)
        _sync(folder)
    finally:
        aside.unlink(missing_ok=True)
    for other in folder.glob("session-*.safetensors"):
        if other != kept:
            other.unlink(missing_ok=True)


def read(function: str, folder, found: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """-> body, tensors on the CPU, after every check.

    Args:
        function: Named in errors.
        folder: What ``write`` made.
        found: ``identity`` of the model that is to continue it.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged or of another version, or the session is another adapter's or backbone's.
    """
    folder = Path(folder)
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{function}: folder must hold {INDEX}, got {folder}")
    body = _read_index(function, path)
    tensors = folder / _tensors_name(body["sha256"])
    if not tensors.is_file():
        raise FileNotFoundError(f"{function}: folder must hold {tensors.name}, which {INDEX} names, got {folder}")
    digest = file_digest(tensors)
    if digest != body["sha256"]:
        raise ValueError(
            f"{function}: {tensors.name} must be the file that was saved, got {tensors.stat().st_size} bytes of "
            f"sha256 {digest[:16]}"
        )
    if body["backbone"] != found["backbone"]:
        raise ValueError(
            f"{function}: model must be the backbone of the session ({_backbone(body)}), got {_backbone(found)}"
        )
    if body["adapter"] != found["adapter"]:
        raise ValueError(
            f"{function}: model must carry the adapter of the session (sha256 {body['adapter'][:16]}), got one of "
            f"sha256 {found['adapter'][:16]}"
        )
    return body, load_file(tensors)


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_index(function: str, path: Path) -> dict:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{function}: {INDEX} must be JSON, got {error}") from error
    kind = body.get("format") if isinstance(body, dict) else type(body).__name__
    if kind != FORMAT:
        raise ValueError(f"{function}: {INDEX} must be of format {FORMAT!r}, got {kind!r}")
    if body.get("version") != VERSION:
        raise ValueError(f"{function}: {INDEX} must be of version {VERSION}, got {body.get('version')!r}")
    checksum = body.pop("checksum", None)
    if checksum != hashlib.sha256(_canonical(body)).hexdigest():
        raise ValueError(f"{function}: {INDEX} must be as it was saved, got another text than its checksum's")
    return body


def _tensors_name(digest: str) -> str:
    return f"session-{digest[:16]}.safetensors"


def _backbone(identity: dict) -> str:
    return f"{identity['backbone_name']}, sha256 {identity['backbone'][:16]}"


def _canonical(body: dict) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _add(digest, name: str, x: torch.Tensor, samples: int | None) -> None:
    """``x``'s name, shape, dtype and values, all or ``samples`` of them evenly spread, into ``digest``."""
    digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
    if x.layout != torch.strided or x.is_meta or type(x.data) is not torch.Tensor:
        return  # a quantised tensor of a class of its own: its values have no common form
    flat = x.detach().reshape(-1)
    if samples is not None:
        flat = flat[:: max(1, flat.numel() // samples)]
    digest.update(flat.contiguous().cpu().view(torch.uint8).numpy().tobytes())


def _sync(path: Path) -> None:
    """Wait until the disk holds ``path``."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
