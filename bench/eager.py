"""The same mathematics in plain torch operations: the baselines, and in fp64 the truth of the gates.

Torch attention is fastest on caches of [B, HKV, S, D]; the kernels get [B, S, HKV, D], flash_attn's layout.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

NORM_EPS = 1e-6

# ---------------------------------------------------------------- attention of one query token per row

# A formulation maps q [B, 1, HQ, D], k and v [B, HKV, S, D] to [B, 1, HQ, D].
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=True).transpose(1, 2)


def sdpa_group_as_sequence(q, k, v):
    """The HQ/HKV query heads of a kv head stand as the rows of one attention: no causal mask is needed."""
    return F.scaled_dot_product_attention(_grouped(q, k), k, v).reshape(q.shape)


def sdpa_group_and_head_as_batch(q, k, v):
    folded = _grouped(q, k).flatten(0, 1)[:, None]  # [B·HKV, 1, G, D]
    return F.scaled_dot_product_attention(folded, k.flatten(0, 1)[:, None], v.flatten(0, 1)[:, None]).reshape(q.shape)


def bmm_softmax_bmm(q, k, v):
    """Scores and probabilities stay in the input's dtype."""
    scores = _grouped(q, k) * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
    return (torch.softmax(scores, -1) @ v).reshape(q.shape)


def bmm_softmax32_bmm(q, k, v):
    """The eager attention of model libraries: softmax in fp32, at least."""
    scores = _grouped(q, k) @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return (torch.softmax(scores.to(_wide(scores)), -1).to(q.dtype) @ v).reshape(q.shape)


def decode_attention(device: torch.device) -> dict[str, Attention]:
    found = {
        "sdpa gqa": sdpa,
        "sdpa folded into sequence": sdpa_group_as_sequence,
        "sdpa folded into batch": sdpa_group_and_head_as_batch,
        "bmm-softmax-bmm": bmm_softmax_bmm,
        "bmm-softmax32-bmm": bmm_softmax32_bmm,
    }
    if device.type == "cuda":
        folded = {"gqa": sdpa, "folded into sequence": sdpa_group_as_sequence}
        found |= {f"{name} sdpa {how}": only(name, call) for name in LIBRARIES for how, call in folded.items()}
        found["flex attention"] = flex
    return found


# Attention libraries that torch carries on a GPU; sdpa's own choice among them is a formulation, too.
LIBRARIES = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def only(library: str, attention: Attention) -> Attention:
    """Raises where the library does not cover the call."""

    def run(q, k, v):
        with sdpa_kernel(LIBRARIES[library]):
            return attention(q, k, v)

    return run


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # one per shape; beyond the limit it would run uncompiled
    return torch.compile(flex_attention, dynamic=False)


def flex(q, k, v):
    return _compiled_flex()(q.transpose(1, 2), k, v, enable_gqa=True).transpose(1, 2)


def _grouped(q, k):
    return q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])  # [B, HKV, G, D] of [B, 1, HQ, D]


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


# ---------------------------------------------------------------- causal attention of [B, T, heads, D]


def causal_sdpa(q, k, v):
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)


def causal_sdpa_by_group_member(q, k, v):
    """HQ/HKV plain attentions, each with one query head per kv head."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    members = q.unflatten(2, (k.shape[1], -1)).permute(3, 0, 2, 1, 4)  # [G, B, HKV, T, D]
    outs = [F.scaled_dot_product_attention(member, k, v, is_causal=True) for member in members]
    return torch.stack(outs, 2).permute(0, 3, 1, 2, 4).flatten(2, 3)


def causal_sdpa_of_copied_heads(q, k, v):
    """For a library that wants as many kv heads as query heads."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


@functools.cache
def _causal_blocks(tokens, device):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=device)


def causal_flex(q, k, v):
    blocks = _causal_blocks(q.shape[1], q.device)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return _compiled_flex()(*heads_first, block_mask=blocks, enable_gqa=True).transpose(1, 2)


QUERY_BLOCK = 2048


def causal_bmm(q, k, v):
    """Softmax in fp32, at least; a kv head and a block of queries at a time to bound the memory of the scores."""
    outs = []
    for head, queries in enumerate(q.unflatten(2, (k.shape[2], -1)).unbind(2)):
        blocks = []
        for first in range(0, q.shape[1], QUERY_BLOCK):
            block = queries[:, first : first + QUERY_BLOCK]
            seen = first + block.shape[1]
            scores = torch.einsum("btgd,bsd->bgts", block, k[:, :seen, head]) * q.shape[-1] ** -0.5
            future = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(first + 1)
            weights = torch.softmax(scores.to(_wide(scores)).masked_fill(future, -torch.inf), -1).to(q.dtype)
            blocks.append(torch.einsum("bgts,bsd->btgd", weights, v[:, :seen, head]))
        outs.append(torch.cat(blocks, 1))
    return torch.cat(outs, 2)


def prefill_attention(device: torch.device) -> dict[str, Attention]:
    found = {"sdpa gqa": causal_sdpa, "sdpa by group member": causal_sdpa_by_group_member}
    if device.type == "cuda":
        forms = {"gqa": causal_sdpa, "of copied heads": causal_sdpa_of_copied_heads}
        found |= {f"{name} sdpa {how}": only(name, call) for name in LIBRARIES for how, call in forms.items()}
        found["flex attention"] = causal_flex
    return found


# ---------------------------------------------------------------- memory


def activated(x):
    return F.normalize(torch.tanh(x.to(_wide(x))), dim=-1, eps=1e-6)


