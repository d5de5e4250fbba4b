"""Train a δ-mem adapter for a frozen local model.

    python examples/train_adapter.py --model DIR --train episodes.jsonl --output DIR
    accelerate launch examples/train_adapter.py ...     several processes: DDP, or FSDP version 2 as accelerate is told

An episode is a conversation, a question about it and the answer (examples/train_data.py has the format). One step:

    state  = 0;  model(context) writes it, with gradients through the state
    logits = model(question and answer), which reads it and writes nothing
    loss   = mean over episodes of  cross-entropy(answer) + sparsity * mean over layers (mean written gate - target)^2

The output folder gets the adapter in the published format, metrics.jsonl, TensorBoard's events and the last
checkpoint. Defaults are the published recipe.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from tqdm import tqdm
from train_data import IGNORED, Batch, Dataset, Limits, collate

from deltamem_kernels import hf

PUBLISHED = {"delta_heads": ("q", "o"), "output_init": "base_slice_fixed"}
# options that a resumed run may change
FREE = ("model", "train", "eval", "output", "resume", "eval_steps", "save_steps", "cpu")
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of a transformers checkpoint")
    add("--train", required=True, help="episodes, JSONL")
    add("--eval", help="held-out episodes, JSONL")
    add("--output", required=True, help="folder")
    add("--resume", action="store_true", help="go on from the output folder's checkpoint")
    add("--memory", type=json.loads, default={}, help='options of DeltaMemConfig, as JSON: {"num_state_heads": 4}')
    add("--steps", type=int, help="default: as many as --epochs needs")
    add("--epochs", type=float, default=1.0)
    add("--batch-size", type=int, default=32, help="episodes of a step, over all processes")
    add("--micro-batch-size", type=int, default=1, help="episodes of a forward pass")
    add("--learning-rate", type=float, default=2e-4)
    add("--warmup-ratio", type=float, default=0.1)
    add("--weight-decay", type=float, default=0.0)
    add("--max-grad-norm", type=float, default=1.0)
    add("--sparsity", type=float, default=0.01, help="weight of the gates' distance from --gate-target")
    add("--gate-target", type=float, default=0.05)
    add("--max-context-tokens", type=int, default=8192)
    add("--max-question-tokens", type=int, default=512, help="of question and answer")
    add("--truncate-context", action="store_true", help="cut a longer context's oldest tokens; else it is an error")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="the backbone's; the memory's is float32")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    add("--seed", type=int, default=42)
    add("--eval-steps", type=int, default=20)
    add("--save-steps", type=int, default=10)
    add("--cpu", action="store_true", help="even where a GPU is")
    options = parser.parse_args(argv)
    for name in ("batch_size", "micro_batch_size", "eval_steps", "save_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be >= 1, got {getattr(options, name)}")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be >= 1, got {options.steps}")
    return options


# ---------------------------------------------------------------- an episode's loss


def write(model, batch: Batch, state) -> torch.Tensor:
    """Let ``state`` take the contexts in. -> 0, tied to the pass's last result

    FSDP gathers a layer's parameters for its backward when a gradient of its result comes. The pass is wanted for its
    states alone, so the last layer's result needs a gradient all the same.
    """
    logits = model(
        input_ids=batch.context, attention_mask=batch.context_mask, delta_state=state,
        delta_segment_ids=batch.segments, use_cache=False, logits_to_keep=1,
    ).logits  # fmt: skip
    return 0.0 * logits.float().sum()


def read(model, batch: Batch, state) -> tuple[torch.Tensor, torch.Tensor]:
    """-> each answer's mean cross-entropy [B], and which of its tokens are the likeliest [B, A]; pads count as such"""
    length = batch.labels.shape[1]
    logits = model(
        input_ids=batch.read, attention_mask=batch.read_mask, delta_state=state, delta_write=False, use_cache=False,
        logits_to_keep=length + 1,
    ).logits[:, :-1].float()  # fmt: skip
    losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none", ignore_index=IGNORED)
    counted = batch.labels != IGNORED
    hits = (logits.argmax(-1) == batch.labels) | ~counted
    return losses.view_as(batch.labels).sum(1) / counted.sum(1), hits


