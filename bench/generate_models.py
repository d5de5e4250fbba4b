"""The generation benchmark's models: one backbone's weights, four ways of running it, and their correctness gate."""

import copy
import dataclasses
import types

import eager
import timing
import torch
import torch.nn.functional as F
import transformers
from transformers import DynamicCache

from deltamem_kernels import fused_delta_attention_with_kvcache, hf
from deltamem_kernels.hf import attention, generic
from deltamem_kernels.hf.cache import cache_keyword, given_cache, memory_layer
from deltamem_kernels.hf.memory import Packed

STOCK, FROZEN, EAGER, FUSED = "stock, SDPA", "our attention, no memory", "delta-mem, eager torch", "delta-mem, fused"

GEOMETRIES = {
    "qwen3-0.6b": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
}
POSITIONS = 40960
# The published models' options; corrections as large as a trained adapter's, so that the gate sees them.
CONFIG = {"delta_heads": ("q", "o"), "output_init": "random", "online_gain": 1.0}
GATE_TOKENS, GATE_STEPS, GATE_LAYERS = 48, 4, 2


def backbone(geometry: str, folder: str | None, layers: int | None, dtype, device):
    """A frozen model in eval mode, of random weights or a local checkpoint's, cut to its first ``layers``."""
    if folder:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=dtype, attn_implementation="sdpa"
        )
    else:
        sizes = GEOMETRIES[geometry] | ({"num_hidden_layers": layers} if layers else {})
        config = transformers.Qwen3Config(
            **sizes, max_position_embeddings=POSITIONS, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
        )
        torch.manual_seed(0)
        with device:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if layers:
        cut(model, layers)
    return model.to(device).eval().requires_grad_(False)


def cut(model, layers: int) -> None:
    decoder = model.get_decoder()
    decoder.layers = decoder.layers[:layers]
    decoder.config.num_hidden_layers = min(layers, decoder.config.num_hidden_layers)


def sharing(model):
    """A copy whose modules are its own and whose weights are ``model``'s."""
    weights = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, weights)


class Memories:
    """One memory's options and values, for every model that is to have it."""

    def __init__(self, model, adapter: str | None):
        donor = sharing(model)
        if adapter:
            hf.load_adapter(donor, adapter)
        else:
            torch.manual_seed(1)
            hf.attach(donor, hf.DeltaMemConfig(**CONFIG))
        record = donor._delta_mem
        self.config = record.config
        self.values = {m.layer_idx: m.delta_mem.state_dict() for m in record.attentions.values()}

    def attach(self, model):
        """``model`` with the memory, on those of its layers that it has."""
        layers = len(model.get_decoder().layers)
        targets = tuple(i for i in self.config.target_layers if i < layers)
        hf.attach(model, dataclasses.replace(self.config, target_layers=targets))
        for module in model._delta_mem.attentions.values():
            module.delta_mem.load_state_dict(self.values[module.layer_idx])
            module.delta_mem.requires_grad_(False).repack()
        return model.eval()

    def in_eager(self) -> bool:
        """Whether the eager formulation has these options."""
        c = self.config
        plain = c.state_update_mode == "standard" and c.couple_lambda and c.normalize_qk
        return plain and not c.writes_segments and not c.delta_o_rmsnorm


def variants(model, memories: Memories) -> dict:
    """Row -> model; all share ``model``'s weights."""
    rows = {
        STOCK: sharing(model),
        FROZEN: without_memory(memories.attach(sharing(model))),
        FUSED: memories.attach(sharing(model)),
    }
    if memories.in_eager():
        rows[EAGER] = with_eager_memory(sharing(model), memories)
    return rows


# ---------------------------------------------------------------- our attention without a memory


def without_memory(model):
    """An attached model whose attention runs the same kernels with no memory argument."""
    for module in model._delta_mem.attentions.values():
        if module.delta_mem.family is None:
            raise NotImplementedError(
                f"bench: model must be of a family with a fused path, got {type(module).__name__}"
            )
        module.forward = types.MethodType(_forward_without_memory, module)
    return model


_NO_CORRECTIONS = Packed(None, None, None, None, {}, None, {})


