"""Host cost of one public call: from the Python call to a launcher that does nothing.

The backend's launchers are replaced by functions that return results made once. What remains is validation,
the choice of backend, the allocation of results that an op fills in place, and the dispatcher.
"""

import importlib
from functools import partial

import timing
import torch

import deltamem_kernels as dm
from deltamem_kernels.ops import ROOMS, SCHEMAS

LIMIT_US = 15.0
CALLS_PER_SAMPLE = 20  # a sample much shorter than a time slice of the scheduler
HEADS, KV_HEADS, DIM, RANK, HIDDEN, CONTEXT = 32, 8, 128, 8, 2560, 64


def stub_launchers(backend: str) -> dict[str, int]:
    """Replace every launcher of the backend. -> calls so far per op"""
    calls = dict.fromkeys(SCHEMAS, 0)

    def stub(op, reference):
        result = None

        def launch(*args):
            nonlocal result
            if not calls[op]:
                result = reference(*args)
            calls[op] += 1
            return result

        return launch

    for op, (module, *_) in SCHEMAS.items():
        reference = getattr(importlib.import_module(f"{ROOMS['reference']}.{module}"), op)
        setattr(importlib.import_module(f"{ROOMS[backend]}.{module}"), op, stub(op, reference))
    return calls


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
    calls = {name: partial(call, backend=backend) for name, call in calls.items()}
    if backend in ("auto", "cpu", "cuda"):  # delta_output takes no backend argument
        calls["delta_output"] = partial(dm.delta_output, random(1, 1, HIDDEN), reads, random(HIDDEN, RANK))
    return calls


def repeated(call):
    for _ in range(CALLS_PER_SAMPLE):
        call()


def main() -> None:
    parser = timing.parser(__doc__, "bf16", seconds=0.5)
    parser.set_defaults(backend="cpu")
    options = parser.parse_args()
    device, dtype = timing.pick_device(options.device), timing.DTYPES[options.dtype]
    env = timing.environment(device, options.dtype, "median over blocks of calls in turns, launchers replaced")
    timing.print_header(f"host cost of public calls, {options.backend} backend", env)
    counts = stub_launchers(options.backend)
    table = timing.Table({"call": -36, "µs": 6, f"limit {LIMIT_US:.0f}": 8})
    rows = []
    with torch.inference_mode():
        calls = public_calls(options.backend, dtype, device)
        for name, call in calls.items():
            before = sum(counts.values())
            call()
            timing.gate(
                f"{name}: launchers reached",
                torch.tensor(sum(counts.values()) > before),
                torch.tensor(True),
                0,
            )
        times = timing.measure(
            {name: [partial(repeated, call)] for name, call in calls.items()},
            torch.device("cpu"),
            options.seconds,
        )
    for name, timed in times.items():
        us = timed.median * 1e6 / CALLS_PER_SAMPLE
        rows.append({"call": name, "us": us, "limit_us": LIMIT_US, "samples": timed.samples})
        table.row(name, f"{us:.1f}", "ok" if us <= LIMIT_US else "over")
    timing.write_results(options.output, env, rows)


if __name__ == "__main__":
    main()
