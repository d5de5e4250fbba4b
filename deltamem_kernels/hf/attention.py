"""What an attached attention module runs: the fused path, or the reason why a call takes the generic one.

reads, state = delta_scan(projections of x, state)
y            = o_proj(attention(q + delta_q reads, k + delta_k reads, v + delta_v reads)) + delta_o reads
"""

import torch

from deltamem_kernels import (
    delta_output,
    delta_scan,
    fused_delta_attention,
    fused_delta_attention_with_kvcache,
)
from deltamem_kernels.hf import generic
from deltamem_kernels.hf.cache import IN_PLACE, Write, begin_state, given_cache, memory_layer, refill_is_needed
from deltamem_kernels.hf.segments import reads_and_writes

# A logit of every dtype whose sigmoid is 0, up to rounding, and that of its negative 1.
_CLOSED = -1e4


def forward(module, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
    """Forward of a module whose family is known."""
    call = generic.current_call(module, kwargs)
    memory = module.delta_mem
    cache = given_cache(kwargs)
    why = _why_generic(module, call, cache, kwargs)
    if why is None and cache is not None:
        layer = memory_layer(cache, module.layer_idx)
        why = _why_not_in_place(layer, cache, call)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        path = "fused" if why is None else f"generic: {why}"
        if path != memory.path:  # an attribute of a module takes its time to be set
            memory.path = path
    if why is not None:
        kwargs |= {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
        return generic.run(module, call, hidden_states, cache, (), kwargs)
    packed = memory.packed(hidden_states.dtype)
    shape = (*hidden_states.shape[:2], -1, module.head_dim)
    q, k, v = (p(hidden_states).view(shape) for p in (module.q_proj, module.k_proj, module.v_proj))
    arguments = _layer_arguments(module, memory.family, call, packed, position_embeddings, hidden_states.shape[0])
    if cache is None:
        out, reads = _without_cache(memory, call, packed, hidden_states, q, k, v, arguments)
    else:
        out, reads = _with_cache(module, memory, call, packed, hidden_states, q, k, v, arguments, cache, layer)
    o_proj = module.o_proj
    y = o_proj(out.flatten(2))
    delta_o = packed.deltas.get("o")
    if delta_o is not None:
        # in place where nobody else holds y
        alone = not (compiling or torch.is_grad_enabled() or o_proj._forward_hooks)
        y = delta_output(
            y, reads, delta_o, rms_weight=packed.rms_weight, rms_eps=memory.config.delta_o_rmsnorm_eps,
            out=y if alone else None,
        )  # fmt: skip
    return y, None


def _why_generic(module, call, cache, kwargs) -> str | None:
    if call.custom is not None:
        return call.custom
    if kwargs.get("output_attentions"):
        return "attention weights were asked for"
    if module.training and module.attention_dropout > 0:
        return "attention dropout"
    if not module.is_causal or kwargs.get("is_causal") is False:
        return "attention is not causal"
    if cache is not None and torch.is_grad_enabled():
        return "a KV cache under grad mode"
    return None


def _why_not_in_place(layer, cache, call) -> str | None:
    if layer.delta_base not in IN_PLACE or cache.offloading:
        kind = "an offloaded cache" if cache.offloading else layer.delta_base.__name__
        return f"{kind} does not keep what it returns"
    if call.padding is not None and not call.padding.leading()[1]:
        return "pads between tokens of a cache"
    return None


def _layer_arguments(module, family, call, packed, position_embeddings, B) -> dict:
    """Arguments of the fused functions that do not depend on state or cache."""
    q_norm_weight, k_norm_weight, norm_eps = family.norms(module)
    window = family.sliding_window(module)
    cos = sin = None
    if family.rotates(module):
        cos, sin = call.rotary(position_embeddings, B)
    return {
        "delta_q": packed.deltas.get("q"),
        "delta_k": packed.deltas.get("k"),
        "delta_v": packed.deltas.get("v"),
        "q_norm_weight": q_norm_weight,
        "k_norm_weight": k_norm_weight,
        "norm_eps": norm_eps,
        "rotary_cos": cos,
        "rotary_sin": sin,
        "softmax_scale": module.scaling,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
    }


def _without_cache(memory, call, packed, hidden, q, k, v, arguments):
    """-> attention's output, reads; the state after the call goes to it."""
    segments, token_mask = call.writes_segments, call.token_mask(hidden.device)
    projected = memory.project(packed, hidden, call.write)
    projected, tokens, written = reads_and_writes(call, projected, token_mask)
    state = None if call.states is None else generic.trainable(call.states[memory.index])
    result = fused_delta_attention(
        q, k, v, **memory.scan_arguments(packed, projected), initial_state=state, token_mask=token_mask,
        **arguments,
    )  # fmt: skip
    if call.states is not None and call.write:
        final = result.final_state
        if segments:
            write = memory.scan_arguments(packed, tokens)
            final = delta_scan(**write, initial_state=state, token_mask=written).final_state
        call.store(memory, final, packed, tokens, written)
    return result.out, result.reads


def _with_cache(module, memory, call, packed, hidden, q, k, v, arguments, cache, layer):
    """-> attention's output, reads; cache and state advance in place."""
    B, T = hidden.shape[:2]
    segments, token_mask = call.writes_segments, call.token_mask(hidden.device)
    projected = memory.project(packed, hidden, call.write)
    projected, tokens, written = reads_and_writes(call, projected, token_mask)
    if projected.beta is not None and call.padding is not None and not call.padding.leading()[0]:
        # Pads lead the row, where the kernels' own token_mask may not be. Key 0 and closed gates hold the state, to the
        # bit: the sigmoid alone may end at 1e-38.
        pads = ~token_mask[:, :, None, None]
        lam = projected.lam
        projected = projected._replace(
            mem_k=projected.mem_k.masked_fill(pads, 0),
            beta=projected.beta.masked_fill(pads, _CLOSED),
            lam=None if lam is None else lam.masked_fill(pads, -_CLOSED),
        )
    if call.states is None:
        pool = begin_state(layer, memory, B, hidden.device)
        if layer.record_past:
            write = memory.scan_arguments(packed, tokens) | {"token_mask": written}
            layer.delta_record(Write(write if call.write else None, T, segments))
    else:
        pool = call.states[memory.index]
        if call.write and not segments:
            pool = pool.clone()
        layer.delta_forget()
    keys, values, filled, dropped, refill = _append(layer, cache, module.layer_idx, k, v, call)
    leftpad = None
    if call.padding is not None:
        leftpad = call.padding.leading()[2].to(hidden.device)
        leftpad = (leftpad - dropped).clamp_min(0) if dropped else leftpad
    out, reads, _, _ = fused_delta_attention_with_kvcache(
        q, keys, values, k, v, **memory.scan_arguments(packed, projected), state_pool=pool, cache_seqlens=filled,
        cache_leftpad=leftpad, **arguments,
    )  # fmt: skip
    if refill:
        layer.keys.copy_(keys.transpose(1, 2)[:, :, -layer.max_cache_len :])
        layer.values.copy_(values.transpose(1, 2)[:, :, -layer.max_cache_len :])
    if segments:
        write = memory.scan_arguments(packed, tokens)
        final = delta_scan(**write, initial_state=pool, token_mask=written).final_state
        if call.states is None:
            layer.delta_put(final)
        else:
            call.store(memory, final, packed, tokens, written)
    elif call.states is not None and call.write:
        call.store(memory, pool, packed, tokens, written)
    return out, reads


def _append(layer, cache, layer_idx, k, v, call):
    """Let the cache append the raw k and v ``[B, T, HKV, D]``: the kernels then prepare them where they lie.

    -> keys, values ``[B, S, HKV, D]``, filled slots before this call int32 [B], slots that a window dropped before
    the first, and whether the cache keeps a copy to be refilled.
    """
    B, T = k.shape[:2]
    past = layer.get_seq_length()
    static = layer.is_compileable
    # a static layer counts on the device, in place
    counted = layer.cumulative_length.to(torch.int32) if static else None
    keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2), layer_idx)
    refill = refill_is_needed(layer, keys)
    full = static and layer.is_sliding and past >= layer.max_cache_len
    if refill or full or not static:
        kept = keys.shape[2] - T
        filled, dropped = call.lengths(kept, B, k.device), past - kept
    else:
        filled, dropped = counted.to(k.device).repeat(B), 0
    return keys.transpose(1, 2), values.transpose(1, 2), filled, dropped, refill