def _forward_without_memory(module, hidden_states, position_embeddings, attention_mask=None, **kw):
    """``hf.attention.forward`` less its memory."""
    call = generic.current_call(module, kw)
    shape = (*hidden_states.shape[:2], -1, module.head_dim)
    q, k, v = (p(hidden_states).view(shape) for p in (module.q_proj, module.k_proj, module.v_proj))
    family, B = module.delta_mem.family, hidden_states.shape[0]
    arguments = attention._layer_arguments(module, family, call, _NO_CORRECTIONS, position_embeddings, B)
    cache = given_cache(kw)
    layer = memory_layer(cache, module.layer_idx)
    keys, values, filled, _, refill = attention._append(layer, cache, module.layer_idx, k, v, call)
    if refill:
        raise NotImplementedError("bench: cache must be dynamic for a model with sliding windows, got static")
    out = fused_delta_attention_with_kvcache(q, keys, values, k, v, cache_seqlens=filled, **arguments).out
    return module.o_proj(out.flatten(2)), None


# ---------------------------------------------------------------- the memory in torch operations


class EagerMemory:
    """Hooks on a stock attention module that add a memory; its state lives here."""

    def __init__(self, module, memory):
        self.memory, self.state, self.reads, self.write = memory, None, None, True
        module.register_forward_pre_hook(self.read, with_kwargs=True)
        for head in memory.config.delta_heads:
            projection = getattr(module, f"{head}_proj")
            projection.register_forward_hook(lambda _, args, out, head=head: self.correct(head, out))

    def read(self, module, args, kwargs):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.packed = self.memory.packed(hidden.dtype)
        projected = self.memory.project(self.packed, hidden, True)._asdict()
        inputs = eager.memory_inputs(projected | {"beta_bias": self.packed.beta_bias})
        if self.write:
            self.reads, self.state = eager.scan_loop(*inputs, self.state)
        else:
            self.reads = torch.einsum("bhij,bthj->bthi", self.state, inputs[0])

    def correct(self, head, out):
        delta = self.packed.deltas.get(head)
        return out if delta is None else out + F.linear(self.reads.flatten(2).to(out.dtype), delta.to(out.dtype))


def with_eager_memory(model, memories: Memories):
    """The stock model under ``EagerMemory``."""
    donor = memories.attach(sharing(model))._delta_mem.attentions
    model.eager_memories = [EagerMemory(model.get_submodule(name), m.delta_mem) for name, m in donor.items()]
    return model


def reset(model) -> None:
    """Forget what an earlier run wrote. States beside a KV cache go with it."""
    for memory in getattr(model, "eager_memories", ()):
        memory.state = None


# ---------------------------------------------------------------- correctness


def check(model, memories: Memories, dtype) -> dict[str, float]:
    """Gate our rows on the first layers' hidden states, prefill and decode, against fp64. -> row: share of its budget

    A row's budget comes from the torch row of the same mathematics.
    """
    layers = min(len(model.get_decoder().layers), max(GATE_LAYERS, 1 + min(memories.config.target_layers, default=0)))
    small = sharing(model)
    cut(small, layers)
    embedding = small.get_input_embeddings()
    tokens = torch.randint(embedding.num_embeddings, (1, GATE_TOKENS + GATE_STEPS), device=embedding.weight.device)
    inputs = embedding(tokens)
    small.set_input_embeddings(torch.nn.Identity())  # fp64 copies of vocabularies are large
    small.lm_head = torch.nn.Identity()
    exact = copy.deepcopy(small).double()
    want = {STOCK: hidden(exact, inputs.double())}
    rows = variants(small, memories)
    want[FROZEN] = want[STOCK]
    bound = {FROZEN: STOCK}
    if EAGER in rows:
        exact_memory = with_eager_memory(exact, memories)
        want[EAGER] = want[FUSED] = hidden(exact_memory, inputs.double())
        bound[FUSED] = EAGER
        if not bool((want[EAGER] != want[STOCK]).any()):
            raise timing.GateError("delta-mem: the memory changes nothing")
    got = {name: hidden(row, inputs) for name, row in rows.items()}
    shares = {}
    for name, plain in bound.items():
        allowed = timing.budget(got[plain], want[name], dtype)
        allowed = allowed + torch.finfo(dtype).eps / 2 * want[name].abs().max()  # sums of rounded terms
        timing.gate(f"{name}: hidden states of {layers} layers", got[name], want[name], allowed)
        shares[name] = float(((got[name].double() - want[name]).abs() / allowed).max())
    return shares


def hidden(model, inputs):
    """Last hidden states ``[1, T, hidden]`` of a prefill and of one token after another."""
    reset(model)
    decoder, cache = model.get_decoder(), DynamicCache(config=model.config)
    held = {cache_keyword(decoder.forward): cache}
    parts = [inputs[:, :GATE_TOKENS], *inputs[:, GATE_TOKENS:].split(1, 1)]
    return torch.cat([decoder(inputs_embeds=x, **held).last_hidden_state for x in parts], 1)
