"""Decode throughput of one attention layer: one token per row against a filled KV cache.

Rows: frozen attention alone in its fastest torch formulation, the same with delta-mem in eager torch, this
package's kernel without memory (QK-norm, RoPE, append, attention), and with it (also state read and update,
correction).
"""

import argparse
from pathlib import Path

GEOMETRIES = {"qwen3-4b": (32, 8, 128), "smollm3-3b": (16, 4, 128)}  # query heads, kv heads, head size
COLUMNS = {
    "geometry": -10,
    "B": 2,
    "context": 7,
    "row": -27,
    "µs": 9,
    "tokens/s/layer": 14,
    "GB/s": 6,
    "of bandwidth": 12,
    "memory adds": 11,
    "vs torch": 8,
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument(
        "--geometry",
        nargs="+",
        default=list(GEOMETRIES),
        help=f"of {', '.join(GEOMETRIES)}, or HQ/HKV/D such as 32/8/128",
    )
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 32768], help="keys per row")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4], help="rows")
    parser.add_argument("--backends", nargs="+", default=["auto"], help="of auto, reference, cpu, triton, cuda")
    parser.add_argument("--seconds", type=float, default=0.8, help="measuring time per row of the table")
    parser.add_argument("--quick", action="store_true", help="contexts 1024 and 8192, batch 1, 0.3 s per row")
    parser.add_argument("--output", help="JSON file; a chart is written beside it as .png")
    options = parser.parse_args()
    if options.quick:
        options.contexts, options.batches, options.seconds = [1024, 8192], [1], 0.3
    return options


def sizes(geometry: str) -> tuple[int, ...]:
    return GEOMETRIES.get(geometry) or tuple(int(size) for size in geometry.split("/"))


def print_row(table, row: dict) -> None:
    from timing import microseconds, percent

    overhead = row["memory_overhead"]
    table.row(
        row["geometry"],
        row["batch"],
        row["context"],
        row["row"],
        microseconds(row["us"] * 1e-6),
        f"{row['tokens_per_s_per_layer']:,.0f}",
        f"{row['bytes_per_s'] / 1e9:.1f}",
        percent(row["share_of_bandwidth"]),
        "" if overhead is None else percent(overhead),
        f"{row['speedup_over_torch_attention']:.2f}x",
    )


def main() -> None:
    options = arguments()
    import timing  # these import torch: after --help has answered
    import torch
    from decode_layer import Shape, run_shape

    device, dtype = timing.pick_device(options.device), timing.DTYPES[options.dtype]
    env = timing.environment(device, options.dtype)
    timing.print_header("decode: one token per row, one attention layer", env)
    ceiling = timing.read_ceiling(device)
    table = timing.Table(COLUMNS)
    shapes = [
        Shape(geometry, *sizes(geometry), context, batch)
        for geometry in options.geometry
        for batch in options.batches
        for context in options.contexts
    ]
    rows = []
    with torch.inference_mode(), timing.progress(shapes, "decode") as bar:
        for shape in bar:
            bar.set_postfix_str(f"{shape.geometry} B={shape.batch} context={shape.context}")
            measured = run_shape(shape, dtype, device, options.backends, ceiling, options.seconds)
            for row in measured:
                print_row(table, row)
            rows += measured
    bandwidths = sorted(row["read_bandwidth"] for row in rows)
    print(
        f"\nGB/s counts the cache's bytes. {ceiling.name}, timed beside every shape: "
        f"{bandwidths[0] / 1e9:.1f} to {bandwidths[-1] / 1e9:.1f} GB/s."
    )
    winners = sorted({row["formulation"] for row in rows if row["formulation"]})
    print(f"Fastest torch formulations of the bare attention: {', '.join(winners)}.")
    timing.write_results(options.output, env, rows)
    if options.output:
        import chart

        chart.decode(Path(options.output).with_suffix(".png"), env, rows)


if __name__ == "__main__":
    main()
