"""Give a frozen model its memories, and take them away again."""

import inspect
import types
from functools import partial

import torch
from torch import nn

from deltamem_kernels.hf import attention, generation, generic
from deltamem_kernels.hf.cache import begin_state, given_cache, memory_layer
from deltamem_kernels.hf.config import DELTA_HEADS, DeltaMemConfig
from deltamem_kernels.hf.families import family, features, float_weight
from deltamem_kernels.hf.memory import LayerMemory
from deltamem_kernels.hf.state import Call, DeltaMemState, Padding, check_state, diagonal


class Attachment:
    """What ``attach`` did to a model, held as ``model._delta_mem``."""

    def __init__(self, config: DeltaMemConfig, decoder: nn.Module, attentions: dict[str, nn.Module], memories):
        self.config = config
        self.decoder = decoder
        self.attentions = attentions  # name -> module, in the order of their states
        self.memories: list[LayerMemory] = memories
        self.handles = []
        self.thawed: list[str] = []  # parameters of the backbone that required grad
        self.parameters = list(inspect.signature(decoder.forward).parameters)
        self.takes_kwargs = any(p.kind == p.VAR_KEYWORD for p in inspect.signature(decoder.forward).parameters.values())
        # The running forward's call. Layers get it as a keyword argument, which gradient checkpointing keeps for them;
        # this is for decoders that hand none down.
        self.call = None


def attachment(function: str, model: nn.Module) -> Attachment:
    """The model's attachment.

    Raises:
        ValueError: It has none.
    """
    found = getattr(model, "_delta_mem", None)
    if found is None:
        raise ValueError(f"{function}: model must have a memory attached (hf.attach), got {type(model).__name__}")
    return found


def memories(function: str, model: nn.Module) -> list[LayerMemory]:
    """The model's memories, layer by layer."""
    return attachment(function, model).memories


