"""Tokens per second of whole models: frozen, with delta-mem by our kernels, with delta-mem by eager torch.

Protocol: a short prompt tiled to each length, batch 1, greedy, one run to warm up (whose peak memory is reported),
then measured rounds, each from an empty cache and memory. full_generate counts all tokens over prefill and decode;
decode_only the tokens after the first, over their steps. The rows decode in turns of a few steps, so that their
ratios do not carry the machine's drift; figures of a short decode are of the long one's first tokens. The eager
memory reads and writes token by token.
"""

import statistics
from functools import partial

COLUMNS = {
    "prompt": 6,
    "new": 4,
    "row": -24,
    "prefill s": 9,
    "full tok/s": 10,
    "decode tok/s": 12,
    "p50 ms": 8,
    "p90 ms": 8,
    "p99 ms": 8,
    "peak MiB": 8,
    "prefill vs ours": 15,
    "decode vs ours": 14,
    "decode vs stock": 15,
}
METHOD = "medians of rounds, rows in turns, the first layers of every row checked against fp64 before timing"
TURN = 8  # steps of a row's turn
TEXT = "Memory benchmark sentence. Another factual sentence.\n"


class Run:
    """One row's generation: prefill, then greedy steps, each timed on the device's clock."""

    def __init__(self, model, prompt, capacity, static):
        import transformers
        from generate_models import cache_keyword, reset

        reset(model)
        self.model, self.prompt = model, prompt
        if static:
            self.cache = transformers.StaticCache(config=model.config, max_cache_len=capacity)
        else:
            self.cache = transformers.DynamicCache(config=model.config)
        self.held = {cache_keyword(model.forward): self.cache}
        self.marks = []  # [start, end] of the prefill and of every step
        self.token = prompt

    def advance(self, times: int) -> None:
        start = self._mark()
        for _ in range(times):
            result = self.model(self.token, **self.held, use_cache=True, logits_to_keep=1)
            self.token = result.logits[:, -1:].argmax(-1)
            end = self._mark()
            self.marks.append((start, end))
            start = end

    def _mark(self):
        import time

        import torch

        if self.prompt.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[float]:
        """Of the prefill and of every step."""
        if self.prompt.device.type != "cuda":
            return [end - start for start, end in self.marks]
        self.marks[-1][1].synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in self.marks]


def whole(model, prompt, new, static):
    """A whole generation, for warm-up and peak memory."""
    run = Run(model, prompt, prompt.shape[1] + new, static)
    run.advance(1)
    run.advance(new - 1)
    return run.seconds()


def measure(models: dict, prompt, new: int, rounds: int, static: bool, bar) -> dict[str, list[list[float]]]:
    """-> row: for each round, seconds of the prefill and of ``new - 1`` steps"""
    found = {name: [] for name in models}
    for round in range(rounds):
        names = list(models)
        names = names[round % len(names) :] + names[: round % len(names)]
        runs = {name: Run(models[name], prompt, prompt.shape[1] + new, static) for name in names}
        for name in names:
            runs[name].advance(1)
        for done in range(0, new - 1, TURN):
            for name in names:
                runs[name].advance(min(TURN, new - 1 - done))
        for name in names:
            found[name].append(runs[name].seconds())
        bar.update()
    return found


