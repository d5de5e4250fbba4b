"""Prefill of one attention layer: memory scan, correction, QK-norm, RoPE, causal attention of a sequence.

Rows: the bare attention on tensors that are ready, in its fastest torch formulation and ours; this package's scan and
prep in front of that torch attention; everything by our kernels; and the memory in eager torch.
GFLOP/s counts the causal half of the two attention products and nothing else.
"""

from functools import partial

import eager
import timing
import torch
from library_engine import prepared_attention

from deltamem_kernels import backends, fused_delta_attention

COLUMNS = {
    "T": 5,
    "row": -29,
    "ms": 8,
    "tokens/s": 10,
    "GFLOP/s": 8,
    "of GEMM rate": 12,
    "memory adds": 11,
    "vs torch": 8,
}
# row -> the row that it adds a memory to
WITHOUT = {
    "torch + eager delta-mem": "torch attention",
    "scan + prep + torch attention": "prep + torch attention",
    "kernel, delta-mem": "kernel, no memory",
}


def kernel(backend, layer, memory):
    keywords = eager.kernel_arguments(layer, memory)
    return fused_delta_attention(layer["q"], layer["k"], layer["v"], backend=backend, **keywords)


def kernel_attention(backend, layer):
    return fused_delta_attention(layer["q"], layer["k"], layer["v"], backend=backend).out


def check_attention(layer, dtype, own) -> dict[str, str]:
    """Gate the bare attention, ours and every torch formulation. -> those of torch that failed, and why."""
    q, k, v = (layer[name] for name in "qkv")
    want = eager.causal_bmm(q.double(), k.double(), v.double())
    allowed = timing.budget(eager.causal_bmm(q, k, v), want, dtype)
    for backend in own:
        timing.gate(f"{backend} kernel attention", kernel_attention(backend, layer), want, allowed)
    failed = {}
    for name, attention in eager.prefill_attention(q.device).items():
        try:
            timing.gate(name, attention(q, k, v), want, allowed)
        except (timing.GateError, RuntimeError) as error:
            failed[name] = str(error).splitlines()[0]
    return failed


def check_layer(layer, dtype, own, attention) -> None:
    """Gate out and reads of the whole layer, with and without memory, against fp64."""
    for memory in (False, True):
        want, want_reads, _ = eager.prefill(eager.in_fp64(layer), eager.causal_bmm, memory)
        plain, _, _ = eager.prefill(layer, eager.causal_bmm, memory)
        allowed = timing.budget(plain, want, dtype)
        name = f"{'with' if memory else 'without'} memory"
        for backend in own:
            result = kernel(backend, layer, memory)
            timing.gate(f"{backend} fused_delta_attention {name}: out", result.out, want, allowed)
            if memory:
                timing.gate(f"{backend} fused_delta_attention {name}: reads", result.reads, want_reads, 1e-5)
        out, _ = prepared_attention(own[0], attention, layer, memory)
        timing.gate(f"prep and torch attention {name}: out", out, want, allowed)


def own_cases(backend, each, prefix="") -> dict:
    return {
        f"{prefix}kernel attention": each(partial(kernel_attention, backend)),
        f"{prefix}kernel, no memory": each(partial(kernel, backend), False),
        f"{prefix}kernel, delta-mem": each(partial(kernel, backend), True),
    }


def run_length(layer, dtype, device, own, ceilings, seconds) -> tuple[dict, dict]:
    """own: our backends, the others behind the one asked for. -> timings by row, and what stands beside them"""
    backend, *others = own
    failed = check_attention(layer, dtype, own)
    read = sum(layer[name].nbytes for name in "qkv")
    copies = [{name: x.clone() for name, x in layer.items()} for _ in range(timing.copies_beyond_cache(read, device))]

    def each(call, *args):
        return [partial(call, copy, *args) for copy in copies]

    formulations = {n: call for n, call in eager.prefill_attention(device).items() if n not in failed}
    contest = timing.measure(
        {n: each(lambda copy, call=call: call(*(copy[x] for x in "qkv"))) for n, call in formulations.items()},
        device,
        seconds / 5,
    )
    best = min(contest, key=lambda name: contest[name].median)
    attention = formulations[best]
    check_layer(layer, dtype, own, attention)
    cases = {
        "torch attention": each(lambda copy: attention(*(copy[x] for x in "qkv"))),
        "prep + torch attention": each(partial(prepared_attention, backend, attention), False),
        "scan + prep + torch attention": each(partial(prepared_attention, backend, attention), True),
        **own_cases(backend, each),
    }
    for other in others:
        cases |= own_cases(other, each, f"{other} ")
    times = timing.measure({name: [ceiling.call] for name, ceiling in ceilings.items()} | cases, device, seconds)
    # a loop over tokens: a few turns of its own, and no graph of that many launches
    loop = {"torch + eager delta-mem": each(eager.prefill, attention)}
    times |= timing.measure(loop, device, seconds, graph=False, rounds=3)
    contest_ms = {name: timed.median * 1e3 for name, timed in contest.items()}
    reached = {name: ceiling.rate(times.pop(name)) for name, ceiling in ceilings.items()}
    return times, {"formulation": best, "contest_ms": contest_ms, "contest_failed": failed, **reached}


