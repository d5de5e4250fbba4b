"""Adapter files: the published ``delta_mem_config.json`` with ``delta_mem_adapter.pt``, or with safetensors."""

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from deltamem_kernels.hf.attach import _memory, attach_with, attachment, check_model
from deltamem_kernels.hf.config import DeltaMemConfig

CONFIG = "delta_mem_config.json"
TENSORS = ("delta_mem_adapter.safetensors", "delta_mem_adapter.pt")


def load_adapter(model, directory, *, dtype: torch.dtype = torch.float32) -> DeltaMemConfig:
    """Read an adapter into ``model``, attaching its memory first where there is none.

    Everything is checked before the model is touched.

    Args:
        model: The backbone that the adapter was trained on.
        directory: Holds ``delta_mem_config.json`` and ``delta_mem_adapter.safetensors`` or ``delta_mem_adapter.pt``.
        dtype: Of the parameters of a memory that is attached here.

    Returns:
        The adapter's config.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, its options are unknown, it does not fit this backbone, another memory is
            attached, or a tensor is missing, extra, misshapen or not finite.
        TypeError: An option or a tensor has another type.
    """
    directory = Path(directory)
    config = read_config(directory)
    tensors = _read_tensors(directory)
    held = getattr(model, "_delta_mem", None)
    if held is None:
        attentions, _ = check_model("load_adapter", model, config)
        with torch.device("meta"):
            blank = {
                name: _memory(module, name, i, config, dtype, False)
                for i, (name, module) in enumerate(attentions.items())
            }
    else:
        if _loadable(held.config) != _loadable(config):
            raise ValueError(f"load_adapter: {CONFIG} must describe the attached memory (or detach it), got another")
        blank = {name: module.delta_mem for name, module in held.attentions.items()}
    _check_tensors(tensors, {f"{name}.{leaf}": p for name, m in blank.items() for leaf, p in m.named_parameters()})
    attach_with(model, config if held is None else held.config, dtype, initialize=False)
    with torch.no_grad():
        for name, module in model._delta_mem.attentions.items():
            for leaf, parameter in module.delta_mem.named_parameters():
                parameter.copy_(tensors[f"{name}.{leaf}"])
            module.delta_mem.repack()
    return config


def save_adapter(model, directory, *, format: str = "safetensors") -> None:
    """Write the attached memory's config and parameters, each file whole or not at all.

    Parameters that ``fully_shard`` has cut up are gathered: every process must then call this, and the first writes.

    Args:
        model: With a memory attached.
        directory: Made where it is missing.
        format: ``safetensors``, or ``pt``: the published ``delta_mem_adapter.pt``.

    Raises:
        ValueError: Nothing is attached, or ``format`` is unknown.
    """
    record = attachment("save_adapter", model)
    if format not in ("safetensors", "pt"):
        raise ValueError(f"save_adapter: format must be safetensors or pt, got {format!r}")
    parameters = {
        f"{name}.{leaf}": parameter.detach()
        for name, module in record.attentions.items()
        for leaf, parameter in module.delta_mem.named_parameters()
    }
    sharded = any(isinstance(x, DTensor) for x in parameters.values())
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in parameters.items()}
    if sharded and torch.distributed.get_rank() != 0:
        return
    tensors = {name: x.cpu().contiguous() for name, x in whole.items()}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written = TENSORS[0] if format == "safetensors" else TENSORS[1]
    save = save_file if format == "safetensors" else torch.save
    _replace(directory / written, lambda path: save(tensors, path))
    _replace(directory / CONFIG, lambda path: path.write_text(json.dumps(record.config.to_dict(), indent=2) + "\n"))
    for other in TENSORS:
        if other != written:
            (directory / other).unlink(missing_ok=True)


def read_config(directory) -> DeltaMemConfig:
    """The config in ``directory``."""
    path = Path(directory) / CONFIG
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"load_adapter: {CONFIG} must be JSON, got {error}") from error
    return DeltaMemConfig.from_dict(options)


def _loadable(config: DeltaMemConfig) -> dict:
    """Options that a file's tensors depend on: how parameters start does not matter once they are read."""
    starts = ("output_init", "base_slice_ref_width", "online_gain", "beta_bias_init", "delta_scale_init")
    return {name: x for name, x in config.to_dict().items() if name not in starts}


def _read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    for name in TENSORS:
        path = directory / name
        if not path.exists():
            continue
        try:
            if path.suffix == ".pt":
                tensors = torch.load(path, map_location="cpu", weights_only=True)
            else:
                tensors = load_file(path)
        except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"load_adapter: {name} must be a whole file of tensors, got {_first_line(error)}"
            ) from error
        except Exception as error:  # weights_only raises pickle's errors, of several types, for anything but tensors
            raise ValueError(f"load_adapter: {name} must hold tensors alone, got {_first_line(error)}") from error
        if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
            raise ValueError(
                f"load_adapter: {name} must be a mapping of names to tensors, got {type(tensors).__name__}"
            )
        return tensors
    raise FileNotFoundError(f"load_adapter: directory must hold {' or '.join(TENSORS)}, got {directory}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _check_tensors(tensors, parameters) -> None:
    missing, extra = sorted(set(parameters) - set(tensors)), sorted(map(str, set(tensors) - set(parameters)))
    if missing:
        raise ValueError(f"load_adapter: adapter must hold every tensor of the memory, got none for {_some(missing)}")
    if extra:
        raise ValueError(f"load_adapter: adapter must hold no tensor but the memory's, got {_some(extra)}")
    for name, parameter in parameters.items():
        x = tensors[name]
        if x.shape != parameter.shape:
            raise ValueError(
                f"load_adapter: {name} must have shape {tuple(parameter.shape)} (is this its backbone?), got "
                f"{tuple(x.shape)}"
            )
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"load_adapter: {name} must be float32, bfloat16 or float16, got {x.dtype}")
        if x.layout != torch.strided or x.is_meta:
            raise ValueError(f"load_adapter: {name} must be a dense tensor, got {x.layout}")
        if not torch.isfinite(x).all():
            raise ValueError(f"load_adapter: {name} must be finite, got NaN or inf")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _replace(path: Path, write) -> None:
    """``write`` a file beside ``path``, then move it there."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(temporary))
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
