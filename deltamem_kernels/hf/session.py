"""A conversation whose memory outlives its context and its process."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from deltamem_kernels.hf import session_file
from deltamem_kernels.hf.attach import attachment
from deltamem_kernels.hf.cache import cache_keyword
from deltamem_kernels.hf.state import DeltaMemState
from deltamem_kernels.hf.text import Text

_UNDO = 16  # turns that can be rolled back; each keeps one state


class _Mark(NamedTuple):
    """Where a turn began."""

    tokens: int
    state: DeltaMemState


class DeltaMemSession:
    """One conversation with a model that has a memory: turn by turn, saved, forgotten in part, rolled back.

    The session holds the transcript, the KV cache of its recent part (the context) and the memory's state. The same
    calls of a session give the same bits, whether it was saved and loaded between them or not: ``save`` writes the
    keys and values themselves, since computing them again in other pieces would round otherwise. Keys are kept of the
    whole context, those that a sliding window hides too, so that turns can be rolled back.

    A turn's last token enters the memory when the next turn begins (or ``save``, ``forget_context``,
    ``clear_memory`` is called). An adapter that writes segments takes a message in one call, and a reply again in one
    call when it is complete.

    Args:
        model: With a memory attached, in eval mode.
        tokenizer: A transformers tokenizer, whose chat template, if any, frames messages; or a pair of callables
            ``(text -> token ids, token ids -> text)``; or None: messages are token ids.
        segments: For adapters that write segments: token ids of a message or reply -> as many segment ids, -1 where
            nothing is written. None: it is one segment.
        prefill_chunk: Tokens of a message that enter in one forward.
        seed: Of the draws when sampling.

    Raises:
        ValueError: The model has no memory attached or is in training mode, or ``prefill_chunk`` < 1.
        TypeError: ``tokenizer`` is of another kind.
        NotImplementedError: The model's cache holds more than keys and values.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        *,
        segments: Callable[[list[int]], list[int]] | None = None,
        prefill_chunk: int = 512,
        seed: int = 0,
    ):
        self._config = attachment("DeltaMemSession", model).config
        if model.training:
            raise ValueError("DeltaMemSession: model must be in eval mode, got training mode")
        if prefill_chunk < 1:
            raise ValueError(f"DeltaMemSession: prefill_chunk must be >= 1, got {prefill_chunk}")
        for layer in DynamicCache(config=model.config).layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                rule = "keep keys and values alone in its cache"
                raise NotImplementedError(f"DeltaMemSession: model must {rule}, got a {type(layer).__name__}")
        self.model, self._segments, self._chunk = model, segments, prefill_chunk
        self._text = None if tokenizer is None else Text(tokenizer)
        self._generator = torch.Generator().manual_seed(seed)
        self._positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._tokens: list[int] = []
        self._start = 0  # first token of the context
        self._held = 0  # tokens before it have their keys in the cache, or were forgotten
        self._done = 0  # tokens before it have been written; those between were only read
        self._writes = True  # whether the last turn's tokens are written
        self._cache = DynamicCache()
        # A state is never changed once it is here, so that marks can refer to it.
        self._state = DeltaMemState.zeros(model, 1)
        self._marks: deque[_Mark] = deque(maxlen=_UNDO)
        self._running = False

    @property
    def tokens(self) -> list[int]:
        """All tokens of the conversation, forgotten ones too."""
        return list(self._tokens)

    @property
    def context_length(self) -> int:
        """Number of the last tokens that the model attends to."""
        return len(self._tokens) - self._start

    @property
    def undoable(self) -> int:
        """How many turns ``undo`` can roll back."""
        return len(self._marks)

    @property
    def state(self) -> DeltaMemState:
        """A copy of the memory, one ``[1, H, R, R]`` for each layer."""
        return self._state.clone()

    def memory_norms(self) -> list[float]:
        """Frobenius norm of each layer's state."""
        return torch.stack([x.norm().cpu() for x in self._state.tensors]).tolist()

    # ------------------------------------------------------------ turns

    def stream(
        self,
        message: str | Iterable[int],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        write: bool = True,
        stop: Iterable[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[int]:
        """One turn: the message enters, the reply's tokens come one by one.

        A turn that raises is rolled back; one whose iterator is closed keeps what it had given.

        Args:
            message: Text, or token ids, at least one.
            max_new_tokens: 0: the message enters without a reply.
            temperature: 0: the likeliest token; > 0: drawn from softmax(logits / temperature).
            top_k: Draw from the k likeliest; 0: from all.
            top_p: Draw from the fewest likeliest tokens whose probabilities add up to it.
            seed: Starts the draws anew; None: they go on.
            write: False: the turn reads the memory and leaves it as it is.
            stop: Tokens that end the reply (and are its last); None: the model's ends of sequence.
            progress: Called as ``progress(tokens entered, tokens of the message)``.

        Returns:
            Iterator of token ids. The turn runs as it is iterated.

        Raises:
            ValueError: An argument is outside its range, or the message does not fit the model's positions beside the
                context (``forget_context`` makes room).
            TypeError: The message is text and the session has no tokenizer.
            RuntimeError: Another turn's iterator is open.
        """
        self._idle("stream")
        if max_new_tokens < 0:
            raise ValueError(f"stream: max_new_tokens must be >= 0, got {max_new_tokens}")
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            rule = "temperature >= 0, top_k >= 0, 0 < top_p <= 1"
            raise ValueError(f"stream: sampling must have {rule}, got {temperature}, {top_k}, {top_p}")
        if isinstance(message, str):
            if self._text is None:
                raise TypeError("stream: message must be token ids in a session without tokenizer, got text")
            ids = self._text.message(message, self._tokens[-1] if self.context_length else None)
        else:
            ids = [int(x) for x in message]
        if not ids:
            raise ValueError("stream: message must have at least one token, got none")
        if self._positions is not None and self.context_length + len(ids) > self._positions:
            raise ValueError(
                f"stream: message must fit the model's {self._positions} positions beside {self.context_length} "
                f"tokens of context (forget_context makes room), got {len(ids)} tokens"
            )
        if seed is not None:
            self._generator.manual_seed(seed)
        stop = frozenset(self._ends() if stop is None else stop)
        sampling = (temperature, top_k, top_p)
        return self._turn(ids, write, max_new_tokens, sampling, stop, progress)

    def stream_text(self, message: str | Iterable[int], **options) -> Iterator[str]:
        """``stream``, as pieces of text.

        Raises:
            TypeError: The session has no tokenizer.
        """
        if self._text is None:
            raise TypeError("stream_text: session must have a tokenizer, got none")
        ends = frozenset(self._ends() if options.get("stop") is None else options["stop"])
        tokens = self.stream(message, **options)
        return self._text.pieces(token for token in tokens if token not in ends)

    def _ends(self) -> list[int]:
        known = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ends = list(known) if isinstance(known, (list, tuple)) else [known]
        tokenizer = self._text and self._text.tokenizer
        return [x for x in [*ends, getattr(tokenizer, "eos_token_id", None)] if x is not None]

    def _turn(self, ids, write, max_new_tokens, sampling, stop, progress):
        self._idle("stream")
        self._running = True
        try:
            self._flush()
            self._marks.append(_Mark(len(self._tokens), self._state))
            try:
                yield from self._reply(ids, write, max_new_tokens, sampling, stop, progress)
            except GeneratorExit:
                raise
            except BaseException:
                self._restore(self._marks.pop())
                raise
        finally:
            self._running = False

    def _reply(self, ids, write, max_new_tokens, sampling, stop, progress):
        self._tokens += ids
        self._writes = write
        # The mean over a segment is made in one call.
        whole = write and self._config.writes_segments
        step = len(ids) if whole else self._chunk
        for begin in range(0, len(ids), step):
            logits = self._feed(ids[begin : begin + step], write)
            if progress is not None:
                progress(min(begin + step, len(ids)), len(ids))
        for left in reversed(range(max_new_tokens)):
            token = self._pick(logits, *sampling)
            self._tokens.append(token)
            yield token
            if token in stop or left == 0 or self.context_length == self._positions:
                return
            logits = self._feed([token], write and not whole, final=not whole)

    def _pick(self, logits, temperature: float, top_k: int, top_p: float) -> int:
        """A token for logits ``[V]``."""
        if temperature == 0:
            return int(logits.argmax())
        logits, names = logits.float().cpu() / temperature, None
        if top_k or top_p < 1:
            logits, names = logits.topk(min(top_k or logits.numel(), logits.numel()))
        p = torch.softmax(logits, 0)
        if top_p < 1:
            p[p.cumsum(0) - p >= top_p] = 0  # the likeliest stays in any case
        drawn = torch.multinomial(p, 1, generator=self._generator)
        return int(drawn if names is None else names[drawn])

    def _feed(self, ids: list[int], write: bool, final: bool = True):
        """Append ``ids`` to the context. -> logits ``[V]`` after them. If it raises, nothing has happened."""
        held = self._held - self._start
        for layer in self._cache.layers:
            layer.crop(-max(0, layer.get_seq_length() - held))
        state, options = self._state.clone(), {cache_keyword(self.model.forward): self._cache}
        if write and self._config.writes_segments:
            segments = [0] * len(ids) if self._segments is None else self._segments(ids)
            options["delta_segment_ids"] = torch.tensor([segments], device=self._device)
        with torch.no_grad():
            result = self.model(
                torch.tensor([ids], device=self._device), use_cache=True, logits_to_keep=1, delta_state=state,
                delta_write=write, **options,
            )  # fmt: skip
        self._held += len(ids)
        if final:
            self._done = self._held
        self._state = state
        return result.logits[0, -1]

    def _flush(self) -> None:
        """What the last turn left to be written."""
        if self._done == len(self._tokens):
            return
        if self._writes and self._config.writes_segments:
            self._held = self._done
        self._feed(self._tokens[self._held :], self._writes)

    @property
    def _device(self):
        return self.model.get_input_embeddings().weight.device

    def _idle(self, function: str) -> None:
        if self._running:
            raise RuntimeError(f"{function}: session must be between turns (close the open iterator), got one running")

    # ------------------------------------------------------------ memory and context

    def undo(self) -> None:
        """Roll the last turn back: transcript, context and memory are what they were, to the bit; draws go on.

        Raises:
            ValueError: No turn is left to roll back, since the start, ``forget_context``, ``clear_memory``, or of the
                last 16.
            RuntimeError: A turn's iterator is open.
        """
        self._idle("undo")
        if not self._marks:
            raise ValueError("undo: session must have a turn to roll back, got none")
        self._restore(self._marks.pop())

    def _restore(self, mark: _Mark) -> None:
        del self._tokens[mark.tokens :]
        self._held = self._done = mark.tokens
        self._state = mark.state

    def forget_context(self) -> None:
        """Drop the KV cache and keep the memory: the next message is the first that the model attends to.

        Raises:
            RuntimeError: A turn's iterator is open.
        """
        self._idle("forget_context")
        self._flush()
        self._cache = DynamicCache()
        self._start = len(self._tokens)
        self._marks.clear()

    def clear_memory(self) -> None:
        """Empty the memory and keep the context.

        Raises:
            RuntimeError: A turn's iterator is open.
        """
        self._idle("clear_memory")
        self._flush()
        self._state = DeltaMemState.zeros(self.model, 1)
        self._marks.clear()

    # ------------------------------------------------------------ files

    def save(self, folder, *, context: bool = True) -> None:
        """Write the session to ``folder``, replacing the one there as a whole.

        Args:
            folder: Made where it is missing: ``session.json``, and a safetensors file of transcript, memory, the
                draws' generator and the context's keys and values.
            context: False: without keys and values, which are most of the size; the loaded session then goes on as
                after ``forget_context``.

        Raises:
            RuntimeError: A turn's iterator is open.
        """
        self._idle("save")
        self._flush()
        marks = list(self._marks) if context else []
        tensors = {"tokens": torch.tensor(self._tokens, dtype=torch.int64), "generator": self._generator.get_state()}
        for name, state in [("state", self._state), *((f"undo.{i}", mark.state) for i, mark in enumerate(marks))]:
            tensors |= {f"{name}.{i}": x.cpu().clone() for i, x in enumerate(state.tensors)}
        held = self.context_length if context else 0
        for i, layer in enumerate(self._cache.layers if held else []):
            tensors[f"keys.{i}"] = layer.keys[:, :, :held].cpu().contiguous()
            tensors[f"values.{i}"] = layer.values[:, :, :held].cpu().contiguous()
        body = {
            **session_file.identity("save", self.model),
            "context_start": len(self._tokens) - held,
            "layers": len(self._cache.layers) if held else 0,
            "undo": [mark.tokens for mark in marks],
            "prefill_chunk": self._chunk,
        }
        session_file.write(folder, body, tensors)

    @classmethod
    def load(cls, folder, model, tokenizer=None, *, segments=None) -> "DeltaMemSession":
        """The session that ``save`` wrote, to be continued by the same model with the same adapter.

        Args:
            folder: What ``save`` made.
            model, tokenizer, segments: As in the constructor.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file is damaged or of another version, or the session is another adapter's or backbone's.
        """
        found = session_file.identity("load", model)
        body, tensors = session_file.read("load", folder, found)
        session = cls(model, tokenizer, segments=segments, prefill_chunk=body["prefill_chunk"])
        session._tokens = tensors["tokens"].tolist()
        session._generator.set_state(tensors["generator"])
        session._start = body["context_start"]
        session._held = session._done = len(session._tokens)

        def state(name):
            zeros = session._state.tensors
            return DeltaMemState([tensors[f"{name}.{i}"].to(x.device) for i, x in enumerate(zeros)])

        session._marks.extend(_Mark(count, state(f"undo.{i}")) for i, count in enumerate(body["undo"]))
        devices = {
            module.layer_idx: next(module.parameters()).device
            for module in model.modules()
            if isinstance(getattr(module, "layer_idx", None), int) and next(module.parameters(), None) is not None
        }
        for i in range(body["layers"]):
            keys, values = (tensors[f"{name}.{i}"].to(devices[i]) for name in ("keys", "values"))
            session._cache.update(keys, values, i)
        session._state = state("state")
        return session