def percentile(values, share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def summary(name: str, samples: dict, new: int, base: dict[str, str]) -> dict:
    """One line of the table: a row's figures for ``new`` tokens."""
    totals = {row: [(s[0], sum(s[1:new])) for s in rounds] for row, rounds in samples.items()}
    prefill, decode = zip(*totals[name], strict=True)
    steps = [x for s in samples[name] for x in s[1:new]]
    found = {
        "prefill_s": statistics.median(prefill),
        "full_generate_tokens_per_s": statistics.median(new / (p + d) for p, d in totals[name]),
        "decode_only_tokens_per_s": statistics.median((new - 1) / d for d in decode),
        "rounds": len(prefill),
    }
    found |= {f"p{share}_ms": percentile(steps, share / 100) * 1e3 for share in (50, 90, 99)}
    for label, other in base.items():
        if other in totals and other != name:
            # within each round, whose runs shared the machine's state
            pairs = list(zip(totals[name], totals[other], strict=True))
            found[f"prefill_speed_vs_{label}"] = statistics.median(o[0] / m[0] for m, o in pairs)
            found[f"decode_speed_vs_{label}"] = statistics.median(o[1] / m[1] for m, o in pairs)
            median = [statistics.median(x for s in samples[row] for x in s[1:new]) for row in (other, name)]
            found[f"median_step_speed_vs_{label}"] = median[0] / median[1]
    return found


def prompt_ids(folder, vocabulary: int, length: int, device):
    """The protocol's text (without a checkpoint, eleven arbitrary tokens) tiled: ``[1, length]``."""
    import torch

    ids = torch.randint(vocabulary, (11,), generator=torch.Generator().manual_seed(42))
    if folder:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = torch.tensor(tokenizer.encode(TEXT, add_special_tokens=False))
    return ids.repeat(-(-length // len(ids)))[:length][None].to(device)


def print_row(table, row: dict) -> None:
    def ratio(key):
        return f"{row[key]:.3f}" if key in row else ""

    peak = row["peak_bytes"]
    table.row(
        row["prompt"],
        row["new"],
        row["row"],
        f"{row['prefill_s']:.3f}",
        f"{row['full_generate_tokens_per_s']:,.2f}",
        f"{row['decode_only_tokens_per_s']:,.2f}",
        *(f"{row[f'p{share}_ms']:.2f}" for share in (50, 90, 99)),
        "" if peak is None else f"{peak / 2**20:,.0f}",
        ratio("prefill_speed_vs_ours"),
        ratio("median_step_speed_vs_ours"),
        ratio("median_step_speed_vs_stock"),
    )


def main() -> None:
    import timing

    parser = timing.parser(__doc__, "bf16")
    parser.add_argument("--geometry", default="qwen3-0.6b", help="of random weights: qwen3-0.6b or tiny")
    parser.add_argument("--model", help="folder of a local checkpoint instead")
    parser.add_argument("--adapter", help="folder of an adapter for it; default: a random memory")
    parser.add_argument("--layers", type=int, help="only the first of the model's")
    parser.add_argument("--prompts", nargs="+", type=int, default=[4096, 16384, 32768], help="tokens")
    parser.add_argument("--new", nargs="+", type=int, default=[64, 256], help="tokens, at least 2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", default="dynamic", choices=["dynamic", "static"])
    parser.add_argument("--rows", nargs="+", help="parts of the rows' names; default: all")
    options = parser.parse_args()

    import os

    if options.backend != "auto":
        os.environ["DELTAMEM_BACKEND"] = options.backend
    import torch
    from generate_models import FROZEN, STOCK, Memories, backbone, check, variants

    if min(options.new) < 2 or options.rounds < 1:
        parser.error("--new must be >= 2 and --rounds >= 1")
    device, dtype = timing.pick_device(options.device), timing.DTYPES[options.dtype]
    env = timing.environment(device, options.dtype, METHOD)
    env |= {key: getattr(options, key) for key in ("backend", "geometry", "model", "adapter", "layers", "cache")}
    subject = options.model or f"random weights of {options.geometry}"
    timing.print_header(f"generate: {subject}, batch 1, {options.cache} cache", env)
    rows = []
    with torch.no_grad():  # parameters made under inference mode count no versions: they would be packed at every call
        model = backbone(options.geometry, options.model, options.layers, dtype, device)
        memories = Memories(model, options.adapter)
        env["gate"] = check(model, memories, dtype)
        for name, share in env["gate"].items():
            print(f"gate: {name}: largest error {timing.percent(share)} of its budget")
        models = variants(model, memories)
        if options.rows:
            models = {name: m for name, m in models.items() if any(part in name for part in options.rows)}
    with torch.inference_mode():
        table = timing.Table(COLUMNS)
        new, static = max(options.new), options.cache == "static"
        positions = getattr(model.config, "max_position_embeddings", None)
        with timing.progress(None, "generate", len(options.prompts) * (len(models) + options.rounds)) as bar:
            for length in options.prompts:
                if positions is not None and length + new > positions:
                    table.row(length, new, f"skipped: over {positions} positions", *[""] * (len(COLUMNS) - 3))
                    continue
                prompt = prompt_ids(options.model, model.config.vocab_size, length, device)
                peaks = {}
                for name, m in models.items():
                    peaks[name] = timing.peak_memory(partial(whole, m, prompt, new, static), device)
                    bar.update()
                samples = measure(models, prompt, new, options.rounds, static, bar)
                base = {"ours": FROZEN, "stock": STOCK}
                for count in options.new:
                    for name in models:
                        rows.append({"prompt": length, "new": count, "row": name, "peak_bytes": peaks[name]})
                        rows[-1] |= summary(name, samples, count, base)
                        print_row(table, rows[-1])
    print(
        f"\nours: {FROZEN}. Ratios are speeds, above 1 where the row is faster: of the prefills within a round, and "
        "of the median steps. Peak: above the level before the run, caches included, weights not."
    )
    timing.write_results(options.output, env, rows)


if __name__ == "__main__":
    main()