def results(tokens, batch, flops, times, beside):
    fastest = times["torch attention"].median
    for name, timed in times.items():
        base = times.get(WITHOUT.get(name, name.replace("delta-mem", "no memory") if "kernel" in name else None))
        base = None if base is timed else base
        yield {
            "T": tokens,
            "row": name,
            "ms": timed.median * 1e3,
            "ms_low": timed.low * 1e3,
            "ms_high": timed.high * 1e3,
            "samples": timed.samples,
            "tokens_per_s": batch * tokens / timed.median,
            "flop_per_s": flops / timed.median,
            "memory_overhead": timed.median / base.median - 1 if base else None,
            "speedup_over_fastest_torch": fastest / timed.median,
            **beside,
        }


def main() -> None:
    options = timing.parser(__doc__, "bf16", seconds=3.0)
    options.add_argument("--against", nargs="*", default=[], help="other backends to measure in the same run")
    options.add_argument("--tokens", nargs="+", type=int, default=[2048])
    options.add_argument("--geometry", default="32/8/128", help="HQ/HKV/D")
    options.add_argument("--batch", type=int, default=1)
    options = options.parse_args()
    device, dtype = timing.pick_device(options.device), timing.DTYPES[options.dtype]
    heads, kv_heads, dim = map(int, options.geometry.split("/"))
    env = timing.environment(device, options.dtype)
    timing.print_header(f"prefill: one attention layer, {options.geometry}, batch {options.batch}", env)
    gemm, memory = timing.gemm_ceiling(device, dtype), timing.read_ceiling(device)
    ceilings = {"gemm_flop_per_s": gemm, "memory_bytes_per_s": memory}
    table = timing.Table(COLUMNS)
    rows = []
    with torch.inference_mode(), timing.progress(options.tokens, "prefill") as bar:
        for tokens in bar:
            layer = eager.random_layer(options.batch, tokens, heads, kv_heads, dim, tokens, dtype, device)
            backend = backends.choose("fused_delta_attention", options.backend, layer["q"], layer["mem_q"].shape[-1])
            own = [backend, *options.against]
            times, beside = run_length(layer, dtype, device, own, ceilings, options.seconds)
            flops = 2 * options.batch * heads * tokens * tokens * dim
            measured = list(results(tokens, options.batch, flops, times, beside | {"backend": backend}))
            for row in measured:
                overhead = row["memory_overhead"]
                table.row(
                    tokens,
                    row["row"],
                    f"{row['ms']:.3f}",
                    f"{row['tokens_per_s']:,.0f}",
                    f"{row['flop_per_s'] / 1e9:,.0f}",
                    timing.percent(row["flop_per_s"] / row["gemm_flop_per_s"]),
                    "" if overhead is None else timing.percent(overhead),
                    f"{row['speedup_over_fastest_torch']:.2f}x",
                )
            rows += measured
    print(
        f"\n{gemm.name}, timed beside each shape: {rows[-1]['gemm_flop_per_s'] / 1e9:,.0f} GFLOP/s; {memory.name}: "
        f"{rows[-1]['memory_bytes_per_s'] / 1e9:,.0f} GB/s. 'vs torch' "
        f"compares with the fastest torch attention: {', '.join(sorted({row['formulation'] for row in rows}))}."
    )
    timing.write_results(options.output, env, rows)


if __name__ == "__main__":
    main()
