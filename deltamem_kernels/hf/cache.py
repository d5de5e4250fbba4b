"""Memory inside a KV cache: cache layers that hold a state beside their keys, so that it moves as they do.

A cache layer turns into one by a change of its class; whatever the cache then does to the layer (reorder for beams,
repeat, select, crop, reset, deepcopy) happens to the state as well. A state cannot be un-written, so a layer that may
be cropped records what was written since the last crop and writes the tokens that stay again.
"""

import inspect
from typing import NamedTuple

import torch
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from deltamem_kernels import delta_scan


def cache_keyword(forward) -> str:
    """What this forward calls its KV cache: ``cache``, or ``past_key_values`` before transformers 5.24."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def given_cache(arguments: dict):
    """The KV cache among a call's arguments, which both names may carry."""
    found = arguments.get("cache")
    return arguments.get("past_key_values") if found is None else found


class Write(NamedTuple):
    """One call's write, such that ``delta_scan`` can make it again."""

    arguments: dict | None  # None: nothing was written
    tokens: int
    whole: bool  # segments were written, which a crop cannot cut


# layers that return the storage they keep (or, sliding and static, whose storage is refreshed in attention.py): the
# kernels prepare new keys inside it
IN_PLACE = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


def _with_memory(base: type) -> type:
    """Subclass of a cache layer class that holds a memory's state."""

    class MemoryLayer(base):
        _layer_type = None
        delta_base = base
        delta_state = None  # [B, H, R, R] fp32; None: zero, of a batch size yet unknown
        delta_recorded = None  # [state at the last crop, arguments of every write since], while recording
        record_past = False

        def activate_past_recording(self):
            if hasattr(super(), "activate_past_recording"):
                super().activate_past_recording()
            self.record_past = True

        def reset(self):
            super().reset()
            self.delta_recorded = None
            if self.delta_state is not None and self.is_initialized:
                self.delta_state.zero_()  # static layers keep their storage
            else:
                self.delta_state = None

        def reorder_cache(self, beam_idx):
            super().reorder_cache(beam_idx)
            self._delta_rows(beam_idx)

        def _delta_rows(self, rows):
            if self.delta_state is None:
                return
            if self.delta_recorded is not None and self.delta_recorded[1]:
                raise NotImplementedError(
                    f"reorder_cache: rows must not move while {type(self).__name__} records writes for a crop, got "
                    f"{len(self.delta_recorded[1])} uncropped writes"
                )
            self.delta_recorded = None
            rows = rows.to(self.delta_state.device)
            self.delta_put(self.delta_state.index_select(0, rows))

        def delta_put(self, state):
            """Hold ``state``; a static layer keeps its storage, which compiled graphs know."""
            kept = self.delta_state
            if self.is_compileable and kept is not None and kept.shape == state.shape and not state.requires_grad:
                kept.copy_(state)
            else:
                self.delta_state = state

        def delta_forget(self):
            """A caller's state goes ahead of this one."""
            self.delta_state = self.delta_recorded = None

        def delta_record(self, write):
            """Remember for a crop the ``Write`` that is about to happen."""
            if self.delta_recorded is None:
                self.delta_recorded = [self.delta_state.clone(), []]
            self.delta_recorded[1].append(write)

    if hasattr(base, "crop"):

        def crop(self, tokens_to_remove):
            length, count = self.get_seq_length(), int(tokens_to_remove)  # which may be a tensor
            # positive: the length to keep, in versions of transformers that know it
            removed = length - count if count > 0 else -count
            known = self.delta_state is not None and removed != 0
            if known and 0 < removed < length and not self.record_past:
                raise RuntimeError(
                    "crop: the cache must record its past to take tokens back from the memory, got a cache that does "
                    "not (call activate_past_recording() on it before those tokens)"
                )
            state = _rewound(self, removed) if known and 0 < removed < length else None
            super(MemoryLayer, self).crop(tokens_to_remove)
            if state is not None:
                self.delta_put(state)
            elif known and removed >= length:
                self.delta_put(torch.zeros_like(self.delta_state))
            self.delta_recorded = None

        MemoryLayer.crop = crop

    if hasattr(base, "batch_repeat_interleave"):

        def batch_repeat_interleave(self, repeats):
            super(MemoryLayer, self).batch_repeat_interleave(repeats)
            if self.delta_state is not None:
                rows = torch.arange(self.delta_state.shape[0], device=self.delta_state.device)
                self._delta_rows(rows.repeat_interleave(repeats))

        def batch_select_indices(self, indices):
            super(MemoryLayer, self).batch_select_indices(indices)
            if self.delta_state is not None:
                rows = torch.arange(self.delta_state.shape[0], device=self.delta_state.device)
                self._delta_rows(rows[indices.to(rows.device)])

        MemoryLayer.batch_repeat_interleave = batch_repeat_interleave
        MemoryLayer.batch_select_indices = batch_select_indices

    # a name that pickle finds again
    MemoryLayer.__name__ = MemoryLayer.__qualname__ = f"Memory{base.__name__}"
    globals()[MemoryLayer.__name__] = MemoryLayer
    return MemoryLayer


