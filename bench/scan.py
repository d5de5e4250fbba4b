"""delta_scan, forward and forward with backward, against a loop over tokens in eager torch.

On a GPU everything but that loop is replayed from CUDA graphs, and the forward also has the plain Triton scan beside
it, one program per row of a state. GB/s counts mem_q, mem_k, mem_v, beta and reads once each, and in the backward
their gradients once each.
"""

from functools import partial

import eager
import timing
import torch

from deltamem_kernels import delta_scan

SHAPES = [(1, 8192, 1, 8), (1, 8192, 4, 8), (8, 1024, 1, 8), (1, 8192, 1, 16), (1, 8192, 1, 32)]  # B, T, H, R
LONG_SHAPES = [(1, 131072, 1, 8)]  # on a GPU
LOOP_TOKENS = 1024  # the loop over tokens is timed over the first ones only
LOOP_CHECKED = 8192  # and checks no more of them than these
COLUMNS = {
    "op": -18,
    "B": 2,
    "T": 5,
    "H": 2,
    "R": 2,
    "µs": 9,
    "GB/s": 6,
    "of bandwidth": 12,
    "vs torch loop": 13,
    "vs serial": 9,
    "vs own forward": 14,
}


def random_inputs(shape, dtype, device):
    """mem_q, mem_k, mem_v, beta [B, T, H, R], activated."""
    raw = [torch.randn(shape, device=device) for _ in range(4)]
    active = eager.activated(raw[0]), eager.activated(raw[1]), raw[2], raw[3].sigmoid()
    return [x.to(dtype) for x in active]


def leaves(inputs):
    return [x.detach().requires_grad_() for x in inputs]


def gradients(scan, inputs, dreads):
    """Forward with backward of inputs that require grad."""
    return torch.autograd.grad(scan(*inputs)[0], inputs, dreads)


def serial_on(device):
    """The plain Triton scan, where it runs."""
    if device.type != "cuda":
        return None
    from serial_scan import serial_scan

    return serial_scan


def check(shape, dtype, device, kernel) -> None:
    """Gate reads, final state and gradients against the loop over tokens in fp64; of what is longer than LOOP_CHECKED,
    its first tokens, and all reads and the final state against the plain Triton scan, gated by the same loop."""
    inputs = random_inputs(shape, dtype, device)
    dreads = torch.randn(shape, device=device)
    dreads[:, LOOP_CHECKED:] = 0  # their gradients would reach the first tokens
    few, few_dreads = [x[:, :LOOP_CHECKED] for x in inputs], dreads[:, :LOOP_CHECKED]
    names = ["reads", "dmem_q", "dmem_k", "dmem_v", "dbeta"]

    def everything(scan, inputs, dreads):
        return [scan(*inputs)[0], *gradients(scan, leaves(inputs), dreads)]

    def loop(*inputs):
        return eager.scan_loop(*(x.float() for x in inputs))

    truth = [x.double() for x in few]
    gots = [x[:, :LOOP_CHECKED] for x in everything(kernel, inputs, dreads)]
    loops = everything(loop, few, few_dreads)
    wants = everything(eager.scan_loop, truth, few_dreads.double())
    for name, got, plain, want in zip(names, gots, loops, wants, strict=True):
        timing.gate(f"delta_scan {shape} {name}", got, want, timing.budget(plain, want, got.dtype))

    serial = serial_on(device)
    scans = {"delta_scan": kernel} | ({"serial_scan": serial} if serial else {})
    plain, want = loop(*few)[1], eager.scan_loop(*truth)[1]
    for name, scan in scans.items():
        got = scan(*few)
        timing.gate(f"{name} {shape} final_state", got[1], want, timing.budget(plain, want, got[1].dtype))
        timing.gate(f"{name} {shape} reads", got[0], wants[0], timing.budget(loops[0], wants[0], got[0].dtype))
    if shape[1] > LOOP_CHECKED and serial:
        for name, got, want in zip(("reads", "final_state"), kernel(*inputs), serial(*inputs), strict=True):
            allowed = 16 * torch.finfo(torch.float32).eps * want.abs().max()
            timing.gate(f"delta_scan {shape} {name} against serial_scan", got, want, allowed)


def history_ratio(kernel, tokens, rank, dtype, device) -> dict | None:
    """Peak memory of forward with backward beyond reads and gradients, against a T·R·R fp32 history."""
    inputs = leaves(random_inputs((1, tokens, 1, rank), dtype, device))
    dreads = torch.randn(inputs[0].shape, device=device)
    gradients(kernel, inputs, dreads)
    peak = timing.peak_memory(partial(gradients, kernel, inputs, dreads), device)
    if peak is None:
        return None
    results = dreads.nbytes + sum(x.nbytes for x in inputs)
    history = tokens * rank * rank * 4
    return {"extra_bytes": peak - results, "history_bytes": history, "share": (peak - results) / history}