class Trainer:
    """One run: model, optimizer and schedule, and the step they are at."""

    def __init__(self, options, accelerator: Accelerator, model, data: Dataset, held_out: Dataset | None):
        self.options, self.accelerator, self.data, self.held_out = options, accelerator, data, held_out
        share = accelerator.num_processes * options.micro_batch_size
        if options.batch_size % share:
            raise ValueError(
                f"--batch-size must be a multiple of processes x --micro-batch-size = {share}, got {options.batch_size}"
            )
        self.steps = options.steps or math.ceil(options.epochs * len(data) / options.batch_size)
        self.step = 0
        self.output = Path(options.output)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=options.weight_decay)
        self.model, prepared = accelerator.prepare(model.train(), optimizer)
        self.memory = accelerator.unwrap_model(self.model)  # what hf attached to
        self.optimizer = prepared.optimizer
        warmup = round(options.warmup_ratio * self.steps)
        self.schedule = transformers.get_cosine_schedule_with_warmup(self.optimizer, warmup, self.steps)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def gradients(self) -> dict[str, float]:
        """Gradients of this step's loss, summed over its micro-batches and processes. -> figures of it"""
        options, accelerator = self.options, self.accelerator
        torch.manual_seed(options.seed + self.step * accelerator.num_processes + accelerator.process_index)  # dropout
        episodes = self.data.step(self.step, options.batch_size, options.seed)
        own = episodes[accelerator.process_index :: accelerator.num_processes]
        parts = [own[i : i + options.micro_batch_size] for i in range(0, len(own), options.micro_batch_size)]
        sums = torch.zeros(4, device=accelerator.device)
        for i, part in enumerate(parts):
            batch = collate(part).to(accelerator.device)
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                state = hf.DeltaMemState.zeros(self.memory, len(part))
                tie = write(self.model, batch, state)
                answer = read(self.model, batch, state)[0].mean()
                gates = torch.stack([x.to(accelerator.device) for x in state.gates])  # [layers, B]
                distance = (gates - options.gate_target).square().mean()
                loss = answer + options.sparsity * distance
                accelerator.backward((loss + tie) / len(parts))
            sums += torch.stack([loss, answer, distance, gates.mean()]).detach() / len(parts)
        means = accelerator.reduce(sums, "mean").tolist()
        return dict(zip(("loss", "answer_loss", "gate_distance", "gate"), means, strict=True))

    def update(self) -> dict[str, float]:
        """One optimizer step. -> figures of it"""
        begin = time.perf_counter()
        figures = self.gradients()
        norm = self.accelerator.clip_grad_norm_(self.trained, self.options.max_grad_norm)
        figures["gradient_norm"] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        figures["learning_rate"] = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        return figures | {"seconds": time.perf_counter() - begin}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out episodes: with what was written, and with an empty memory."""
        accelerator, episodes = self.accelerator, self.held_out.episodes
        self.model.eval()  # where the memory's packed weights are made anew, too
        rounds = -(-len(episodes) // accelerator.num_processes)
        sums = torch.zeros(5, dtype=torch.double, device=accelerator.device)
        size = self.options.micro_batch_size
        for first in range(0, rounds, size):  # as many on each process, since they gather parameters together
            indices = [i * accelerator.num_processes + accelerator.process_index for i in range(first, first + size)]
            weights = torch.tensor([float(i < len(episodes)) for i in indices], device=accelerator.device)
            batch = collate([episodes[min(i, len(episodes) - 1)] for i in indices]).to(accelerator.device)
            state = hf.DeltaMemState.zeros(self.memory, size)
            empty = read(self.model, batch, state)[0]
            write(self.model, batch, state)
            loss, hits = read(self.model, batch, state)
            tokens = (batch.labels != IGNORED).sum(1)
            right = hits.sum(1) - (hits.shape[1] - tokens)
            values = (loss, empty, right / tokens, hits.all(1), torch.ones_like(weights))
            sums += torch.stack([(x * weights).sum().double() for x in values])
        self.model.train()
        *totals, count = accelerator.reduce(sums, "sum").tolist()
        names = ("eval_loss", "eval_loss_empty_memory", "eval_token_accuracy", "eval_exact")
        return dict(zip(names, (x / count for x in totals), strict=True))

    # ---------------------------------------------------------------- checkpoints

    @property
    def recipe(self) -> dict:
        """What decides this run's result; a run goes on only under the same."""
        chosen = {name: x for name, x in vars(self.options).items() if name not in FREE}
        return chosen | {"steps": self.steps, "episodes": self.data.digest}

    def save(self) -> None:
        """Write ``checkpoint-<step>``, whole or not at all, and drop the ones before it."""
        folder = self.output / f"checkpoint-{self.step}"
        partial = self.output / f".{folder.name}"
        if self._gathers():
            hf.save_adapter(self.memory, partial)
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE)
        if self.accelerator.is_main_process:
            trainer = {"step": self.step, "recipe": self.recipe, "optimizer": optimizer}
            torch.save(trainer | {"schedule": self.schedule.state_dict()}, partial / "trainer.pt")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
            for other in checkpoints(self.output):
                if other != folder:
                    shutil.rmtree(other)
        self.accelerator.wait_for_everyone()

    def _gathers(self) -> bool:
        """Whether this process takes part in saving parameters: all do where they are sharded."""
        return self.accelerator.is_main_process or isinstance(self.trained[0], DTensor)

    def load(self, folder: Path) -> None:
        """Optimizer, schedule and step of a checkpoint whose adapter the model has."""
        trainer = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        for name, x in self.recipe.items():
            if trainer["recipe"].get(name) != x:
                raise ValueError(
                    f"--resume: {name} must be that of {folder}, {trainer['recipe'].get(name)!r}, got {x!r}"
                )
        set_optimizer_state_dict(self.model, self.optimizer, trainer["optimizer"], options=WHOLE)
        self.schedule.load_state_dict(trainer["schedule"])
        self.step = trainer["step"]

    def run(self) -> None:
        """From the step it is at to the last; the adapter goes to the output folder."""
        options, main = self.options, self.accelerator.is_main_process
        log = Log(self.output / "metrics.jsonl", self.accelerator, self.step)
        if self.held_out and self.step == 0:
            log.write(0, self.evaluate())
        with tqdm(total=self.steps, initial=self.step, desc="training", unit="step", disable=not main) as bar:
            while self.step < self.steps:
                figures = self.update()
                bar.set_postfix(loss=f"{figures['loss']:.4f}", gate=f"{figures['gate']:.3f}")
                bar.update()
                last = self.step == self.steps
                if self.held_out and (last or self.step % options.eval_steps == 0):
                    figures |= self.evaluate()
                log.write(self.step, figures)
                if last or self.step % options.save_steps == 0:
                    self.save()
        if self._gathers():
            hf.save_adapter(self.memory, self.output, format="pt")
        self.accelerator.end_training()