def attach(model: nn.Module, config: DeltaMemConfig, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Freeze ``model`` and give its attention layers a trainable memory.

    The backbone's weights are never changed; its modules run other forwards until ``detach``. Attaching an equal
    config again does nothing.

    Args:
        model: A transformers decoder, with or without a head.
        config: The adapter's options.
        dtype: Of the memory's parameters; computation is in the model's own.

    Returns:
        ``model``.

    Raises:
        ValueError: No layer fits ``config``, a corrected projection is missing, or another memory is attached.
        NotImplementedError: The model is tensor-parallel.
    """
    return attach_with(model, config, dtype, initialize=True)


def attach_with(model, config, dtype, initialize: bool):
    if not isinstance(config, DeltaMemConfig):
        raise TypeError(f"attach: config must be a DeltaMemConfig, got {type(config).__name__}")
    held = getattr(model, "_delta_mem", None)
    if held is not None:
        if held.config != config:
            raise ValueError("attach: config must equal the attached one (detach first), got another")
        return model
    attentions, decoder = check_model("attach", model, config)
    built = [
        _memory(module, name, index, config, dtype, initialize)
        for index, (name, module) in enumerate(attentions.items())
    ]
    record = Attachment(config, decoder, attentions, built)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            record.thawed.append(name)
            parameter.requires_grad_(False)
    for module, memory in zip(attentions.values(), built, strict=True):
        _install(module, memory, record)
    record.handles.append(decoder.register_forward_pre_hook(partial(_begin, record), with_kwargs=True))
    record.handles.append(decoder.register_forward_hook(partial(_end, record), with_kwargs=True))
    model._delta_mem = record
    generation.install(model)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undo ``attach``: the model is what it was, to the bit, its parameters as trainable as before.

    Raises:
        ValueError: Nothing is attached.
    """
    record = attachment("detach", model)
    generation.uninstall(model)
    for handle in record.handles:
        handle.remove()
    for module in record.attentions.values():
        memory = module.delta_mem
        if memory.replaced_forward is None:
            del module.forward
        else:
            module.forward = memory.replaced_forward
        del module.delta_mem
    for name in record.thawed:
        model.get_parameter(name).requires_grad_(True)
    del model._delta_mem
    return model


def prepare_cache(model: nn.Module, cache, batch_size: int) -> None:
    """Give a fresh KV cache its memory before its first call, which only a compiled first call needs.

    Args:
        model: With a memory attached.
        cache: A transformers cache of its decoder.
        batch_size: Of the calls to come.

    Raises:
        ValueError: Nothing is attached, or ``cache`` holds tokens whose memory is unknown, or another batch.
        TypeError: ``cache`` is no decoder's cache.
    """
    for module in attachment("prepare_cache", model).attentions.values():
        memory = module.delta_mem
        begin_state(memory_layer(cache, module.layer_idx), memory, batch_size, memory.beta_bias.device)
        if not memory.hooked:
            generic.hook(module)  # a compiled call with an attention mask takes the generic path


def check_model(function: str, model: nn.Module, config: DeltaMemConfig):
    """-> {name: attention module} that ``config`` names, and the decoder that runs them."""
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise NotImplementedError(f"{function}: model must not be tensor-parallel, got {model._tp_size} ranks")
    candidates = {
        name: module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in config.target_modules and _is_attention(module)
    }
    chosen = {
        name: module
        for name, module in candidates.items()
        if not config.target_layers or module.layer_idx in config.target_layers
    }
    missing = set(config.target_layers) - {module.layer_idx for module in candidates.values()}
    if not chosen or missing:
        rule = f"have attention layers {sorted(missing) or ''} named {', '.join(config.target_modules)}"
        raise ValueError(f"{function}: model must {rule} with q_proj and o_proj, got {type(model).__name__}")
    parents = {_stack(name) for name in chosen}
    if len(parents) != 1:
        raise ValueError(f"{function}: model must have one stack of layers, got {', '.join(sorted(parents))}")
    for name, module in chosen.items():
        for head in config.delta_heads:
            if not hasattr(module, f"{head}_proj"):
                raise ValueError(f"{function}: delta_heads must be projections that {name} has, got {head!r}")
    return chosen, model.get_submodule(parents.pop())


def _is_attention(module) -> bool:
    has = all(hasattr(getattr(module, x, None), "out_features") for x in ("q_proj", "o_proj"))
    return has and isinstance(getattr(module, "layer_idx", None), int)


def _stack(name: str) -> str:
    """``model.layers.3.self_attn`` -> ``model``"""
    parts = name.split(".")
    last = max(i for i, part in enumerate(parts) if part.isdigit()) if any(p.isdigit() for p in parts) else 1
    return ".".join(parts[: last - 1])


def _memory(module, name, index, config, dtype, initialize) -> LayerMemory:
    hidden_size, _ = features(module.q_proj)
    projections = {x: getattr(module, f"{x}_proj") for x in DELTA_HEADS if hasattr(module, f"{x}_proj")}
    out_features = {x: features(p)[1] for x, p in projections.items()}
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    memory = LayerMemory(config, hidden_size, out_features, index, device=device, dtype=dtype)
    if initialize:
        weights = {}
        if config.output_init.startswith("base_slice"):
            weights = {x: float_weight(projections[x]) for x in config.delta_heads}
            for x, weight in weights.items():
                if weight is None:
                    raise ValueError(
                        f"attach: output_init must not be {config.output_init!r} with quantised weights, got "
                        f"{type(projections[x]).__name__} as {name}.{x}_proj"
                    )
        memory.initialize(weights)
    memory.family = family(module)
    return memory.train(module.training)


def _install(module, memory, record) -> None:
    memory.replaced_forward = module.__dict__.get("forward")
    memory.stock_forward = module.forward
    memory.reads = memory.corrections = None
    memory.runtime = record
    module.delta_mem = memory
    run = attention.forward if memory.family is not None else generic.forward
    module.forward = types.MethodType(run, module)
    memory.hooked = False
    if memory.family is None:
        generic.hook(module)


def _begin(record: Attachment, decoder, args, kwargs):
    """Before the decoder's forward: what the caller said of state and mask becomes this call's ``Call``."""
    given = dict(zip(record.parameters, args, strict=False)) | kwargs
    state = kwargs.pop("delta_state", None)
    write = kwargs.pop("delta_write", None)
    segments = kwargs.pop("delta_segment_ids", None)
    padding = kwargs.pop("delta_padding", None)
    generic.check_kwargs(kwargs)
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        for memory in record.memories:
            memory.repack_changed()
    inputs = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    B, T = inputs.shape[:2]
    write = True if write is None else write
    if state is not None:
        check_state(state, record.memories, B)
    segments = _segments(record.config, segments, B, T) if write else None
    custom = None
    if padding is None:
        padding, custom = _read_mask(record, given, B, T)
    states = None if state is None else list(state.tensors)
    call = Call(states, write, segments, padding or None, custom)
    call.container = state
    if record.takes_kwargs:
        kwargs["delta_call"] = call
    record.call = call
    return args, kwargs


def _end(record: Attachment, decoder, args, kwargs, output):
    """After it: the caller's state advances, once."""
    call = kwargs.get("delta_call") or record.call
    record.call = None
    state: DeltaMemState | None = call.container
    if state is not None and call.write:
        state._advance(call.final, call.gates)
    call.final = call.container = None


def _segments(config: DeltaMemConfig, ids, B: int, T: int):
    """Segments to write, or None: every token writes."""
    if not config.writes_segments or (isinstance(ids, str) and ids == "token"):
        return None
    if not isinstance(ids, torch.Tensor):
        raise ValueError(
            f"forward: delta_segment_ids must be a tensor where an adapter writes {config.memory_write_granularity} "
            f"(or 'token': every token writes; or delta_write=False), got {ids!r}"
        )
    if ids.shape != (B, T):
        raise ValueError(f"forward: delta_segment_ids must have shape {(B, T)}, got {tuple(ids.shape)}")
    return ids


def _read_mask(record, given, B: int, T: int) -> tuple[Padding | None, str | None]:
    """-> this call's pads, and why the mask is another one than causal with pads."""
    mask, cache = given.get("attention_mask"), given_cache(given)
    index = 0
    if isinstance(mask, dict):
        # one for each type of layer, None: causal without pads
        kinds = getattr(record.decoder.config, "layer_types", [])
        known = [(kinds.index(kind), x) for kind, x in mask.items() if x is not None and kind in kinds]
        index, mask = known[0] if known else (0, None)
    if mask is None:
        _refuse_packed(given.get("position_ids"), cache, T)
        return None, None
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"forward: attention_mask must be a 2-D or 4-D tensor, got {got}")
    if mask.ndim == 2:
        if mask.shape[0] != B or mask.shape[1] < T or (cache is None and mask.shape[1] != T):
            raise ValueError(f"forward: attention_mask must cover {(B, T)} tokens, got shape {tuple(mask.shape)}")
        return Padding(mask, T), None
    past = mask.shape[3] - T
    if cache is not None:
        past = cache.get_seq_length(index) - cache.get_mask_sizes(T, index)[1]
    own = diagonal(mask, past)
    return Padding(own.expand(B, T), T), "a 4-D attention mask"


def _refuse_packed(position_ids, cache, T: int) -> None:
    """Several sequences in a row would share one memory."""
    if position_ids is None or cache is not None or T < 2 or torch.compiler.is_compiling():
        return
    if position_ids.ndim == 2 and bool((position_ids[:, 1:] - position_ids[:, :-1] != 1).any()):
        raise NotImplementedError(
            "forward: position_ids must count up by 1 without attention_mask (sequences packed into one row would "
            "share a memory), got a step of another size"
        )
