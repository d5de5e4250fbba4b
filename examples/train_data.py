"""Episodes of examples/train_adapter.py: from JSON lines to tokens, from tokens to batches.

A line is one episode: what is written, then what is asked about it without it.

    {"context": [{"role": "user", "content": "..."}, ...], "question": "...", "answer": "..."}

A system message that opens the context also stands before the question.
"""

import bisect
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

Tensor = torch.Tensor

FIELDS = ("context", "question", "answer")
IGNORED = -100  # label of a pad
_SENTENCE_END = re.compile(r"[.!?…。！？]+(?=\s|$)|\n")


class EpisodeError(ValueError):
    """An episode that cannot be trained on; the text names file, line and field."""


@dataclass(frozen=True)
class Limits:
    """Tokens of an episode's context, and of its question with the answer.

    A longer context is an error, or with ``truncate_context`` loses its oldest tokens; a longer question always is one.
    """

    context: int = 8192
    question: int = 512
    truncate_context: bool = False


class Episode(NamedTuple):
    """One episode's tokens, int64."""

    context: Tensor  # [T]
    segments: Tensor | None  # [T], message or sentence of each token, where an adapter writes those
    question: Tensor  # [Q]
    answer: Tensor  # [A]


class Batch(NamedTuple):
    """Episodes side by side. Masks are None where nothing is padded."""

    context: Tensor  # [B, T], pads behind
    context_mask: Tensor | None
    segments: Tensor | None  # [B, T], -1 at pads
    read: Tensor  # [B, U], pads before: question and answer
    read_mask: Tensor | None
    labels: Tensor  # [B, A], the answer at the end of read; IGNORED at pads before it

    def to(self, device) -> "Batch":
        return Batch(*(None if x is None else x.to(device) for x in self))


class Dataset:
    """Episodes of a JSONL file, checked and tokenised.

    Args:
        path: The file.
        tokenizer: A transformers tokenizer; without a chat template, messages are joined by newlines.
        limits: What an episode may hold.
        granularity: The adapter's ``memory_write_granularity``.
        show_progress: A bar over the lines.

    Raises:
        EpisodeError: A line is no episode, or too long.
        OSError: The file cannot be read.
    """

    def __init__(self, path, tokenizer, limits: Limits, granularity: str = "token", show_progress: bool = False):
        data = Path(path).read_bytes()
        self.digest = hashlib.sha256(data).hexdigest()
        self.episodes = []
        try:
            lines = data.decode().split("\n")  # not splitlines: JSON strings may hold other line separators
        except UnicodeDecodeError as error:
            raise EpisodeError(f"{path}: file must be UTF-8, got {error}") from error
        for number, line in enumerate(tqdm(lines, desc=Path(path).name, leave=False, disable=not show_progress), 1):
            if line.strip():
                try:
                    self.episodes.append(_encode(_parse(line), tokenizer, limits, granularity))
                except EpisodeError as error:
                    raise EpisodeError(f"{path}:{number}: {error}") from error
        if not self.episodes:
            raise EpisodeError(f"{path}: file must hold at least one episode, got none")

    def __len__(self) -> int:
        return len(self.episodes)

    def step(self, step: int, size: int, seed: int) -> list[Episode]:
        """The ``size`` episodes of a training step: shuffles of all episodes, one after another, cut into steps."""
        found = []
        while len(found) < size:
            epoch, offset = divmod(step * size + len(found), len(self))
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
            found += [self.episodes[i] for i in order[offset : offset + size - len(found)]]
        return found


def collate(episodes: list[Episode]) -> Batch:
    """Pad ``episodes`` to one batch."""
    context, context_mask = _padded([e.context for e in episodes], 0)
    segments = None
    if episodes[0].segments is not None:
        segments, _ = _padded([e.segments for e in episodes], -1)
    read, read_mask = _padded([torch.cat((e.question, e.answer)) for e in episodes], 0, before=True)
    labels, _ = _padded([e.answer for e in episodes], IGNORED, before=True)
    return Batch(context, context_mask, segments, read, read_mask, labels)


def _padded(rows: list[Tensor], value: int, before: bool = False) -> tuple[Tensor, Tensor | None]:
    side = "left" if before else "right"
    padded = torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side=side)
    if all(len(row) == padded.shape[1] for row in rows):
        return padded, None
    ones = [torch.ones_like(row) for row in rows]
    return padded, torch.nn.utils.rnn.pad_sequence(ones, True, 0, padding_side=side)


