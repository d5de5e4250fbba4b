"""The decode benchmark's cases: inputs, correctness gates and timings of one shape."""

from dataclasses import asdict, dataclass
from functools import partial

import eager
import timing
import torch

from deltamem_kernels import fused_delta_attention_with_kvcache


@dataclass(frozen=True)
class Shape:
    geometry: str
    heads: int
    kv_heads: int
    dim: int
    context: int
    batch: int

    def cache_bytes(self, dtype) -> int:
        return 2 * self.batch * self.context * self.kv_heads * self.dim * dtype.itemsize


class Copies:
    """Several layers' inputs, together larger than the last-level cache: each call reads cold memory."""

    def __init__(self, shape: Shape, dtype, device):
        self.shape = shape
        count = timing.copies_beyond_cache(shape.cache_bytes(dtype), device)
        cache_shape = (count, shape.batch, shape.context, shape.kv_heads, shape.dim)
        self.k_caches, self.v_caches = (
            timing.fill_random(torch.empty(cache_shape, dtype=dtype, device=device)) for _ in range(2)
        )
        self.torch_k, self.torch_v = (x.transpose(2, 3).contiguous() for x in (self.k_caches, self.v_caches))
        sizes = (shape.batch, 1, shape.heads, shape.kv_heads, shape.dim, shape.context)
        self.layers = [eager.random_layer(*sizes, dtype, device) for _ in range(min(count, 8))]
        rank = self.layers[0]["mem_q"].shape[-1]
        self.pools = torch.randn(count, shape.batch, 1, rank, rank, device=device)
        self.filled = torch.full((shape.batch,), shape.context - 1, dtype=torch.int32, device=device)
        self.count = count

    def layer(self, copy):
        return self.layers[copy % len(self.layers)]

    def bare(self, attention):
        return [partial(attention, self.layer(i)["q"], self.torch_k[i], self.torch_v[i]) for i in range(self.count)]

    def chain(self, attention):
        return [
            partial(eager.decode_step, self.layer(i), self.torch_k[i], self.torch_v[i], self.pools[i], attention)
            for i in range(self.count)
        ]

    def kernel(self, backend, memory):
        return [self._kernel_call(i, backend, memory) for i in range(self.count)]

    def _kernel_call(self, copy, backend, memory):
        layer = self.layer(copy)
        keywords = eager.kernel_arguments(layer, memory)
        if memory:
            keywords["state_pool"] = self.pools[copy]
        return partial(
            fused_delta_attention_with_kvcache,
            layer["q"],
            self.k_caches[copy],
            self.v_caches[copy],
            layer["k"],
            layer["v"],
            cache_seqlens=self.filled,
            backend=backend,
            **keywords,
        )


# ---------------------------------------------------------------- correctness


def truth(copies: Copies, memory: bool):
    """The fp64 chain on copy 0, row by row to bound its memory. -> out, reads, state, appended key"""
    rows = []
    per_row = ("q", "k", "v", "mem_q", "mem_k", "mem_v", "beta")
    for b in range(copies.shape.batch):
        layer = eager.in_fp64({name: x[b : b + 1] if name in per_row else x for name, x in copies.layer(0).items()})
        k, v, pool = (x[0, b : b + 1].double() for x in (copies.torch_k, copies.torch_v, copies.pools))
        if not memory:
            layer["delta_q"].zero_()
        rows.append((*eager.decode_step(layer, k, v, pool, eager.bmm_softmax32_bmm), pool, k[:, :, -1]))
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


def check_attention(copies: Copies, dtype) -> dict[str, str]:
    """Gate every torch formulation of the bare attention on copy 0. -> those that failed, and why."""
    q = copies.layer(0)["q"].double()
    calls = {name: copies.bare(attention)[0] for name, attention in eager.decode_attention(q.device).items()}
    rows = [
        eager.bmm_softmax32_bmm(
            q[b : b + 1], copies.torch_k[0, b : b + 1].double(), copies.torch_v[0, b : b + 1].double()
        )
        for b in range(len(q))
    ]
    want = torch.cat(rows)
    allowed = timing.budget(calls["bmm-softmax32-bmm"](), want, dtype)
    failed = {}
    for name, call in calls.items():
        try:
            timing.gate(name, call(), want, allowed)
        except (timing.GateError, RuntimeError) as error:
            failed[name] = str(error).splitlines()[0]
    return failed


