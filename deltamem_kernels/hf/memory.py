"""The memory's parameters beside one attention layer, and the tensors that the kernels take from them."""

import math
from operator import attrgetter, is_
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from deltamem_kernels.hf.config import DELTA_HEADS, DeltaMemConfig

Tensor = torch.Tensor
_version = attrgetter("_version")
_NOTHING_PACKED = {"_packed": None, "_packed_of": (), "_packed_versions": ()}


def _versions(memory) -> tuple | None:
    """Version counters of its parameters; None: made under inference mode, they have none."""
    try:
        return (*map(_version, memory._parameters.values()),)
    except RuntimeError:
        return None


class Packed(NamedTuple):
    """A layer's parameters as the kernels take them."""

    dtype: torch.dtype  # of the inputs
    projection: Tensor  # [hidden, 3 H R + gates]: columns of mem_q, mem_k, mem_v, beta, and lam unless coupled
    beta_bias: Tensor  # [H, R or 1] fp32
    lam_bias: Tensor | None
    deltas: dict[str, Tensor]  # "q", "k", "v", "o" -> [out_features, H R] with alpha / rank and scale in it
    rms_weight: Tensor | None  # [hidden]
    scan: dict  # the options of delta_scan


class Projected(NamedTuple):
    """What ``delta_scan`` takes for some tokens: raw projections and gate logits, ``[B, T, H, R or 1]``."""

    mem_q: Tensor
    mem_k: Tensor | None
    mem_v: Tensor | None
    beta: Tensor | None
    lam: Tensor | None


