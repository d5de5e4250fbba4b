"""δ-mem remembers: pairs of keys and values are fed, the context is dropped, the values are asked for.

A tiny Qwen3 learns recall in context and is frozen; δ-mem is attached and trained alone. The task is in recall_task.py,
the trainings are in recall_training.py, the table and the picture in recall_report.py. Each run is one process on one
core; finished ones stay under --output, and a second start goes on where the first one ended.
"""

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import recall_report as report
import recall_task as task
import recall_training as training
import timing
import torch
import transformers
from tqdm import tqdm

from deltamem_kernels import hf

SEEDS = (0, 1, 2)  # of a backbone and of the adapters on it
METHOD = "one process and one thread for each run; figures of finished runs are read from their files"


@dataclass(frozen=True)
class Run:
    """A training: of a backbone (``rule`` empty), or of an adapter on the backbone of its seed."""

    seed: int
    effort: training.Effort
    rule: str = ""
    rank: int = 0
    heads: int = 0

    @property
    def name(self) -> str:
        kind = f"{self.rule}-rank{self.rank}-heads{self.heads}" if self.rule else "backbone"
        return f"{kind}-seed{self.seed}"

    @property
    def steps(self) -> int:
        """At most, for a backbone."""
        if not self.rule:
            return self.effort.backbone_steps
        larger = self.rank * self.heads > 8  # learns sooner
        return self.effort.adapter_steps * 5 // 8 if larger else self.effort.adapter_steps

    @property
    def backbone(self) -> "Run":
        return Run(self.seed, self.effort)

    @property
    def settings(self) -> dict:
        """What its figures depend on; a file of others is not taken for it."""
        found = {
            "run": self.name,
            "steps": self.steps,
            "episodes": self.effort.episodes,
            "task": task.GENERATOR,
            "backbone": training.BACKBONE | training.PRETRAINING,
        }
        return found | ({"training": training.TRAINING} if self.rule else {})


def plan(effort: training.Effort, rules: list[str]) -> list[Run]:
    """The published rule with every seed, the others with the first."""
    adapters = [
        Run(seed, effort, rule, *shape)
        for rule in rules
        for seed in SEEDS
        for shape in report.STATES
        if rule == "standard" or seed == SEEDS[0]
    ]
    return [Run(seed, effort) for seed in SEEDS] + adapters


# ---------------------------------------------------------------- one run


def finished(folder: Path, run: Run) -> dict | None:
    """Its file, where it is whole and of these settings."""
    try:
        found = json.loads((folder / run.name / "figures.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return found if found["settings"] == json.loads(json.dumps(run.settings)) else None


def execute(folder: Path, run: Run) -> Run:
    """Train, save, measure; the file of figures comes last and whole."""
    start, busy, home = time.perf_counter(), time.process_time(), folder / run.name
    episodes = run.effort.episodes
    with tqdm(total=run.steps, desc=run.name, position=1 + _row, leave=False, dynamic_ncols=True) as bar:

        def progress(step: int, loss: float) -> None:
            bar.update(step - bar.n)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

        if run.rule:
            model = transformers.Qwen3ForCausalLM.from_pretrained(folder / run.backbone.name)
            training.attach(model, run.seed, run.rule, run.rank, run.heads)
            training.train_adapter(model, run.seed, run.steps, progress)
            figures = training.measure_adapter(model, episodes)
            hf.save_adapter(model, home)
        else:
            model = training.new_backbone(run.seed)
            training.train_backbone(model, run.seed, run.steps, progress)
            figures = training.measure_backbone(model, episodes)
            model.save_pretrained(home)
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}
    result = {"settings": run.settings, **spent, "figures": figures}
    (home / "figures.part").write_text(json.dumps(result, indent=2) + "\n")
    os.replace(home / "figures.part", home / "figures.json")
    return run


# ---------------------------------------------------------------- all runs


_row = 0  # of this process's progress bar


def start_worker(lock, rows) -> None:
    global _row
    tqdm.set_lock(lock)
    _row = rows.get()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    transformers.utils.logging.disable_progress_bar()
    gc.freeze()  # the modules stay: no collection needs to look at them


def execute_all(folder: Path, runs: list[Run], jobs: int) -> None:
    """Run what is not finished; an adapter when its backbone is."""
    todo = [run for run in runs if finished(folder, run) is None]
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    rows, lock = context.Queue(), context.RLock()
    for row in range(jobs):
        rows.put(row)
    waiting, running = list(todo), set()
    with (
        ProcessPoolExecutor(jobs, context, start_worker, (lock, rows)) as pool,
        tqdm(total=len(todo), desc="runs", dynamic_ncols=True) as bar,
    ):
        while waiting or running:
            ready = [run for run in waiting if not run.rule or finished(folder, run.backbone)]
            for run in ready[: jobs - len(running)]:
                waiting.remove(run)
                running.add(pool.submit(execute, folder, run))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                bar.update()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo/recall"), help="folder of finished runs and results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, each on one core")
    parser.add_argument("--rules", nargs="+", choices=list(report.RULES), default=list(report.RULES), help="of update")
    for field in fields(training.Effort):
        parser.add_argument("--" + field.name.replace("_", "-"), type=int, default=field.default)
    options = parser.parse_args()
    effort = training.Effort(options.backbone_steps, options.adapter_steps, options.episodes)

    rules = [rule for rule in report.RULES if rule == "standard" or rule in options.rules]
    runs, start = plan(effort, rules), time.perf_counter()
    execute_all(options.output, runs, options.jobs)
    found = {run: finished(options.output, run) for run in runs}
    rows = {report.CONTEXT: [], report.ALONE: []}
    for run in runs:
        figures = found[run]["figures"]
        if run.rule:
            rows.setdefault(report.row_name(run.rule, run.rank, run.heads), []).append(figures)
        else:
            rows[report.CONTEXT].append(figures["with context"])
            rows[report.ALONE].append(figures["without"])
    env = timing.environment(torch.device("cpu"), "fp32", METHOD)
    env |= {"threads": 1, "jobs": options.jobs, "transformers": transformers.__version__}
    env |= {"generator": task.GENERATOR, "chance": task.CHANCE, "seeds": SEEDS, "training": training.TRAINING}
    env |= {"steps": {report.STATES[run.rank, run.heads]: run.steps for run in runs if run.rule}}
    spent = ("seconds", "cpu_seconds")
    env |= {"this_start_s": time.perf_counter() - start}
    env |= {f"all_runs_{kind}": sum(x[kind] for x in found.values()) for kind in spent}
    lines, reached = report.verdict(rows)
    timing.print_header("Recall", env)
    print(f"{task.GENERATOR}\nchance {100 * task.CHANCE:.2f} % · seeds {', '.join(map(str, SEEDS))}")
    print("steps of training: " + "; ".join(f"{state}: {steps}" for state, steps in env["steps"].items()))
    print(f"{report.LEGEND}\n")
    print(report.table(rows), "", *lines, "", sep="\n")
    results = [{**asdict(run), **{kind: x[kind] for kind in spent}, **x["figures"]} for run, x in found.items()]
    timing.write_results(options.output / "recall.json", env, results)
    report.picture(
        options.output / "recall.png", rows, f"{env['hardware']} · torch {env['torch']} · commit {env['commit']}"
    )
    print(f"picture: {options.output / 'recall.png'}")
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
