"""Host cost of one public call: from the Python call to a launcher that does nothing.

The backend's launchers are replaced by functions that return results made once. What remains is validation,
the choice of backend, the allocation of results that an op fills in place, and the dispatcher. On a GPU a second column
leaves the launchers in: what it costs to enqueue the call.
"""

import importlib
from contextlib import contextmanager
from functools import partial

import timing
import torch

import deltamem_kernels as dm
from deltamem_kernels import ops
from deltamem_kernels.ops import ROOMS, SCHEMAS

LIMIT_US = 15.0
CALLS_PER_SAMPLE = 20  # a sample much shorter than a time slice of the scheduler
HEADS, KV_HEADS, DIM, RANK, HIDDEN, CONTEXT = 32, 8, 128, 8, 2560, 64


@contextmanager
def stubbed_launchers(backend: str):
    """Replaces every launcher of the backend. -> calls so far per op"""
    calls = dict.fromkeys(ops.LAUNCHERS[backend], 0)
    rooms = {op: importlib.import_module(f"{ROOMS[backend]}.{SCHEMAS[op][0]}") for op in calls}
    launchers = {op: getattr(room, op) for op, room in rooms.items()}

    def stub(op, reference):
        result = None

        def launch(*args):
            nonlocal result
            if not calls[op]:
                result = reference(*args[backend in ops.NATIVE_MODULES :])  # native launchers get their module first
            calls[op] += 1
            return result

        return launch

    for op in calls:
        reference = getattr(importlib.import_module(f"{ROOMS['reference']}.{SCHEMAS[op][0]}"), op)
        setattr(rooms[op], op, stub(op, reference))
    yield calls
    for op, room in rooms.items():
        setattr(room, op, launchers[op])
        ops.LAUNCHERS[backend][op] = ops._lazy(op, backend)  # the last one keeps what it found


def public_calls(backend: str, dtype, device) -> dict[str, partial]:
    def random(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    q, k, v = random(1, 1, HEADS, DIM), random(1, 1, KV_HEADS, DIM), random(1, 1, KV_HEADS, DIM)
    caches = random(2, 1, CONTEXT, KV_HEADS, DIM).unbind()
    mem_q, mem_k, mem_v, beta = (random(1, 1, 1, RANK) for _ in range(4))
    pool = torch.zeros(1, 1, RANK, RANK, device=device)
    slots, filled = (torch.full((1,), value, dtype=torch.int32, device=device) for value in (0, 7))
    cos, sin = random(2, CONTEXT, DIM // 2).unbind()
    prep = {"q_norm_weight": random(DIM), "k_norm_weight": random(DIM), "rotary_cos": cos, "rotary_sin": sin}
    gates = {"use_qk_activation_in_kernel": True, "use_gate_in_kernel": True}
    memory = {"mem_q": mem_q, "mem_k": mem_k, "mem_v": mem_v, "beta": beta, **gates}
    corrected = {**memory, "delta_q": random(HEADS * DIM, RANK)}
    decode = partial(dm.fused_delta_attention_with_kvcache, q, *caches, k, v, cache_seqlens=filled, **prep)
    reads = torch.zeros(1, 1, 1, RANK, device=device)
    calls = {
        "fused_delta_attention_with_kvcache": partial(decode, state_pool=pool, state_indices=slots, **corrected),
        "the same without memory": decode,
        "fused_delta_attention": partial(dm.fused_delta_attention, q, k, v, **corrected, **prep),
        "delta_scan": partial(dm.delta_scan, mem_q, mem_k, mem_v, beta, **gates),
        "delta_scan_with_state_pool": partial(
            dm.delta_scan_with_state_pool, **memory, state_pool=pool, state_indices=slots
        ),
    }
    calls["delta_output"] = partial(dm.delta_output, random(1, 1, HIDDEN), reads, random(HIDDEN, RANK))
    return {name: partial(call, backend=backend) for name, call in calls.items()}


def repeated(call):
    for _ in range(CALLS_PER_SAMPLE):
        call()


def host_times(calls, seconds) -> dict[str, timing.Timing]:
    """Wall-clock time of blocks of calls, whatever a device does meanwhile."""
    blocks = {name: [partial(repeated, call)] for name, call in calls.items()}
    return timing.measure(blocks, torch.device("cpu"), seconds)


def main() -> None:
    parser = timing.parser(__doc__, "bf16", seconds=0.5)
    parser.set_defaults(backend="cpu")
    options = parser.parse_args()
    device, dtype = timing.pick_device(options.device), timing.DTYPES[options.dtype]
    env = timing.environment(device, options.dtype, "median over blocks of calls in turns, launchers replaced")
    timing.print_header(f"host cost of public calls, {options.backend} backend", env)
    table = timing.Table({"call": -36, "µs": 6, f"limit {LIMIT_US:.0f}": 8, "enqueued µs": 11})
    rows, enqueued = [], {}
    with torch.inference_mode():
        with stubbed_launchers(options.backend) as counts:
            calls = public_calls(options.backend, dtype, device)
            for name, call in calls.items():
                before = sum(counts.values())
                call()
                reached = torch.tensor(sum(counts.values()) > before)
                timing.gate(f"{name}: launchers reached", reached, torch.tensor(True), 0)
            times = host_times(calls, options.seconds)
        if device.type == "cuda":
            enqueued = host_times(calls, options.seconds)
    for name, timed in times.items():
        us = timed.median * 1e6 / CALLS_PER_SAMPLE
        launched = enqueued[name].median * 1e6 / CALLS_PER_SAMPLE if enqueued else None
        rows.append({"call": name, "us": us, "limit_us": LIMIT_US, "enqueued_us": launched, "samples": timed.samples})
        table.row(name, f"{us:.1f}", "ok" if us <= LIMIT_US else "over", f"{launched:.1f}" if launched else "-")
    timing.write_results(options.output, env, rows)


if __name__ == "__main__":
    main()
