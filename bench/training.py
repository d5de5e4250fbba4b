"""Training through one attention layer: time and peak memory of forward with backward.

Rows: the bare attention on tensors that are ready, in each torch formulation and ours; this package's scan and prep in
front of each of torch's; our layer without and with memory; the layer in eager torch, which loops over tokens for the
memory. Gradients flow to every projection, norm weight and memory weight that a row uses. Peak memory includes the
gradients. The GEMM rate is that of the causal half of attention's products, 2 forward and 5 backward.
"""

from functools import partial
from typing import NamedTuple

import eager
import timing
import torch
from library_engine import prepared_attention

from deltamem_kernels import backends, fused_delta_attention

COLUMNS = {
    "T": 5,
    "row": -47,
    "fwd ms": 8,
    "fwd+bwd ms": 10,
    "ratio": 6,
    "tokens/s": 9,
    "of GEMM rate": 12,
    "peak MiB": 8,
    "memory adds": 11,
    "vs eager": 8,
}
FIXED = ("rotary_cos", "rotary_sin")
MEMORY = ("mem_q", "mem_k", "mem_v", "beta", "beta_bias", "delta_q")
BARE = ("q", "k", "v")
TORCH, ENGINE = "torch attention: ", "scan + prep + torch: "  # and a formulation's name
EAGER, KERNEL = "torch + eager delta-mem", "kernel, delta-mem"
OWN = ("kernel attention", "kernel, no memory", KERNEL)


class Row(NamedTuple):
    """forward(layer) -> results, one per cotangent; exact: the formulation whose budget it has."""

    forward: object
    exact: object
    layer: dict
    cotangents: tuple


