"""What ``generate`` must know of the memory: its arguments, its place in the cache, the mask before it is expanded."""

import types

import torch

from deltamem_kernels.hf.cache import begin_state, given_cache, memory_layer
from deltamem_kernels.hf.state import Padding

_ARGUMENTS = ("delta_state", "delta_write", "delta_segment_ids", "delta_padding")


def install(model) -> None:
    """Override on this one model the steps of ``generate`` that the memory takes part in."""
    if not hasattr(model, "_prepare_cache_for_generation"):
        return
    for override in (
        _validate_model_kwargs,
        _prepare_cache_for_generation,
        prepare_inputs_for_generation,
        init_continuous_batching,
    ):
        setattr(model, override.__name__, types.MethodType(override, model))


def uninstall(model) -> None:
    for name in (
        "_validate_model_kwargs",
        "_prepare_cache_for_generation",
        "prepare_inputs_for_generation",
        "init_continuous_batching",
    ):
        model.__dict__.pop(name, None)


def _validate_model_kwargs(self, model_kwargs):
    known = {name: x for name, x in model_kwargs.items() if name not in _ARGUMENTS}
    return type(self)._validate_model_kwargs(self, known)


def init_continuous_batching(self, *args, **kwargs):
    raise NotImplementedError(
        "init_continuous_batching: model must not have a memory attached (continuous batching has no slots for its "
        "states), got one; use generate()"
    )


def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs):
    """Before the first forward: past recording and compilation must find the memory's state in its place."""
    result = type(self)._prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs
    )
    record, cache = self._delta_mem, given_cache(model_kwargs)
    if model_kwargs.get("delta_state") is not None:
        if generation_config.num_beams > 1 or generation_mode.value == "assisted_generation":
            raise ValueError(
                "generate: delta_state must be None with beams or drafts (their rows move, and a caller's state does "
                f"not), got one for {generation_mode.value}"
            )
        if not generation_config.use_cache and model_kwargs.get("delta_write") is not False:
            raise ValueError(
                "generate: delta_write must be False with a delta_state and no cache (each step would write the whole "
                f"sequence again), got {model_kwargs.get('delta_write')}"
            )
        return result
    if cache is None:
        return result
    rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
    for module in record.attentions.values():
        memory = module.delta_mem
        begin_state(memory_layer(cache, module.layer_idx), memory, rows, memory.beta_bias.device)
    if generation_config.is_assistant:
        cache.activate_past_recording()
    return result


def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
    """The stock inputs; beside a mask that is expanded here, the pads that it came from."""
    inputs = type(self).prepare_inputs_for_generation(self, input_ids, *args, **kwargs)
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    B, T = tokens.shape[:2]
    mask, cache = kwargs.get("attention_mask"), given_cache(inputs)
    if cache is not None and cache.is_compileable and (mask is None or mask.ndim == 2):
        inputs["delta_padding"] = False
        if mask is not None:
            inputs["delta_padding"] = Padding(mask, T)
            inputs["delta_padding"].leading()
    segments = kwargs.get("delta_segment_ids")
    if isinstance(segments, torch.Tensor):
        inputs["delta_segment_ids"] = _segments_of(segments, cache, B, T)
    return inputs


def _segments_of(segments, cache, B: int, T: int):
    """This call's part of the ids given for the prompt; generated tokens have none and are not written."""
    past = int(cache.get_seq_length()) if cache is not None else 0
    ids = segments.new_full((B, T), -1)
    rest = segments[:, past : past + T]
    ids[:, : rest.shape[1]] = rest
    return ids
