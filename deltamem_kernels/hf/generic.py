"""The path of attention modules that the fused one does not know, or of calls that it does not cover.

The module runs its own forward; hooks on its projections add the memory's corrections to their results.
"""

from functools import partial

import torch
from transformers import Cache

from deltamem_kernels import delta_output, delta_scan
from deltamem_kernels.hf.cache import Write, begin_state, given_cache, memory_layer
from deltamem_kernels.hf.segments import reads_and_writes


def forward(module, *args, **kwargs):
    """Forward of a module whose family is not known."""
    call = current_call(module, kwargs)
    if not torch.compiler.is_compiling():
        module.delta_mem.path = f"generic: {type(module).__name__} is not a family that the fused path knows"
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return run(module, call, hidden_states, given_cache(kwargs), args, kwargs)


def check_kwargs(kwargs) -> None:
    """What no layer can run."""
    cache = kwargs.get("cache")
    if cache is not None and not isinstance(cache, Cache):
        raise NotImplementedError(
            "forward: cache must be a decoder's Cache (continuous batching has no slots for memory states), got "
            f"{type(cache).__name__}; use generate()"
        )
    if kwargs.get("cu_seq_lens_q") is not None:
        raise NotImplementedError("forward: sequences must not be packed into one row, got cu_seq_lens_q")


def current_call(module, kwargs):
    """This forward's ``Call``, out of the keyword arguments or, where layers do not get any, off the attachment."""
    call = kwargs.pop("delta_call", None) or module.delta_mem.runtime.call
    if call is None:
        raise RuntimeError("forward: an attached attention module must be reached through its model's forward")
    if call.states is not None and call.trains and not torch.is_grad_enabled():
        raise RuntimeError(
            "forward: gradient checkpointing must be of use_reentrant=False with delta_state (else no gradient passes "
            "through the state), got use_reentrant=True"
        )
    return call


def hook(module) -> None:
    """Let the module's projections be corrected. Known families get hooks with their first generic call."""
    memory = module.delta_mem
    for head in memory.out_features:
        projection = getattr(module, f"{head}_proj")
        memory.runtime.handles.append(projection.register_forward_hook(partial(correct, memory, head)))
    memory.hooked = True


def run(module, call, hidden_states, cache, args, kwargs):
    """The module's own forward between the memory's reads and their corrections."""
    memory = module.delta_mem
    if not memory.hooked:
        hook(module)
    packed = memory.packed(hidden_states.dtype)
    memory.reads, memory.corrections = advance(module, call, packed, hidden_states, cache), packed
    try:
        if "hidden_states" not in kwargs and not args:
            args = (hidden_states,)
        return memory.stock_forward(*args, **kwargs)
    finally:
        memory.reads = memory.corrections = None


def advance(module, call, packed, hidden, cache):
    """reads ``[B, T, H, R]`` of this call's tokens; the state advances."""
    memory = module.delta_mem
    B, T = hidden.shape[:2]
    layer = state = None
    if call.states is not None:
        state = trainable(call.states[memory.index])
        if cache is not None:
            memory_layer(cache, module.layer_idx).delta_forget()
    elif cache is not None:
        layer = memory_layer(cache, module.layer_idx)
        state = begin_state(layer, memory, B, hidden.device)
    segments, token_mask = call.writes_segments, call.token_mask(hidden.device)
    projected, tokens, written = reads_and_writes(call, memory.project(packed, hidden, call.write), token_mask)
    arguments = memory.scan_arguments(packed, projected)
    reads, final = delta_scan(**arguments, initial_state=state, token_mask=token_mask)
    if layer is not None and layer.record_past:
        write = (memory.scan_arguments(packed, tokens) | {"token_mask": written}) if call.write else None
        layer.delta_record(Write(write, T, segments))
    if not call.write:
        return reads
    if segments:
        final = delta_scan(**memory.scan_arguments(packed, tokens), initial_state=state, token_mask=written).final_state
    if layer is not None:
        layer.delta_put(final)
    elif call.states is not None:
        call.store(memory, final, packed, tokens, written)
    return reads


def trainable(state):
    """A state made under inference mode cannot be saved for a backward pass; its copy can."""
    if torch.compiler.is_compiling() or not state.is_inference() or torch.is_inference_mode_enabled():
        return state
    return state.clone()


def correct(memory, head, projection, args, out):
    """Forward hook of a projection: its result with the memory's correction, while the generic path runs."""
    if memory.reads is None or head not in memory.corrections.deltas:
        return None
    packed = memory.corrections
    norm = {}
    if head == "o":
        norm = {"rms_weight": packed.rms_weight, "rms_eps": memory.config.delta_o_rmsnorm_eps}
    x = out.view(*memory.reads.shape[:2], -1)
    return delta_output(x, memory.reads, packed.deltas[head], **norm).view(out.shape)