class Log:
    """Figures of each step, to JSON lines and to TensorBoard."""

    def __init__(self, path: Path, accelerator: Accelerator, step: int):
        self.path, self.accelerator = path, accelerator
        if accelerator.is_main_process:  # of an interrupted run, what came after its checkpoint comes again
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            path.write_text("".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step))
        accelerator.init_trackers("tensorboard")

    def write(self, step: int, figures: dict[str, float]) -> None:
        self.accelerator.log(figures, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step} | figures) + "\n")


def checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints of a run, the latest last."""
    return sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def load_model(options, config: hf.DeltaMemConfig, checkpoint: Path | None):
    """The frozen model with its memory, new or a checkpoint's."""
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, local_files_only=True, dtype=options.dtype)
    torch.manual_seed(options.seed)
    if checkpoint is None:
        hf.attach(model, config)
    else:
        hf.load_adapter(model, checkpoint)
    if options.gradient_checkpointing:  # under the name that it has since transformers 5.24, or before
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def build(options) -> Trainer:
    """Everything loaded and checked, at the step to start from; what takes long comes last."""
    # bf16 is the backbone's own dtype here, so nothing is to be autocast
    accelerator = Accelerator(cpu=options.cpu, mixed_precision="no", log_with="tensorboard", project_dir=options.output)
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        raise ValueError(f"accelerate must launch one process, DDP or FSDP version 2, got {kind.value}")
    main = accelerator.is_main_process
    output = Path(options.output)
    saved = checkpoints(output)
    if saved and not options.resume:
        raise ValueError(f"--output must be a folder without checkpoints (or --resume given), got {saved[-1]}")
    checkpoint = saved[-1] if saved else None
    config = hf.DeltaMemConfig.from_dict(PUBLISHED | options.memory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    limits = Limits(options.max_context_tokens, options.max_question_tokens, options.truncate_context)
    data, held_out = (
        path and Dataset(path, tokenizer, limits, config.memory_write_granularity, show_progress=main)
        for path in (options.train, options.eval)
    )
    model = load_model(options, config, checkpoint)
    if main:
        output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options, accelerator, model, data, held_out)
    if checkpoint is not None:
        trainer.load(checkpoint)
    return trainer


def main(argv=None) -> int:
    options = arguments(argv)
    try:
        trainer = build(options)
    except (ValueError, TypeError, OSError) as error:  # what was asked for cannot be; later errors are another matter
        print(error, file=sys.stderr)
        return 1
    trainer.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
