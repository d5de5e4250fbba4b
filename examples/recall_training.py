"""The two trainings of examples/recall.py and what is measured after them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from recall_task import ASK, VOCABULARY, Episodes, draw
from transformers import Qwen3Config, Qwen3ForCausalLM

from deltamem_kernels import hf

Tensor = torch.Tensor
Progress = Callable[[int, float], None]  # finished steps, loss

QUESTIONS = 8  # of one episode, at most
PAIRS = (1, 2, 3, 4, 6, 8, 12, 16)
FILLERS = 256
ENOUGH = 0.998  # a backbone's running accuracy that ends its training

BACKBONE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "use_cache": False,
}


@dataclass(frozen=True)
class Effort:
    backbone_steps: int = 500  # at most
    adapter_steps: int = 2000  # states larger than R = 8 take five eighths of them
    episodes: int = 256  # of each figure


PRETRAINING = {"batch": 64, "lr": 3e-3, "warmup": 50, "pairs": 16}
TRAINING = {
    "output_init": "random",
    "online_gain": 0.25,
    "batch": 64,
    "lr": 5e-3,
    "warmup": 20,
    "pairs": 8,
    "all_pairs_from": 0.3,  # of the steps
    "pairs_until": 0.3,  # so long nothing else
    "rewrites": 0.6,  # of the steps from then on
    "fillers": 0.2,
    "filler_batch": 16,  # such episodes are long
}


def logits_at(model, tokens: Tensor, positions, **memory) -> Tensor:
    """Logits at some positions of ``tokens`` [B, T]; the rest need no product with the vocabulary."""
    return model.lm_head(model.model(tokens, **memory).last_hidden_state[:, positions])


def advance(optimizer, loss: Tensor, rate: float) -> None:
    """One step at learning rate ``rate``."""
    parameters = [x for group in optimizer.param_groups for x in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    optimizer.step()


# ---------------------------------------------------------------- backbone


def new_backbone(seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **BACKBONE))
    # Embeddings well above what the layers add at first: the step to looking back then comes early.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    return model


def train_backbone(model, seed: int, steps: int, progress: Progress) -> None:
    """Pairs and their questions in one sequence; the loss is on the answers. Ends early when all are right."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [x for x in model.parameters() if x.ndim > 1]
    vectors = [x for x in model.parameters() if x.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    most, accuracy = 4, 0.0
    for step in range(steps):
        pairs = int(torch.randint(1, most + 1, (), generator=generator))
        episodes = draw(generator, PRETRAINING["batch"], pairs)
        asked = torch.randint(pairs, (PRETRAINING["batch"], QUESTIONS), generator=generator)
        keys, answers = episodes.keys.gather(1, asked), episodes.values.gather(1, asked)
        questions = torch.stack([torch.full_like(keys, ASK), keys, answers], 2).flatten(1)
        tokens = torch.cat([episodes.tokens, questions], 1)
        at = episodes.tokens.shape[1] + 1 + 3 * torch.arange(QUESTIONS)
        logits = logits_at(model, tokens, at)
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        advance(optimizer, loss, PRETRAINING["lr"] * min(1, (step + 1) / PRETRAINING["warmup"]))
        accuracy += 0.1 * (mean(logits.argmax(-1) == answers) - accuracy)
        progress(step + 1, loss.item())
        if accuracy > 0.9 and most < PRETRAINING["pairs"]:
            most, accuracy = 2 * most, 0.0
        if accuracy > ENOUGH:
            return


# ---------------------------------------------------------------- adapter


def remember(model, tokens: Tensor) -> hf.DeltaMemState:
    """Write pass: the state after ``tokens``, and nothing else of them."""
    state = hf.DeltaMemState.zeros(model, tokens.shape[0])
    model.model(tokens, delta_state=state)
    return state


def ask(model, keys: Tensor, state: hf.DeltaMemState) -> Tensor:
    """Read pass: every question in a sequence of its own, over its episode's state. -> logits [B, Q, vocabulary]"""
    B, Q = keys.shape
    questions = torch.stack([torch.full_like(keys, ASK), keys], 2).flatten(0, 1)
    rows = torch.arange(B).repeat_interleave(Q)
    return logits_at(model, questions, -1, delta_state=state.select(rows), delta_write=False).view(B, Q, -1)


def training_episodes(generator: torch.Generator, progress: float) -> Episodes:
    """At first pairs alone, soon more of them; then also keys written again, and fillers of any number."""
    most = 2 + round((TRAINING["pairs"] - 2) * min(1.0, progress / TRAINING["all_pairs_from"]))
    pairs = int(torch.randint(1, most + 1, (), generator=generator))
    if progress < TRAINING["pairs_until"]:
        return draw(generator, TRAINING["batch"], pairs)
    rewrites, fillers = torch.rand(2, generator=generator).tolist()
    rewritten = int(torch.randint(1, pairs + 1, (), generator=generator)) if rewrites < TRAINING["rewrites"] else 0
    if fillers < TRAINING["fillers"]:
        count = int(torch.randint(1, FILLERS + 1, (), generator=generator))
        return draw(generator, TRAINING["filler_batch"], pairs, rewritten=rewritten, fillers=count)
    return draw(generator, TRAINING["batch"], pairs, rewritten=rewritten)


def attach(model, seed: int, rule: str, rank: int, heads: int) -> None:
    """A fresh memory.

    alpha keeps the corrections' factor at 2 for every rank. Their weights start with columns about half
    as long as a unit vector: with the published 0.05, a seed in three is still at "only the last pair is known" after
    800 steps.
    """
    torch.manual_seed(seed)
    config = hf.DeltaMemConfig(
        rank=rank,
        alpha=2.0 * rank,
        num_state_heads=heads,
        state_update_mode=rule,
        delta_heads=("q", "o"),
        output_init=TRAINING["output_init"],
        online_gain=TRAINING["online_gain"],
    )
    hf.attach(model, config)


def train_adapter(model, seed: int, steps: int, progress: Progress) -> None:
    """Trains the attached memory alone: questions answered from the state, gradients through all of its writes."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for step in range(steps):
        episodes = training_episodes(generator, step / steps)
        asked = torch.randperm(episodes.keys.shape[1], generator=generator)[:QUESTIONS]
        logits = ask(model, episodes.keys[:, asked], remember(model, episodes.tokens))
        loss = F.cross_entropy(logits.flatten(0, 1), episodes.values[:, asked].flatten())
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2
        advance(optimizer, loss, TRAINING["lr"] * min(cosine, (step + 1) / TRAINING["warmup"]))
        progress(step + 1, loss.item())


# ---------------------------------------------------------------- what is measured


GIVEN = 4  # pairs before one of them is written again, and before fillers

Answers = Callable[[Episodes, Tensor], Tensor]  # episodes, keys [B, Q] -> tokens [B, Q]


@torch.no_grad()
def recall(answers: Answers, kind: str, pairs: int, episodes: int, fillers: int = 0) -> float:
    """Share of right answers: of all pairs, or of QUESTIONS spread over the order of writing."""
    generator = torch.Generator().manual_seed(1000 + pairs)  # the same episodes for everyone
    drawn = draw(generator, episodes, pairs, kind, fillers=fillers)
    asked = torch.linspace(0, pairs - 1, min(pairs, QUESTIONS)).round().long()
    return mean(answers(drawn, drawn.keys[:, asked]) == drawn.values[:, asked])


@torch.no_grad()
def rewriting(answers: Answers, episodes: int) -> dict[str, float]:
    """After GIVEN pairs one key is written again: how often it has its new value, its old one, and others theirs."""
    drawn = draw(torch.Generator().manual_seed(2000), episodes, GIVEN, "held out", rewritten=1)
    given, again = answers(drawn, drawn.keys), drawn.values != drawn.before
    return {
        "new": mean((given == drawn.values)[again]),
        "old": mean((given == drawn.before)[again]),
        "others": mean((given == drawn.values)[~again]),
    }


def mean(right: Tensor) -> float:
    return right.float().mean().item()


def recall_by_pairs(answers: Answers, kind: str, episodes: int) -> dict[str, float]:
    return {str(pairs): recall(answers, kind, pairs, episodes) for pairs in PAIRS}


def measure_backbone(model, episodes: int) -> dict:
    """With the episode before the question; and the question alone, on any combinations, where a guess is at chance."""

    def answers(context: bool, drawn: Episodes, keys: Tensor) -> Tensor:
        found = []
        for asked in keys.unbind(1):
            question = torch.stack([torch.full_like(asked, ASK), asked], 1)
            tokens = torch.cat([drawn.tokens, question], 1) if context else question
            found.append(logits_at(model, tokens, -1).argmax(-1))
        return torch.stack(found, 1)

    return {
        "with context": {"recall": recall_by_pairs(partial(answers, True), "held out", episodes)},
        "without": {"recall": recall_by_pairs(partial(answers, False), "any", episodes)},
    }


def measure_adapter(model, episodes: int) -> dict:
    """From the episode's state; and, on any combinations, from an empty one and from that of another episode."""

    def answers(state_of, drawn: Episodes, keys: Tensor) -> Tensor:
        return ask(model, keys, state_of(remember(model, drawn.tokens))).argmax(-1)

    def zeroed(state):
        return hf.DeltaMemState.zeros(model, state.batch_size)

    def swapped(state):
        return state.select(torch.arange(state.batch_size).roll(1))

    own = partial(answers, lambda state: state)
    return {
        "recall": recall_by_pairs(own, "held out", episodes),
        "rewritten": rewriting(own, episodes),
        "fillers": recall(own, "held out", GIVEN, episodes, FILLERS),
        "zeroed": recall(partial(answers, zeroed), "any", GIVEN, episodes),
        "swapped": recall(partial(answers, swapped), "any", GIVEN, episodes),
    }