def _rewound(layer, removed: int):
    """The state without the last ``removed`` tokens: the recorded writes of the others, made again."""
    state, writes = layer.delta_recorded or (None, [])
    keep = sum(write.tokens for write in writes) - removed
    if keep < 0:
        raise RuntimeError(
            f"crop: at most the tokens since the last crop must be removed, got {removed} of {keep + removed}"
        )
    for write in writes:
        kept = min(write.tokens, keep)
        keep -= kept
        if write.arguments is None or kept == 0:
            continue
        arguments = write.arguments
        if kept < write.tokens:
            if write.whole:
                raise NotImplementedError(
                    "crop: a call that wrote segments must stay or go as a whole, got a part of it"
                )
            arguments = {k: x[:, :kept] if k in _TOKENWISE and x is not None else x for k, x in arguments.items()}
        state = delta_scan(**arguments, initial_state=state).final_state
    return state.clone()


_TOKENWISE = ("mem_q", "mem_k", "mem_v", "beta", "lam", "token_mask")
_CLASSES = {base: _with_memory(base) for base in IN_PLACE}


def memory_layer(cache, layer_idx: int):
    """The cache's layer ``layer_idx``, able to hold a state.

    Raises:
        TypeError: ``cache`` is no transformers cache of a decoder.
        NotImplementedError: The layer shares another one's keys.
    """
    if isinstance(cache, EncoderDecoderCache) or not isinstance(cache, Cache):
        raise TypeError(f"forward: past_key_values must be a decoder's Cache, got {type(cache).__name__}")
    while len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if not hasattr(layer, "delta_state"):
        base = type(layer)
        if not hasattr(layer, "get_seq_length"):
            raise NotImplementedError(
                f"forward: past_key_values must have keys of its own in layer {layer_idx}, got {base.__name__}"
            )
        if base not in _CLASSES:
            _CLASSES[base] = _with_memory(base)
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "forward: past_key_values must be prepared (hf.prepare_cache) before a compiled call sees it first, "
                f"got a fresh {type(cache).__name__}"
            )
        layer.__class__ = _CLASSES[base]
    return layer


def begin_state(layer, memory, batch_size: int, device: torch.device):
    """The state that a call without ``delta_state`` starts from: the layer's, zero with a fresh cache.

    Raises:
        ValueError: The cache holds tokens whose memory is unknown, or another batch.
    """
    state, compiling = layer.delta_state, torch.compiler.is_compiling()
    if state is None:
        filled = layer.get_seq_length()
        if int(filled) > 0:
            raise ValueError(
                "forward: past_key_values must be fresh or have been filled with its memory, got a cache of "
                f"{int(filled)} tokens without one (pass delta_state=)"
            )
        state = layer.delta_state = memory.zero_state(batch_size, device)
        if layer.is_compileable and not compiling:
            torch._dynamo.mark_static_address(state)
    if not compiling:
        if not layer.record_past:
            layer.delta_recorded = None
        if state.is_inference() and not torch.is_inference_mode_enabled():
            state = layer.delta_state = state.clone()  # such a tensor can neither be written nor saved for backward
    if state.shape[0] != batch_size:
        raise ValueError(
            f"forward: past_key_values must hold the memory of {batch_size} sequences, got that of {state.shape[0]}"
        )
    return state


def refill_is_needed(layer, keys) -> bool:
    """Whether what ``layer.update`` returned is a copy of what it keeps (a full static window)."""
    return issubclass(layer.delta_base, StaticSlidingWindowLayer) and keys is not layer.keys
