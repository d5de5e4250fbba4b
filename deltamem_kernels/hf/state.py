"""The state that a caller holds, and what one forward of a model tells each of its layers about state and masks."""

import torch

Tensor = torch.Tensor


class DeltaMemState:
    """States of all of a model's memories, advanced by ``model(..., delta_state=state)``.

    Every layer reads the tensors captured when the model's forward began. When it returns, ``tensors`` is advanced
    once: under grad mode it is bound to tensors that carry the graph, otherwise the values are copied into the same
    storage. A forward that raises leaves it as it was.

    Args:
        tensors: One ``[B, H, R, R]`` fp32 tensor for each attached layer, in their order.

    Attributes:
        gates: How much the last call that wrote under grad mode let in, with its graph, for a loss on it: for each
            layer the mean of beta over the rows of what each sequence wrote, ``[B]`` fp32. None before.
    """

    def __init__(self, tensors: list[Tensor]):
        self.tensors = list(tensors)
        self.gates: list[Tensor] | None = None

    @classmethod
    def zeros(cls, model, batch_size: int) -> "DeltaMemState":
        """The empty memory of ``batch_size`` sequences, each layer's on its own device.

        Raises:
            ValueError: ``model`` has no memory attached.
        """
        from deltamem_kernels.hf.attach import memories

        return cls([m.zero_state(batch_size, m.beta_bias.device) for m in memories("DeltaMemState.zeros", model)])

    @property
    def batch_size(self) -> int:
        return self.tensors[0].shape[0]

    def clone(self) -> "DeltaMemState":
        """A copy in storage of its own, within the same graph."""
        return DeltaMemState([x.clone() for x in self.tensors])

    def detach(self) -> "DeltaMemState":
        """The same storage without a graph."""
        return DeltaMemState([x.detach() for x in self.tensors])

    def select(self, rows: Tensor) -> "DeltaMemState":
        """Sequences ``rows`` (int64 ``[N]``), in that order and as often as named."""
        return DeltaMemState([x.index_select(0, rows.to(x.device)) for x in self.tensors])

    def __repr__(self) -> str:
        return f"DeltaMemState({len(self.tensors)} x {tuple(self.tensors[0].shape)})"

    def _advance(self, final: dict[int, Tensor], gates: dict[int, Tensor]) -> None:
        advanced = [final.get(i, x) for i, x in enumerate(self.tensors)]
        if gates:
            self.gates = [gates[i] for i in sorted(gates)]
        if torch.is_grad_enabled() or any(x.requires_grad for x in self.tensors):
            self.tensors = advanced
            return
        for x, value in zip(self.tensors, advanced, strict=True):
            if value is not x:
                x.copy_(value)


def check_state(state, memories, batch_size: int) -> None:
    """``delta_state`` must fit the model's memories and this batch."""
    if not isinstance(state, DeltaMemState):
        raise TypeError(f"forward: delta_state must be a DeltaMemState, got {type(state).__name__}")
    if len(state.tensors) != len(memories):
        raise ValueError(
            f"forward: delta_state must hold a tensor for each of {len(memories)} layers, got {len(state.tensors)}"
        )
    for x, memory in zip(state.tensors, memories, strict=True):
        H, R = memory.config.num_state_heads, memory.config.rank
        if x.shape != (batch_size, H, R, R):
            raise ValueError(f"forward: delta_state must hold shape {(batch_size, H, R, R)}, got {tuple(x.shape)}")
        if x.dtype != torch.float32:
            raise TypeError(f"forward: delta_state must be float32, got {x.dtype}")


class Padding:
    """A batch's 2-D attention mask, as the layers use it.

    Args:
        mask: ``[B, K]``, nonzero where a token is; its last T columns are this call's tokens.
        tokens: T.
    """

    def __init__(self, mask: Tensor, tokens: int):
        self._valid = mask != 0
        self.token_mask = self._valid[:, -tokens:]  # [B, T]
        self._leading = None

    def leading(self):
        """(no pads among this call's tokens, pads only lead each row, their number int32 ``[B]``).

        Waits for the device, at the first call. Under a compiler nothing is known of values: (False, False, None).
        """
        if self._leading is None:
            if torch.compiler.is_compiling():
                return False, False, None
            valid = self._valid
            facts = torch.stack([self.token_mask.all(), (valid[:, 1:] >= valid[:, :-1]).all()]).tolist()
            self._leading = (*facts, (~valid).sum(1, dtype=torch.int32))
        return self._leading


class Call:
    """One forward of the model: the same for all of its layers, and for their recomputation under checkpointing."""

    def __init__(self, states, write: bool, segments: Tensor | None, padding: Padding | None, custom: str | None):
        self.states = states  # the tensors of an explicit delta_state as the forward found them, or None
        self.final: dict[int, Tensor] | None = {}  # layer -> its state after the call; None once the forward returned
        self.gates: dict[int, Tensor] = {}  # layer -> mean write gates, where it trains
        self.write = write
        self.trains = torch.is_grad_enabled()
        self._segments = segments  # [B, T], < 0 where a token is not written; None: every token writes
        self.padding = padding
        self.custom = custom  # why the attention mask is not causal with padding, or None
        self._lengths: dict = {}
        self._rotary: dict = {}

    @property
    def writes_segments(self) -> bool:
        return self._segments is not None

    # A model may lie on several devices; what a layer takes from here follows its input.

    def token_mask(self, device: torch.device) -> Tensor | None:
        """bool ``[B, T]``; None: every token is one."""
        return None if self.padding is None else self.padding.token_mask.to(device)

    def segments(self, device: torch.device) -> Tensor:
        return self._segments.to(device)

    def lengths(self, filled: int, batch_size: int, device: torch.device) -> Tensor:
        """int32 ``[B]`` of ``filled``, made once for all layers of one length."""
        key = (filled, device)
        if key not in self._lengths:
            self._lengths[key] = torch.full((batch_size,), filled, dtype=torch.int32, device=device)
        return self._lengths[key]

    def rotary(self, position_embeddings, batch_size: int):
        """cos and sin ``[B, T, D/2]`` of transformers' ``[B or 1, T, D]``, which repeat the angles for both halves."""
        key = id(position_embeddings)
        if key not in self._rotary:
            half = position_embeddings[0].shape[-1] // 2
            cos, sin = (x[..., :half].expand(batch_size, -1, -1) for x in position_embeddings)
            self._rotary[key] = cos, sin, position_embeddings  # held, so that its id stays its own
        return self._rotary[key][:2]

    def store(self, memory, state: Tensor, packed, tokens, written: Tensor | None) -> None:
        """A layer's state after the call, and what it wrote. A recomputation comes when nobody waits for it."""
        # before that is known: checkpointing wants a recomputation to save what the forward saved
        gates = memory.mean_gate(packed, tokens, written) if torch.is_grad_enabled() else None
        if self.final is None:
            return
        self.final[memory.index] = state
        if gates is not None:
            self.gates[memory.index] = gates


def diagonal(mask: Tensor, past) -> Tensor:
    """Which of this call's tokens a 4-D attention mask lets see themselves, ``[B, T]`` bool.

    Args:
        mask: ``[B, 1 or heads, T, K]``; bool (True: attend) or additive (0: attend).
        past: Keys before the first of the T tokens, among the K.
    """
    T = mask.shape[2]
    columns = torch.arange(T, device=mask.device) + past
    own = mask[:, 0].gather(2, columns.view(1, T, 1).expand(mask.shape[0], T, 1)).squeeze(2)
    return own if own.dtype == torch.bool else own == 0