def scan_token(state, mem_q, mem_k, mem_v, beta):
    """One token of the standard rule with lam = 1 - beta. state [B, H, R, R], the rest [B, H, R]."""
    reads = (state @ mem_q.unsqueeze(-1)).squeeze(-1)
    recalled = state @ mem_k.unsqueeze(-1)
    gate = beta.unsqueeze(-1)
    state = (1 - gate) * state + gate * (mem_v.unsqueeze(-1) - recalled) * mem_k.unsqueeze(-2)
    return reads, state


def scan_loop(mem_q, mem_k, mem_v, beta, state=None):
    """delta_scan, token by token. [B, T, H, R] -> reads [B, T, H, R], final state."""
    if state is None:
        batch, _, heads, rank = mem_q.shape
        state = mem_q.new_zeros(batch, heads, rank, rank)
    reads = []
    # unbind, not indexing: the gradient of an index is a tensor of all tokens
    for token in zip(*(x.unbind(1) for x in (mem_q, mem_k, mem_v, beta)), strict=True):
        read, state = scan_token(state, *token)
        reads.append(read)
    return torch.stack(reads, 1), state


# ---------------------------------------------------------------- the chain


def memory_inputs(layer):
    """Raw projections of a layer -> activated mem_q, mem_k, mem_v and the gate, in fp32 (or fp64)."""
    beta = torch.sigmoid(layer["beta"].to(_wide(layer["beta"])) + layer["beta_bias"])
    return (
        activated(layer["mem_q"]),
        activated(layer["mem_k"]),
        layer["mem_v"].to(_wide(layer["mem_v"])),
        beta,
    )


def rotate(x, cos, sin):
    """x [B, T, heads, D]; cos, sin [T, D/2]; halves paired."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def prepared(layer, reads, first_position):
    """q and k after correction (if there are reads), QK-norm and RoPE."""
    q, k = layer["q"], layer["k"]
    if reads is not None:
        q = q + F.linear(reads.flatten(2).to(q.dtype), layer["delta_q"].to(q.dtype)).view_as(q)
    q = F.rms_norm(q, q.shape[-1:], layer["q_norm_weight"], NORM_EPS)
    k = F.rms_norm(k, k.shape[-1:], layer["k_norm_weight"], NORM_EPS)
    here = slice(first_position, first_position + q.shape[1])
    cos, sin = layer["rotary_cos"][here], layer["rotary_sin"][here]
    return rotate(q, cos, sin), rotate(k, cos, sin)


def decode_step(layer, k_cache, v_cache, pool, attention: Attention):
    """One token per row at the cache's last slot: memory, correction, norm, RoPE, append, attention.

    k_cache, v_cache [B, HKV, S, D] and pool [B, H, R, R] advance in place.
    -> out [B, 1, HQ, D], reads [B, 1, H, R]
    """
    mem_q, mem_k, mem_v, beta = memory_inputs(layer)
    reads, state = scan_token(pool, mem_q[:, 0], mem_k[:, 0], mem_v[:, 0], beta[:, 0])
    pool.copy_(state)
    reads = reads[:, None]
    slot = k_cache.shape[2] - 1
    q, k = prepared(layer, reads, slot)
    k_cache[:, :, slot] = k[:, 0]
    v_cache[:, :, slot] = layer["v"][:, 0]
    return attention(q, k_cache, v_cache), reads


def prefill(layer, attention=causal_sdpa, memory=True):
    """A whole sequence from an empty cache and state zero. -> out [B, T, HQ, D], reads, final state."""
    reads, state = scan_loop(*memory_inputs(layer)) if memory else (None, None)
    q, k = prepared(layer, reads, 0)
    return attention(q, k, layer["v"]), reads, state


def in_fp64(layer):
    return {name: tensor.double() for name, tensor in layer.items()}


# ---------------------------------------------------------------- inputs


def random_layer(batch, tokens, heads, kv_heads, dim, positions, dtype, device, rank=8, generator=None) -> dict:
    """One layer's raw projections, weights and rotary tables, as a model with one state would give them."""

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=dtype)

    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(dim // 2) / (dim / 2))
    return {
        "q": normal(batch, tokens, heads, dim),
        "k": normal(batch, tokens, kv_heads, dim),
        "v": normal(batch, tokens, kv_heads, dim),
        "mem_q": normal(batch, tokens, 1, rank),
        "mem_k": normal(batch, tokens, 1, rank),
        "mem_v": normal(batch, tokens, 1, rank),
        "beta": normal(batch, tokens, 1, rank),
        "beta_bias": torch.randn(1, rank, generator=generator).to(device),
        "delta_q": normal(heads * dim, rank, scale=0.25),
        "q_norm_weight": 1 + normal(dim, scale=0.1),
        "k_norm_weight": 1 + normal(dim, scale=0.1),
        "rotary_cos": angles.cos().to(device=device, dtype=dtype),
        "rotary_sin": angles.sin().to(device=device, dtype=dtype),
    }


MEMORY_ARGUMENTS = ("mem_q", "mem_k", "mem_v", "beta", "beta_bias", "delta_q")
PREP_ARGUMENTS = ("q_norm_weight", "k_norm_weight", "rotary_cos", "rotary_sin")


def kernel_arguments(layer, memory: bool) -> dict:
    """Keyword arguments of the fused functions for such a layer."""
    arguments = {name: layer[name] for name in PREP_ARGUMENTS}
    if memory:
        arguments.update({name: layer[name] for name in MEMORY_ARGUMENTS})
        arguments.update(use_qk_activation_in_kernel=True, use_gate_in_kernel=True)
    return arguments
