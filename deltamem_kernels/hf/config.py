"""What an adapter is: the options of the published format, and nothing that only one run needs."""

import math
from dataclasses import asdict, dataclass, fields

DELTA_HEADS = ("q", "k", "v", "o")

# Options of retired readouts. Published files carry them; each has one value that means "not used".
ARCHIVED = {
    "num_memory_partitions": 1,
    "num_global_memory_partitions": 0,
    "memory_partition_routing": "soft",
    "memory_partition_basis": "shared",
    "tie_memory_partition_read_write": False,
    "memory_partition_read_mode": "softmax",
    "slot_read_top_k": 0,
    "global_memory_mode": "shared_rw",
    "global_memory_read_top_k": 0,
    "global_memory_merge_mode": "gated_residual",
    "memory_reader_layers": (),
    "memory_readout_mode": "delta",
    "memory_write_source": "learned_hidden",
    "memory_write_proposals_per_message": 2,
    "synthetic_memory_slots": 1,
    "latent_memory_layers": (),
}

# Settings of those retired readouts, without effect while they are off: the published files hold these values.
ARCHIVED |= {
    "memory_partition_sigmoid_gate_bias_init": -2.0,
    "global_memory_gate_bias_init": -2.0,
    "global_memory_read_logit_bias": 0.0,
    "memory_reader_hidden_size": 1024,
    "memory_reader_residual_scale": 0.1,
    "memory_reader_read_only": True,
    "latent_memory_hidden_size": 1024,
    "latent_memory_residual_scale": 0.1,
    "latent_memory_slots": 4,
    "latent_memory_init_std": 0.002,
    "latent_gate_init": 0.01,
}

_CHOICES = {
    "state_update_mode": ("standard", "lambda_outside", "no_lambda"),
    "output_init": ("zero", "random", "base_slice", "base_slice_fixed"),
    "memory_write_granularity": ("token", "message_mean", "sentence_mean"),
    "delta_scale_granularity": ("layer", "head"),
    "delta_scale_parameterization": ("alpha_over_rank",),
}


def _fail(name, rule, got):
    raise ValueError(f"DeltaMemConfig: {name} must {rule}, got {got!r}")