class LayerMemory(nn.Module):
    """Parameters of one layer under their published names, ``[out, in]`` as of a linear layer without bias.

    Args:
        config: The adapter's options.
        hidden_size: Width of the attention's input.
        out_features: Width of the projections that the layer has: "q", "o", and "k", "v" where they are apart.
        index: Position among the model's memories.
    """

    def __init__(self, config: DeltaMemConfig, hidden_size: int, out_features: dict[str, int], index: int, **factory):
        super().__init__()
        self.config, self.hidden_size, self.index = config, hidden_size, index
        self.out_features = out_features
        H, R = config.num_state_heads, config.rank
        gates = H * R if config.rankwise_gates else H
        shapes = {f"memory_{x}_proj": (H * R, hidden_size) for x in "qkv"}
        shapes |= {f"delta_{x}_proj": (out_features[x], H * R) for x in DELTA_HEADS if x in out_features}
        shapes |= {"beta_proj": (gates, hidden_size), "beta_bias": (gates,)}
        if not config.couple_lambda:
            shapes |= {"lambda_proj": (gates, hidden_size), "lambda_bias": (gates,)}
        if config.delta_o_rmsnorm:
            shapes["delta_o_rmsnorm_weight"] = (out_features["o"],)
        if config.trainable_delta_scale:
            shapes["delta_scale_raw"] = (len(DELTA_HEADS) if config.delta_scale_granularity == "head" else 1,)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **factory)))
            self.get_parameter(name).requires_grad_(self._trains(name))
        self._sizes = H, R, R if config.rankwise_gates else 1
        self.repack()
        self.path = "not run"  # how the last call went: "fused", or "generic" with its reason

    def _trains(self, name: str) -> bool:
        if name == "delta_o_rmsnorm_weight":
            return "o" in self.config.delta_heads
        if name in {f"delta_{x}_proj" for x in DELTA_HEADS}:
            return name[6] in self.config.delta_heads
        return not (name.startswith("lambda_") and self.config.state_update_mode == "no_lambda")

    @torch.no_grad()
    def initialize(self, frozen_weights: dict[str, Tensor]) -> None:
        """Starting values; ``frozen_weights``: the projections' own weights, for the ``base_slice`` inits."""
        config = self.config
        for name, parameter in self.named_parameters():
            if name.startswith("memory_"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            elif name == "beta_bias" or name == "lambda_bias":
                parameter.fill_(config.beta_bias_init if name == "beta_bias" else -config.beta_bias_init)
            elif name == "delta_o_rmsnorm_weight":
                parameter.fill_(1)
            elif name == "delta_scale_raw":
                share = min(max(config.delta_scale_init / config.delta_scale_max, 1e-4), 1 - 1e-4)
                parameter.fill_(math.log(share / (1 - share)))
            else:
                parameter.zero_()
        for head in config.delta_heads:
            delta = self.get_parameter(f"delta_{head}_proj")
            if config.output_init == "random":
                nn.init.kaiming_uniform_(delta, a=math.sqrt(5))
                delta.mul_(config.online_gain)
            elif config.output_init != "zero":
                weight = frozen_weights[head]
                width = min(config.rank, weight.shape[1])
                if config.output_init == "base_slice_fixed":
                    width = min(width, config.base_slice_ref_width)
                columns = F.normalize(weight[:, :width].to(delta.device).float(), dim=0, eps=1e-6)
                delta[:, :width].copy_(columns * config.online_gain)

    def train(self, mode: bool = True):
        # Parameters edited through .data carry no version; a switch of mode is where such edits end.
        self.repack()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self.repack()  # another dtype or device
        return super()._apply(*args, **kwargs)

    def repack(self) -> None:
        """Forget packed weights; the next inference call packs again."""
        self.__dict__.update(_NOTHING_PACKED)

    def __getstate__(self):
        # A copy packs its own, whose versions count from another start.
        return self.__dict__ | _NOTHING_PACKED

    def repack_changed(self) -> None:
        """``repack`` if a parameter is another object, or at another version, than when it was packed.

        Called before a forward for all layers at once: one after the other it takes a fraction of what it takes between
        layers, whose weights push parameters and code out of the caches.
        """
        if self._packed is not None:
            versions, parameters = _versions(self), self._parameters.values()
            if versions is None or versions != self._packed_versions or not all(map(is_, parameters, self._packed_of)):
                self.repack()

    def packed(self, dtype: torch.dtype) -> Packed:
        """The packed parameters for inputs of ``dtype``, with a graph under grad mode, else remembered."""
        heads = self.config.delta_heads
        if torch.is_grad_enabled():
            return self._pack(dtype, heads)
        known = self._packed
        if known is not None and known.dtype == dtype:
            return known
        if torch.compiler.is_compiling():
            return self._pack(dtype, heads)
        heads = [x for x in heads if self.get_parameter(f"delta_{x}_proj").any()]
        self._packed = self._pack(dtype, heads)
        # the parameters themselves: another one could come to stand where a forgotten one stood
        self._packed_of, self._packed_versions = (*self._parameters.values(),), _versions(self)
        return self._packed

    def _pack(self, dtype, heads) -> Packed:
        config = self.config
        has_lam = not config.couple_lambda and config.state_update_mode != "no_lambda"
        rows = [self.memory_q_proj, self.memory_k_proj, self.memory_v_proj, self.beta_proj]
        if has_lam:
            rows.append(self.lambda_proj)
        deltas = {x: self.get_parameter(f"delta_{x}_proj") * self._scale(x) for x in heads}
        H = config.num_state_heads
        # On a CPU the call of a half-precision product costs more than so small a product in fp32.
        halved = dtype.itemsize == 2 and self.beta_bias.device.type == "cpu"
        return Packed(
            dtype,
            torch.cat(rows).to(torch.float32 if halved else dtype).t(),
            self.beta_bias.float().view(H, -1),
            self.lambda_bias.float().view(H, -1) if has_lam else None,
            deltas,
            self.delta_o_rmsnorm_weight if config.delta_o_rmsnorm and "o" in deltas else None,
            {
                "update_rule": config.state_update_mode,
                "use_qk_activation_in_kernel": config.normalize_qk,
                "use_gate_in_kernel": True,
            },
        )

    def _scale(self, head: str):
        scale = self.config.alpha / self.config.rank
        if not self.config.trainable_delta_scale:
            return scale
        raw = self.delta_scale_raw[DELTA_HEADS.index(head) if self.delta_scale_raw.numel() > 1 else 0]
        return scale * self.config.delta_scale_max * torch.sigmoid(raw)

    def project(self, packed: Packed, hidden: Tensor, write: bool) -> Projected:
        """One skinny projection of the layer's input ``[B, T, hidden]``; without writes, of its queries alone."""
        H, R, G = self._sizes
        HR = H * R
        B, T, _ = hidden.shape
        projection = packed.projection
        hidden = hidden.flatten(0, 1).to(projection.dtype)
        if not write:
            return Projected(torch.mm(hidden, projection[:, :HR]).view(B, T, H, R), None, None, None, None)
        x = torch.mm(hidden, projection)
        if G == R:
            parts = x.view(B, T, -1, H, R).unbind(2)
            return Projected(*parts) if len(parts) == 5 else Projected(*parts, None)
        mem_q, mem_k, mem_v = x[:, : 3 * HR].view(B, T, 3, H, R).unbind(2)
        gates = x[:, 3 * HR :].view(B, T, -1, H, G).unbind(2)
        return Projected(mem_q, mem_k, mem_v, gates[0], gates[1] if len(gates) == 2 else None)

    def scan_arguments(self, packed: Packed, projected: Projected) -> dict:
        """Keyword arguments of ``delta_scan`` and of the fused functions."""
        write = projected.beta is not None
        return {
            "mem_q": projected.mem_q,
            "mem_k": projected.mem_k,
            "mem_v": projected.mem_v,
            "beta": projected.beta,
            "lam": projected.lam,
            "write": write,
            "beta_bias": packed.beta_bias if write else None,
            "lam_bias": packed.lam_bias if write else None,
            **packed.scan,
        }

    def mean_gate(self, packed: Packed, tokens: Projected, written: Tensor | None) -> Tensor:
        """Mean of beta over the rows of what each sequence writes, ``[B]`` fp32; 0 where it writes nothing."""
        gates = torch.sigmoid(tokens.beta.float() + packed.beta_bias).mean((2, 3))  # [B, T]
        if written is None:
            return gates.mean(1)
        return (gates * written).sum(1) / written.sum(1).clamp_min(1)

    def zero_state(self, batch_size: int, device: torch.device) -> Tensor:
        H, R = self.config.num_state_heads, self.config.rank
        return torch.zeros(batch_size, H, R, R, dtype=torch.float32, device=device)

    def extra_repr(self) -> str:
        config = self.config
        return f"rank={config.rank}, state_heads={config.num_state_heads}, heads={''.join(config.delta_heads)}"