def step(forward, layer, cotangents) -> dict[str, torch.Tensor]:
    """Forward with backward. -> out and the gradients by name"""
    layer = {name: x if name in FIXED else x.detach().requires_grad_() for name, x in layer.items()}
    results = forward(layer)
    leaves = {name: x for name, x in layer.items() if x.requires_grad}
    grads = torch.autograd.grad(results, list(leaves.values()), cotangents)
    return {"out": results[0], **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def check(name, row: Row, dtype) -> None:
    """Gate out and every gradient against fp64, with the budget of the eager formulation in this dtype."""
    want = step(row.exact, eager.in_fp64(row.layer), tuple(x.double() for x in row.cotangents))
    plain = step(row.exact, row.layer, row.cotangents)
    for result, got in step(row.forward, row.layer, row.cotangents).items():
        unit = torch.finfo(dtype).eps / 2 * want[result].abs().max()  # sums of rounded terms: a unit of the largest
        allowed = timing.budget(plain[result], want[result], dtype) + unit
        timing.gate(f"training: {name}: {result}", got, want[result], allowed)


def layer_rows(layer, dout, dreads, device, backend) -> dict[str, Row]:
    def bare(attention):
        return lambda given: (attention(*(given[name] for name in BARE)),)

    def kernel(given):
        keywords = eager.kernel_arguments(given, memory="mem_q" in given)
        result = fused_delta_attention(given["q"], given["k"], given["v"], backend=backend, **keywords)
        return (result.out, result.reads)[: 1 + ("mem_q" in given)]

    def kernel_attention(q, k, v):
        return fused_delta_attention(q, k, v, backend=backend).out

    def chain(attention, memory):
        return lambda given: eager.prefill(given, attention, memory)[: 1 + memory]

    def engine(attention):
        return lambda given: prepared_attention(backend, attention, given, True)

    prepared = {name: layer[name] for name in BARE}
    frozen = {name: x for name, x in layer.items() if name not in MEMORY}
    exact, exact_layer = bare(eager.causal_bmm), chain(eager.causal_bmm, True)
    formulations = eager.prefill_attention(device).items()
    return {
        **{TORCH + name: Row(bare(call), exact, prepared, (dout,)) for name, call in formulations},
        **{ENGINE + name: Row(engine(call), exact_layer, layer, (dout, dreads)) for name, call in formulations},
        "kernel attention": Row(bare(kernel_attention), exact, prepared, (dout,)),
        "kernel, no memory": Row(kernel, chain(eager.causal_bmm, False), frozen, (dout,)),
        KERNEL: Row(kernel, exact_layer, layer, (dout, dreads)),
        EAGER: Row(chain(eager.causal_sdpa, True), exact_layer, layer, (dout, dreads)),
    }


def usable(rows: dict[str, Row], dtype) -> tuple[dict[str, Row], dict[str, str]]:
    """Rows that pass the gate; of torch's, those that do not, and why. Ours must."""
    failed = {}
    for name, row in rows.items():
        try:
            check(name, row, dtype)
        except (timing.GateError, RuntimeError) as error:
            if not name.startswith((TORCH, ENGINE)):
                raise
            failed[name] = str(error).splitlines()[0]
    return {name: row for name, row in rows.items() if name not in failed}, failed


def timings(rows: dict[str, Row], ceiling, device, seconds) -> tuple[dict, dict]:
    """-> timings of the forward pass and of the step, by row. The loop over tokens takes a few turns of its own."""
    forward = {name: [partial(row.forward, row.layer)] for name, row in rows.items()}
    steps = {name: [partial(step, row.forward, row.layer, row.cotangents)] for name, row in rows.items()}
    found = []
    for cases in (forward, steps):
        loop = {EAGER: cases.pop(EAGER)}
        with torch.set_grad_enabled(cases is steps):
            times = timing.measure({"ceiling": [ceiling.call]} | cases, device, seconds, graph=False)
            found.append(times | timing.measure(loop, device, seconds, graph=False, rounds=3))
    return found[0], found[1]


def run_length(tokens, rows, flops, ceiling, dtype, device, seconds) -> list[dict]:
    rows, failed = usable(rows, dtype)
    forward, times = timings(rows, ceiling, device, seconds)
    found = []
    for name, row in rows.items():
        timed = times[name]
        without = times[name.replace("delta-mem", "no memory")] if name.endswith(KERNEL) else None
        found.append(
            {
                "T": tokens,
                "row": name,
                "forward_ms": forward[name].median * 1e3,
                "ms": timed.median * 1e3,
                "ms_low": timed.low * 1e3,
                "ms_high": timed.high * 1e3,
                "samples": timed.samples,
                "peak_bytes": timing.peak_memory(partial(step, row.forward, row.layer, row.cotangents), device),
                "tokens_per_s": row.cotangents[0].shape[0] * tokens / timed.median,
                "flop_per_s": flops / timed.median,
                "gemm_flop_per_s": ceiling.rate(times["ceiling"]),
                "memory_overhead": timed.median / without.median - 1 if without else None,
                "speedup_over_eager": times[EAGER].median / timed.median,
                "failed": failed,
            }
        )
    return found


def main() -> None:
    options = timing.parser(__doc__, "bf16", seconds=4.0)
    options.add_argument("--against", nargs="*", default=[], help="other backends to measure in the same run")
    options.add_argument("--tokens", nargs="+", type=int, default=[1024])
    options.add_argument("--geometry", default="32/8/128", help="HQ/HKV/D")
    options.add_argument("--batch", type=int, default=1)
    options = options.parse_args()
    device, dtype = timing.pick_device(options.device), timing.DTYPES[options.dtype]
    heads, kv_heads, dim = map(int, options.geometry.split("/"))
    env = timing.environment(device, options.dtype)
    timing.print_header(f"training: one attention layer, {options.geometry}, batch {options.batch}", env)
    ceiling = timing.gemm_ceiling(device, dtype)
    table = timing.Table(COLUMNS)
    results = []
    with timing.progress(options.tokens, "training") as bar:
        for tokens in bar:
            layer = eager.random_layer(options.batch, tokens, heads, kv_heads, dim, tokens, dtype, device)
            dout, dreads = torch.randn_like(layer["q"]), torch.randn(layer["mem_q"].shape, device=device)
            backend = backends.choose("fused_delta_attention", options.backend, layer["q"], layer["mem_q"].shape[-1])
            rows = layer_rows(layer, dout, dreads, device, backend)
            for other in options.against:
                theirs = layer_rows(layer, dout, dreads, device, other)
                rows |= {f"{other} {name}": theirs[name] for name in OWN}
            flops = 7 * options.batch * heads * tokens * tokens * dim
            measured = run_length(tokens, rows, flops, ceiling, dtype, device, options.seconds)
            for row in measured:
                peak, overhead = row["peak_bytes"], row["memory_overhead"]
                table.row(
                    tokens,
                    row["row"],
                    f"{row['forward_ms']:.2f}",
                    f"{row['ms']:.2f}",
                    f"{row['ms'] / row['forward_ms']:.2f}",
                    f"{row['tokens_per_s']:,.0f}",
                    timing.percent(row["flop_per_s"] / row["gemm_flop_per_s"]),
                    "-" if peak is None else f"{peak / 2**20:,.0f}",
                    "" if overhead is None else timing.percent(overhead),
                    f"{row['speedup_over_eager']:.2f}x",
                )
            results += measured
    timing.write_results(options.output, env, results)


if __name__ == "__main__":
    main()