# ---------------------------------------------------------------- a line


def _parse(line: str) -> dict:
    try:
        episode = json.loads(line)
    except json.JSONDecodeError as error:
        raise EpisodeError(f"line must be JSON, got {error}") from error
    if not isinstance(episode, dict):
        raise EpisodeError(f"line must be an object, got {type(episode).__name__}")
    missing = [name for name in FIELDS if name not in episode]
    if missing:
        raise EpisodeError(f"{missing[0]} must be given, got only {', '.join(sorted(episode)) or 'no fields'}")
    for name in ("question", "answer"):
        _check_text(name, episode[name])
    context = episode["context"]
    if not isinstance(context, list) or not context:
        raise EpisodeError(f"context must be a list of messages, at least one, got {_short(context)}")
    for i, message in enumerate(context):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise EpisodeError(f"context[{i}] must be an object with role and content, got {_short(message)}")
        for name in ("role", "content"):
            _check_text(f"context[{i}].{name}", message[name])
    return episode


def _check_text(name: str, value) -> None:
    if not isinstance(value, str) or not value.strip():
        raise EpisodeError(f"{name} must be a text that is not empty, got {_short(value)}")


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------- its tokens


def _encode(episode: dict, tokenizer, limits: Limits, granularity: str) -> Episode:
    messages = episode["context"]
    system = messages[:1] if messages[0]["role"] == "system" else []
    context, segments = _encode_context(tokenizer, messages, granularity)
    if len(context) > limits.context:
        if not limits.truncate_context:
            raise EpisodeError(
                f"context must have at most {limits.context} tokens (or be cut by --truncate-context), got "
                f"{len(context)}"
            )
        context = context[-limits.context :]
        segments = None if segments is None else segments[-limits.context :]
    asked = [*system, {"role": "user", "content": episode["question"]}]
    prompt = _render(tokenizer, "question", asked, reply=True)
    answer = _reply(tokenizer, asked, prompt, episode["answer"])
    question = tokenizer.encode(prompt, add_special_tokens=not _has_template(tokenizer))
    answer = tokenizer.encode(answer, add_special_tokens=False)
    if not _has_template(tokenizer) and tokenizer.eos_token_id is not None:
        answer.append(tokenizer.eos_token_id)
    for name, ids in (("question", question), ("answer", answer)):
        if not ids:
            raise EpisodeError(f"{name} must have tokens, got none of {_short(episode[name])}")
    if len(question) + len(answer) > limits.question:
        raise EpisodeError(
            f"question and answer must have at most {limits.question} tokens, got {len(question)} + {len(answer)}"
        )
    tensors = [torch.tensor(ids, dtype=torch.long) for ids in (context, question, answer)]
    return Episode(tensors[0], None if segments is None else torch.tensor(segments), *tensors[1:])


def _encode_context(tokenizer, messages, granularity: str) -> tuple[list[int], list[int] | None]:
    """Tokens, and the message or sentence that each begins in."""
    text = _render(tokenizer, "context", messages)
    special = not _has_template(tokenizer)
    if granularity == "token":
        ids, segments = tokenizer.encode(text, add_special_tokens=special), None
    else:
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        if granularity == "message_mean":
            ends = [len(_render(tokenizer, "context", messages[:i])) for i in range(1, len(messages))]
        else:
            ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        ids = encoded["input_ids"]
        segments = [bisect.bisect_right(ends, start) for start, _ in encoded["offset_mapping"]]
    if not ids:
        raise EpisodeError("context must have tokens, got none")
    return ids, segments


def _has_template(tokenizer) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _render(tokenizer, name: str, messages, reply: bool = False) -> str:
    if not _has_template(tokenizer):
        return "\n".join(message["content"] for message in messages) + "\n"
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
    except Exception as error:  # a template raises what it likes
        raise EpisodeError(f"{name} must be messages that the model's chat template takes, got {error}") from error


def _reply(tokenizer, asked, prompt: str, answer: str) -> str:
    """The answer as the template ends it: what stands behind the prompt, without the newline after the turn's end."""
    if not _has_template(tokenizer):
        return answer
    whole = _render(tokenizer, "answer", [*asked, {"role": "assistant", "content": answer}])
    if not whole.startswith(prompt):
        raise EpisodeError("answer must follow the prompt in the model's chat template, got another beginning")
    return whole.removeprefix(prompt).rstrip("\n")
