"""Prefill of one attention layer: memory scan, correction, QK-norm, RoPE, causal attention of a sequence.

GFLOP/s counts the causal half of the two attention products and nothing else.
"""

from functools import partial

import eager
import timing
import torch

from deltamem_kernels import fused_delta_attention

COLUMNS = {
    "T": 5,
    "row": -24,
    "ms": 8,
    "tokens/s": 8,
    "GFLOP/s": 8,
    "of GEMM rate": 12,
    "memory adds": 11,
    "vs torch": 8,
}


def check(layer, dtype, kernel) -> None:
    """Gate out and reads, with and without memory, and the torch formulations, against fp64."""
    q, k, v = (layer[name] for name in "qkv")
    want = eager.causal_bmm(q.double(), k.double(), v.double())
    allowed = timing.budget(eager.causal_bmm(q, k, v), want, dtype)
    for name, attention in eager.PREFILL_ATTENTION.items():
        timing.gate(name, attention(q, k, v), want, allowed)
    for memory in (False, True):
        want, want_reads, _ = eager.prefill(eager.in_fp64(layer), eager.causal_bmm, memory)
        plain, _, _ = eager.prefill(layer, eager.causal_bmm, memory)
        result = kernel(layer, memory)
        name = f"fused_delta_attention {'with' if memory else 'without'} memory"
        timing.gate(f"{name}: out", result.out, want, timing.budget(plain, want, dtype))
        if memory:
            timing.gate(f"{name}: reads", result.reads, want_reads, 1e-5)


def main() -> None:
    options = timing.parser(__doc__, "bf16", seconds=3.0)
    options.add_argument("--tokens", nargs="+", type=int, default=[2048])
    options.add_argument("--geometry", default="32/8/128", help="HQ/HKV/D")
    options.add_argument("--batch", type=int, default=1)
    options = options.parse_args()
    device, dtype = timing.pick_device(options.device), timing.DTYPES[options.dtype]
    heads, kv_heads, dim = map(int, options.geometry.split("/"))
    env = timing.environment(device, options.dtype)
    timing.print_header(f"prefill: one attention layer, {options.geometry}, batch {options.batch}", env)

    def kernel(layer, memory):
        keywords = eager.kernel_arguments(layer, memory)
        return fused_delta_attention(layer["q"], layer["k"], layer["v"], backend=options.backend, **keywords)

    ceiling = timing.gemm_ceiling(device, dtype)
    table = timing.Table(COLUMNS)
    rows = []
    with torch.inference_mode(), timing.progress(options.tokens, "prefill") as bar:
        for tokens in bar:
            layer = eager.random_layer(options.batch, tokens, heads, kv_heads, dim, tokens, dtype, device)
            check(layer, dtype, kernel)
            bare = {
                name: [partial(attention, *(layer[x] for x in "qkv"))]
                for name, attention in eager.PREFILL_ATTENTION.items()
            }
            cases = {
                **bare,
                "torch + eager delta-mem": [partial(eager.prefill, layer)],
                "kernel, no memory": [partial(kernel, layer, False)],
                "kernel, delta-mem": [partial(kernel, layer, True)],
            }
            times = timing.measure({"ceiling": [ceiling.call], **cases}, device, options.seconds)
            fastest = min(times[name].median for name in bare)
            flops = 2 * options.batch * heads * tokens * tokens * dim
            bases = {
                "torch + eager delta-mem": fastest,
                "kernel, delta-mem": times["kernel, no memory"].median,
            }
            for name in cases:
                timed, base = times[name], bases.get(name)
                rows.append(
                    {
                        "T": tokens,
                        "row": name,
                        "ms": timed.median * 1e3,
                        "ms_low": timed.low * 1e3,
                        "ms_high": timed.high * 1e3,
                        "samples": timed.samples,
                        "tokens_per_s": options.batch * tokens / timed.median,
                        "flop_per_s": flops / timed.median,
                        "gemm_flop_per_s": ceiling.rate(times["ceiling"]),
                        "memory_overhead": timed.median / base - 1 if base else None,
                        "speedup_over_fastest_torch": fastest / timed.median,
                    }
                )
                row = rows[-1]
                table.row(
                    tokens,
                    name,
                    f"{row['ms']:.1f}",
                    f"{row['tokens_per_s']:,.0f}",
                    f"{row['flop_per_s'] / 1e9:,.0f}",
                    timing.percent(row["flop_per_s"] / row["gemm_flop_per_s"]),
                    timing.percent(row["memory_overhead"]) if base else "",
                    f"{row['speedup_over_fastest_torch']:.2f}x",
                )
    print(
        f"\n{ceiling.name}, timed beside each shape: {rows[-1]['gemm_flop_per_s'] / 1e9:,.0f} GFLOP/s. "
        "'vs torch' compares with the faster bare torch attention."
    )
    timing.write_results(options.output, env, rows)


if __name__ == "__main__":
    main()