def run_shape(shape, dtype, device, kernel, others, ceiling, seconds) -> list[dict]:
    for scan in (kernel, *others.values()):
        check(shape, dtype, device, scan)
    bytes_forward = 5 * torch.Size(shape).numel() * dtype.itemsize
    inputs = [random_inputs(shape, dtype, device) for _ in range(timing.copies_beyond_cache(bytes_forward, device))]
    dreads = torch.randn(shape, device=device)

    # The loop takes turns of its own, being far longer than the rest, over its first tokens: its time is
    # proportional to them.
    few = [x[:, :LOOP_TOKENS] for x in inputs[0]]
    loop_dreads = dreads[:, :LOOP_TOKENS]
    with torch.no_grad():
        loop = timing.measure({"forward": [partial(eager.scan_loop, *few)]}, device, seconds, graph=False)
        kernels = {"ceiling": [ceiling.call], "forward": [partial(kernel, *x) for x in inputs]}
        if serial := serial_on(device):
            kernels["serial"] = [partial(serial, *inputs[0])]  # its chain of tokens outlasts any cache miss
        kernels |= {name: [partial(scan, *x) for x in inputs] for name, scan in others.items()}
        forward = timing.measure(kernels, device, seconds)
    loop |= timing.measure(
        {"backward": [partial(gradients, eager.scan_loop, leaves(few), loop_dreads)]}, device, seconds, graph=False
    )
    backward = [partial(gradients, kernel, leaves(x), dreads) for x in inputs]
    trained = {name: [partial(gradients, scan, leaves(x), dreads) for x in inputs] for name, scan in others.items()}
    own = timing.measure({"forward": kernels["forward"], "backward": backward} | trained, device, seconds)
    loop_us = {name: timed.median * 1e6 / few[0].shape[1] for name, timed in loop.items()}  # per token
    rows = []
    cases = (
        ("delta_scan fwd", forward["forward"], loop_us["forward"], 1),
        *((f"{name} fwd", forward[name], loop_us["forward"], 1) for name in others),
        ("delta_scan fwd+bwd", own["backward"], loop_us["backward"], 2.8),
        *((f"{name} fwd+bwd", own[name], loop_us["backward"], 2.8) for name in others),
    )
    for name, timed, torch_loop_us, passes in cases:
        rate = passes * bytes_forward / timed.median
        rows.append(
            {
                "op": name,
                "B": shape[0],
                "T": shape[1],
                "H": shape[2],
                "R": shape[3],
                "us": timed.median * 1e6,
                "us_low": timed.low * 1e6,
                "us_high": timed.high * 1e6,
                "samples": timed.samples,
                "bytes_per_s": rate,
                "share_of_bandwidth": rate / ceiling.rate(forward["ceiling"]),
                "speedup_over_torch_loop": torch_loop_us * shape[1] / (timed.median * 1e6),
                "torch_loop_us_per_token": torch_loop_us,
                "speedup_over_serial": forward["serial"].median / timed.median if serial and passes == 1 else None,
                "times_own_forward": timed.median / own["forward"].median if timed is own["backward"] else None,
            }
        )
    return rows


def main() -> None:
    options = timing.parser(__doc__, "fp32")
    options.add_argument("--against", nargs="*", default=[], help="other backends to measure in the same run")
    options.add_argument(
        "--shapes", nargs="+", help="B/T/H/R such as 1/8192/1/8; default: a set of five, on a GPU of six"
    )
    options.add_argument("--memory-tokens", type=int, default=1 << 18, help="length of the memory measurement")
    options = options.parse_args()
    device, dtype = timing.pick_device(options.device), timing.DTYPES[options.dtype]
    default = SHAPES + (LONG_SHAPES if device.type == "cuda" else [])
    shapes = [tuple(map(int, text.split("/"))) for text in options.shapes or []] or default
    env = timing.environment(device, options.dtype)
    timing.print_header("delta_scan: reads and final state of a sequence", env)

    kernel = partial(delta_scan, backend=options.backend)
    others = {name: partial(delta_scan, backend=name) for name in options.against}
    ceiling = timing.read_ceiling(device)
    table = timing.Table(COLUMNS)
    rows = []
    with timing.progress(shapes, "scan") as bar:
        for shape in bar:
            measured = run_shape(shape, dtype, device, kernel, others, ceiling, options.seconds)
            for row in measured:
                own, plain = row["times_own_forward"], row["speedup_over_serial"]
                table.row(
                    *(row[key] for key in ("op", "B", "T", "H", "R")),
                    timing.microseconds(row["us"] * 1e-6),
                    f"{row['bytes_per_s'] / 1e9:.1f}",
                    timing.percent(row["share_of_bandwidth"]),
                    f"{row['speedup_over_torch_loop']:,.0f}x",
                    f"{plain:,.0f}x" if plain else "",
                    f"{own:.2f}x" if own else "",
                )
            rows += measured
    print(
        f"\ntorch loop: {rows[0]['torch_loop_us_per_token']:.1f} µs a token forward, "
        f"{rows[1]['torch_loop_us_per_token']:.1f} µs with backward, timed over {LOOP_TOKENS} tokens. "
        f"{ceiling.name}."
    )
    memory = history_ratio(kernel, options.memory_tokens, shapes[0][3], dtype, device)
    if memory:
        print(
            f"memory: forward with backward of {options.memory_tokens} tokens holds "
            f"{memory['extra_bytes'] / 2**20:.1f} MiB beyond "
            f"reads and gradients, {timing.percent(memory['share'])} of the T·R·R history's "
            f"{memory['history_bytes'] / 2**20:.0f} MiB."
        )
        rows.append({"op": "delta_scan bwd memory", **memory})
    timing.write_results(options.output, env, rows)


if __name__ == "__main__":
    main()