def check_kernels(copies: Copies, backends, dtype) -> None:
    """Gate the kernel with and without memory on copy 0: out, reads, state and the appended keys."""
    for memory in (False, True):
        want, want_reads, want_state, want_key = truth(copies, memory)
        start = copies.pools[0].clone()
        layer = copies.layer(0) if memory else copies.layer(0) | {"delta_q": copies.layer(0)["delta_q"] * 0}
        pool = start.clone()
        eager_out, _ = eager.decode_step(layer, copies.torch_k[0], copies.torch_v[0], pool, eager.bmm_softmax32_bmm)
        for backend in backends:
            name = f"{backend} backend, {'with' if memory else 'without'} memory"
            result = copies.kernel(backend, memory)[0]()
            timing.gate(f"{name}: out", result.out, want, timing.budget(eager_out, want, dtype))
            allowed = timing.budget(copies.torch_k[0, :, :, -1], want_key, dtype)
            timing.gate(f"{name}: appended k", copies.k_caches[0, :, -1], want_key, allowed)
            timing.gate(f"{name}: appended v", copies.v_caches[0, :, -1], copies.torch_v[0, :, :, -1], 0.0)
            if memory:
                timing.gate(f"{name}: reads", result.reads, want_reads, 1e-5)
                timing.gate(f"{name}: state", copies.pools[0], want_state, 1e-5)
            copies.pools[0].copy_(start)


# ---------------------------------------------------------------- one row of shapes


def run_shape(shape: Shape, dtype, device, backends, ceiling, seconds) -> list[dict]:
    copies = Copies(shape, dtype, device)
    failed = check_attention(copies, dtype)
    check_kernels(copies, backends, dtype)
    attentions = {name: call for name, call in eager.decode_attention(device).items() if name not in failed}
    contest = {name: copies.bare(attention) for name, attention in attentions.items()}
    formulations = timing.measure(contest, device, seconds / 5)
    best = min(formulations, key=lambda name: formulations[name].median)
    cases = {
        "torch attention": copies.bare(attentions[best]),
        "torch + eager delta-mem": copies.chain(attentions[best]),
    }
    for backend in backends:
        name = "kernel" if backend == "auto" else f"{backend} kernel"
        cases[f"{name}, no memory"] = copies.kernel(backend, memory=False)
        cases[f"{name}, delta-mem"] = copies.kernel(backend, memory=True)
    times = timing.measure({"ceiling": [ceiling.call], **cases}, device, seconds)
    rows = []
    for name in cases:
        rate = shape.cache_bytes(dtype) / times[name].median
        without = {"torch + eager delta-mem": "torch attention"}.get(name, name.replace("delta-mem", "no memory"))
        rows.append(
            {
                **asdict(shape),
                "row": name,
                "formulation": best if name.startswith("torch") else None,
                "us": times[name].median * 1e6,
                "us_low": times[name].low * 1e6,
                "us_high": times[name].high * 1e6,
                "samples": times[name].samples,
                "tokens_per_s_per_layer": shape.batch / times[name].median,
                "bytes_per_s": rate,
                "read_bandwidth": ceiling.rate(times["ceiling"]),
                "share_of_bandwidth": rate / ceiling.rate(times["ceiling"]),
                "memory_overhead": times[name].median / times[without].median - 1 if without != name else None,
                "speedup_over_torch_attention": times["torch attention"].median / times[name].median,
                "contest_us": {key: value.median * 1e6 for key, value in formulations.items()},
                "contest_failed": failed,
            }
        )
    return rows
