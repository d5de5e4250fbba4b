"""Training through one attention layer: time and peak memory of forward with backward, against eager torch.

The eager chain loops over tokens for the memory and uses SDPA for the attention. Gradients flow to every
projection, norm weight and memory weight of the layer. Peak memory includes the gradients.
"""

from functools import partial

import eager
import timing
import torch

from deltamem_kernels import fused_delta_attention

COLUMNS = {
    "T": 5,
    "row": -24,
    "fwd ms": 8,
    "fwd+bwd ms": 10,
    "ratio": 6,
    "tokens/s": 8,
    "peak MiB": 8,
    "vs eager": 8,
}
FIXED = ("rotary_cos", "rotary_sin")


def trainable(layer) -> dict:
    return {name: x if name in FIXED else x.detach().requires_grad_() for name, x in layer.items()}


def step(forward, layer, dout, dreads) -> dict[str, torch.Tensor]:
    """Forward with backward. -> out and the gradients by name"""
    layer = trainable(layer)
    out, reads = forward(layer)
    leaves = {name: x for name, x in layer.items() if x.requires_grad}
    grads = torch.autograd.grad((out, reads), list(leaves.values()), (dout, dreads))
    return {"out": out, **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def check(layer, dout, dreads, dtype, kernel) -> None:
    """Gate out and every gradient against fp64, with the budget of the eager chain in this dtype."""

    def chain(layer):
        return eager.prefill(layer, eager.causal_bmm)[:2]

    want = step(chain, eager.in_fp64(layer), dout.double(), dreads.double())
    plain = step(chain, layer, dout, dreads)
    for name, got in step(kernel, layer, dout, dreads).items():
        unit = torch.finfo(dtype).eps / 2 * want[name].abs().max()  # sums of rounded terms: a unit of the largest
        timing.gate(f"training: {name}", got, want[name], timing.budget(plain[name], want[name], dtype) + unit)


def main() -> None:
    options = timing.parser(__doc__, "bf16", seconds=4.0)
    options.add_argument("--tokens", nargs="+", type=int, default=[1024])
    options.add_argument("--geometry", default="32/8/128", help="HQ/HKV/D")
    options.add_argument("--batch", type=int, default=1)
    options = options.parse_args()
    device, dtype = timing.pick_device(options.device), timing.DTYPES[options.dtype]
    heads, kv_heads, dim = map(int, options.geometry.split("/"))
    env = timing.environment(device, options.dtype)
    timing.print_header(f"training: one attention layer, {options.geometry}, batch {options.batch}", env)

    def kernel(layer):
        result = fused_delta_attention(
            layer["q"],
            layer["k"],
            layer["v"],
            backend=options.backend,
            **eager.kernel_arguments(layer, memory=True),
        )
        return result.out, result.reads

    def chain(layer):
        return eager.prefill(layer)[:2]

    table = timing.Table(COLUMNS)
    rows = []
    with timing.progress(options.tokens, "training") as bar:
        for tokens in bar:
            layer = eager.random_layer(options.batch, tokens, heads, kv_heads, dim, tokens, dtype, device)
            dout, dreads = torch.randn_like(layer["q"]), torch.randn(layer["mem_q"].shape, device=device)
            check(layer, dout, dreads, dtype, kernel)
            rows += run_length(
                table,
                tokens,
                layer,
                {"eager torch": chain, "kernel": kernel},
                dout,
                dreads,
                device,
                options.seconds,
            )
    timing.write_results(options.output, env, rows)


def run_length(table, tokens, layer, forwards, dout, dreads, device, seconds) -> list[dict]:
    steps = {name: partial(step, forward, layer, dout, dreads) for name, forward in forwards.items()}
    with torch.no_grad():
        cases = {name: [partial(forward, layer)] for name, forward in forwards.items()}
        forward_times = timing.measure(cases, device, seconds, graph=False)
    times = timing.measure({name: [call] for name, call in steps.items()}, device, seconds, graph=False)
    rows = []
    for name, timed in times.items():
        peak = timing.peak_memory(steps[name], device)
        rows.append(
            {
                "T": tokens,
                "row": name,
                "forward_ms": forward_times[name].median * 1e3,
                "ms": timed.median * 1e3,
                "ms_low": timed.low * 1e3,
                "ms_high": timed.high * 1e3,
                "samples": timed.samples,
                "peak_bytes": peak,
                "tokens_per_s": dout.shape[0] * tokens / timed.median,
                "speedup_over_eager": times["eager torch"].median / timed.median,
            }
        )
        row = rows[-1]
        table.row(
            tokens,
            name,
            f"{row['forward_ms']:.1f}",
            f"{row['ms']:.1f}",
            f"{row['ms'] / row['forward_ms']:.2f}",
            f"{row['tokens_per_s']:,.0f}",
            "-" if peak is None else f"{peak / 2**20:,.0f}",
            f"{row['speedup_over_eager']:.2f}x",
        )
    return rows


if __name__ == "__main__":
    main()
