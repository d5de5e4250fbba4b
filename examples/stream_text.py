"""Streams a real text through a small byte-level stack of δ-mem attention layers and proves it exact.

The text (pydoc_data.topics, part of every Python installation) enters in chunks, then byte by byte, through
KV caches and state pools. The same bytes then go through the training function as one sequence: it must give
the same logits and the same memory. Weights are random, the seed fixed: the subject is arithmetic, not prose.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pydoc_data import topics

import torch
import torch.nn.functional as F
from tqdm import tqdm

from deltamem_kernels import delta_output, fused_delta_attention, fused_delta_attention_with_kvcache

LAYERS, HIDDEN, HQ, HKV, D, R = 4, 256, 8, 2, 64, 8
PROJECTIONS = (HQ * D, HKV * D, HKV * D, R, R, R, R)  # q, k, v, mem_q, mem_k, mem_v, beta: one packed product
BUDGET = 1e-5  # of the largest logit (state entry): fp32 sums in another order, through all layers


@dataclass
class Layer:
    packed: torch.Tensor  # [sum(PROJECTIONS), HIDDEN]
    o_proj: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    correction: dict[str, torch.Tensor]  # delta_q, norm weights, gate bias, by the fused functions' names
    delta_o: torch.Tensor


class Model:
    def __init__(self, positions: int, device: torch.device, seed: int = 0):
        source = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return (torch.randn(*shape, generator=source) * shape[-1] ** -0.5).to(device)

        def correction():
            return {
                "delta_q": normal(HQ * D, R),
                "q_norm_weight": 1 + normal(D),
                "k_norm_weight": 1 + normal(D),
                "beta_bias": normal(1, R) - 2,
            }

        self.embedding = normal(256, HIDDEN) * HIDDEN**0.5
        self.layers = [
            Layer(
                normal(sum(PROJECTIONS), HIDDEN),
                normal(HIDDEN, HQ * D),
                normal(4 * HIDDEN, HIDDEN),
                normal(HIDDEN, 4 * HIDDEN),
                correction(),
                normal(HIDDEN, R),
            )
            for _ in range(LAYERS)
        ]
        angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(D // 2) / (D / 2))
        self.rotary = {"rotary_cos": angles.cos().to(device), "rotary_sin": angles.sin().to(device)}

    def __call__(self, text: torch.Tensor, attend) -> torch.Tensor:
        """text [B, T] bytes -> logits [B, T, 256]. attend(layer, q, k, v, **arguments) -> fused output"""
        x = self.embedding[text]
        for index, layer in enumerate(self.layers):
            projected = F.linear(F.rms_norm(x, (HIDDEN,)), layer.packed).split(PROJECTIONS, -1)
            q, k, v = (part.unflatten(-1, (-1, D)) for part in projected[:3])
            memory = dict(zip(("mem_q", "mem_k", "mem_v", "beta"), projected[3:], strict=True))
            fused = attend(
                index,
                q,
                k,
                v,
                **memory,
                **layer.correction,
                **self.rotary,
                use_qk_activation_in_kernel=True,
                use_gate_in_kernel=True,
            )
            x = delta_output(F.linear(fused.out.flatten(2), layer.o_proj), fused.reads, layer.delta_o, residual=x)
            x = x + F.linear(F.gelu(F.linear(F.rms_norm(x, (HIDDEN,)), layer.up)), layer.down)
        return F.linear(F.rms_norm(x, (HIDDEN,)), self.embedding) * HIDDEN**-0.5


class Stream:
    """What a conversation keeps between calls: per layer a KV cache and a state slot, and its length."""

    def __init__(self, model: Model, capacity: int, device: torch.device, backend: str):
        self.model, self.backend = model, backend
        self.k_caches, self.v_caches = torch.empty(2, LAYERS, 1, capacity, HKV, D, device=device).unbind()
        self.pools = torch.zeros(LAYERS, 1, 1, R, R, device=device)
        self.filled = torch.zeros(1, dtype=torch.int32, device=device)

    def feed(self, text: torch.Tensor) -> torch.Tensor:
        logits = self.model(text, self._attend)
        self.filled += text.shape[1]
        return logits

    def _attend(self, index, q, k, v, **arguments):
        return fused_delta_attention_with_kvcache(
            q,
            self.k_caches[index],
            self.v_caches[index],
            k,
            v,
            state_pool=self.pools[index],
            cache_seqlens=self.filled,
            backend=self.backend,
            **arguments,
        )


def whole(model: Model, text: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The text as one sequence. -> logits [1, T, 256], states [LAYERS, 1, 1, R, R]"""
    states = []

    def attend(index, q, k, v, **arguments):
        result = fused_delta_attention(q, k, v, backend=backend, **arguments)
        states.append(result.final_state)
        return result

    return model(text, attend), torch.stack(states)


def run_phase(label: str, stream: Stream, pieces: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    logits = []
    start = time.perf_counter()
    for piece in tqdm(pieces, desc=label, leave=False, dynamic_ncols=True):
        logits.append(stream.feed(piece))
    report(label, sum(piece.shape[1] for piece in pieces), logits[-1], start)
    return logits


def report(label: str, tokens: int, result: torch.Tensor, start: float) -> None:
    if result.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    print(f"{label:<34} {tokens:6,} bytes {seconds:7.2f} s {tokens / seconds:10,.0f} tokens/s")


def differs(name: str, got: torch.Tensor, want: torch.Tensor) -> bool:
    error = float((got - want).abs().max() / want.abs().max())
    passed = error <= BUDGET  # False for NaN
    print(
        f"{name:<34} largest difference {error:.1e} of the largest value, budget {BUDGET:.0e}: "
        f"{'equal' if passed else 'DIFFERENT'}"
    )
    return not passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--prefill", type=int, default=8000, help="bytes that enter in chunks")
    parser.add_argument("--chunk", type=int, default=500, help="bytes per chunk")
    parser.add_argument("--decode", type=int, default=1000, help="bytes that enter one by one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto", help="auto, reference, cpu, triton or cuda")
    options = parser.parse_args()

    text = "\n".join(topics.topics.values()).encode()[: options.prefill + options.decode]
    device = torch.device(options.device)
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(device)[None]
    print(
        f"pydoc_data.topics, {tokens.shape[1]:,} bytes; {LAYERS} layers, hidden {HIDDEN}, "
        f"heads {HQ}/{HKV}/{D}, rank {R}, fp32, {device}, {options.backend} backend\n"
    )
    with torch.inference_mode():
        model = Model(tokens.shape[1], device)
        stream = Stream(model, tokens.shape[1], device, options.backend)
        prompt, rest = tokens[:, : options.prefill], tokens[:, options.prefill :]
        logits = run_phase(f"prefill, chunks of {options.chunk}", stream, prompt.split(options.chunk, 1))
        logits += run_phase("decode, byte by byte", stream, rest.split(1, 1))
        start = time.perf_counter()
        whole_logits, whole_states = whole(model, tokens, options.backend)
        report("the whole text as one sequence", tokens.shape[1], whole_logits, start)
        print()
        failures = [
            differs("logits, streamed against whole", torch.cat(logits, 1), whole_logits),
            differs("memory, streamed against whole", stream.pools, whole_states),
        ]
    return int(any(failures))


if __name__ == "__main__":
    sys.exit(main())