@dataclass(frozen=True)
class DeltaMemConfig:
    """Options of a δ-mem adapter, with the names and defaults of the published ``delta_mem_config.json``.

        mem_q, mem_k = l2norm(tanh(memory_q_proj x)), l2norm(tanh(memory_k_proj x)),  mem_v = memory_v_proj x
        beta         = sigmoid(beta_proj x + beta_bias),  lam = 1 - beta or sigmoid(lambda_proj x + lambda_bias)
        q           += (alpha / rank) scale delta_q_proj reads,  and k, v, o alike

    Args:
        rank: R, rows and columns of a state.
        alpha: The corrections' factor is alpha / rank.
        beta_bias_init: Every beta_bias at the start; lambda_bias starts at its negative.
        normalize_qk: False: mem_q and mem_k are the raw projections.
        couple_lambda: True: lam = 1 - beta; False: lam has parameters of its own.
        state_update_mode: ``standard``, ``lambda_outside`` or ``no_lambda``; ``update_rule`` of ``delta_scan``.
        rankwise_gates: True: a gate for each row of a state; False: one for all of its rows.
        output_init: How corrections start: ``zero``, ``random``, or the first columns of the matching frozen weight,
            each of norm ``online_gain`` (``base_slice``: rank columns, ``base_slice_fixed``: ``base_slice_ref_width``).
        num_state_heads: H, states per layer.
        memory_write_granularity: ``token``: every token writes. ``message_mean``, ``sentence_mean``: one write for each
            segment of ``delta_segment_ids``, from the mean of its tokens; every token reads the state before the call.
        target_modules: Last name of the attention modules that get a memory.
        target_layers: Their layers; empty: all.
        delta_heads: Which of q, k, v, o are corrected.
        delta_o_rmsnorm, delta_o_rmsnorm_eps: RMSNorm over the correction of o.
        trainable_delta_scale: scale = sigmoid(delta_scale_raw) delta_scale_max, starting at ``delta_scale_init``; one
            for the layer, or one for each of q, k, v, o with ``delta_scale_granularity="head"``. False: scale = 1.

    Raises:
        ValueError: An option is outside its range.
        TypeError: An option has another type.
    """

    rank: int = 8
    alpha: float = 16.0
    beta_bias_init: float = -1.5
    normalize_qk: bool = True
    couple_lambda: bool = True
    state_update_mode: str = "standard"
    rankwise_gates: bool = True
    output_init: str = "zero"
    base_slice_ref_width: int = 8
    online_gain: float = 0.05
    num_state_heads: int = 1
    memory_write_granularity: str = "token"
    target_modules: tuple[str, ...] = ("self_attn",)
    target_layers: tuple[int, ...] = ()
    delta_heads: tuple[str, ...] = DELTA_HEADS
    delta_o_rmsnorm: bool = False
    delta_o_rmsnorm_eps: float = 1e-6
    trainable_delta_scale: bool = False
    delta_scale_init: float = 1.0
    delta_scale_max: float = 2.0
    delta_scale_granularity: str = "layer"
    delta_scale_parameterization: str = "alpha_over_rank"

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name), field.default))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                _fail(name, f"be one of {', '.join(choices)}", getattr(self, name))
        for name in ("rank", "num_state_heads", "base_slice_ref_width"):
            if getattr(self, name) < 1:
                _fail(name, "be >= 1", getattr(self, name))
        for name in ("delta_o_rmsnorm_eps", "delta_scale_init", "delta_scale_max"):
            if getattr(self, name) <= 0:
                _fail(name, "be > 0", getattr(self, name))
        if self.delta_scale_init >= self.delta_scale_max:
            _fail("delta_scale_init", f"be less than delta_scale_max = {self.delta_scale_max}", self.delta_scale_init)
        for head in self.delta_heads:
            if head not in DELTA_HEADS:
                _fail("delta_heads", f"hold only {', '.join(DELTA_HEADS)}", self.delta_heads)
        if not self.target_modules:
            _fail("target_modules", "name at least one module", self.target_modules)
        if any(index < 0 for index in self.target_layers):
            _fail("target_layers", "hold indices >= 0", self.target_layers)
        # an order of its own, so that equal adapters have equal configs
        object.__setattr__(self, "delta_heads", tuple(h for h in DELTA_HEADS if h in self.delta_heads))

    @property
    def writes_segments(self) -> bool:
        """Whether one write is made for each segment of ``delta_segment_ids`` instead of each token."""
        return self.memory_write_granularity != "token"

    def to_dict(self) -> dict:
        """The options as JSON holds them."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}

    @classmethod
    def from_dict(cls, options: dict) -> "DeltaMemConfig":
        """Options of a ``delta_mem_config.json``; missing keys take their defaults, retired ones have one legal value.

        Raises:
            ValueError: A key is unknown, or a value is outside its range.
            TypeError: ``options`` is no mapping, or a value has another type.
        """
        if not isinstance(options, dict):
            raise TypeError(f"DeltaMemConfig: options must be a mapping, got {type(options).__name__}")
        live = {field.name for field in fields(cls)}
        for name, value in options.items():
            if name in live:
                continue
            if name not in ARCHIVED:
                _fail("options", f"hold only known keys ({', '.join(sorted(live))})", name)
            value = tuple(value) if isinstance(value, list) else value
            if value != ARCHIVED[name] or isinstance(value, bool) != isinstance(ARCHIVED[name], bool):
                _fail(name, f"be {ARCHIVED[name]!r} (a retired option)", value)
        return cls(**{name: value for name, value in options.items() if name in live})


def _typed(name, value, default):
    """``value`` with the type of ``default``; integers count as floats, lists as tuples."""
    if isinstance(default, tuple):
        kind = int if name == "target_layers" else str
        if not isinstance(value, (list, tuple)) or not all(type(x) is kind for x in value):
            raise TypeError(f"DeltaMemConfig: {name} must be a sequence of {kind.__name__}, got {value!r}")
        return tuple(value)
    if isinstance(default, float) and type(value) in (int, float):
        if not math.isfinite(value):
            _fail(name, "be finite", value)
        return float(value)
    if type(value) is not type(default):
        raise TypeError(f"DeltaMemConfig: {name} must be of type {type(default).__name__}, got {value!r}")
    return value
