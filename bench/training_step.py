"""A training step of a whole model: the context written, the question read, the memory's gradients.

    state = 0;  model(context) writes it with its graph;  model(question) reads it;  loss = cross-entropy;  backward

The backbone is frozen and of random weights. Rows: the memory by our kernels; the memory in eager torch, a loop over
tokens through hooks on the stock model. Gradients of every parameter of the memory are gated against fp64 on a
shorter step.
"""

import copy
from functools import partial

import timing
import torch
from generate_models import GEOMETRIES, STOCK, Memories, backbone, reset, sharing, with_eager_memory
from torch.nn import functional as F

from deltamem_kernels import hf

COLUMNS = {"write": 6, "read": 5, "row": -24, "ms": 9, "low": 9, "high": 9, "tokens/s": 9, "vs eager": 9}
EAGER, KERNEL, FROZEN = "delta-mem, eager torch", "delta-mem, fused", STOCK + ", forward only"
GATE_TOKENS = 96, 32  # written, read


def parameters(model) -> dict[str, torch.Tensor]:
    """The memory's, by layer and name, those that train."""
    held = getattr(model, "eager_memories", None)
    memories = [m.memory for m in held] if held else model._delta_mem.memories
    return {f"{i}.{name}": p for i, m in enumerate(memories) for name, p in m.named_parameters() if name in trained(m)}


def trained(memory) -> set[str]:
    return {name for name, _ in memory.named_parameters() if memory._trains(name)}


def passes(model, context, question):
    """-> logits of the question, from what the context wrote"""
    if hasattr(model, "eager_memories"):
        reset(model)
        for pass_, write in ((context, True), (question, False)):
            for memory in model.eager_memories:
                memory.write = write
            logits = model(pass_, use_cache=False, logits_to_keep=1 if write else 0).logits
        return logits
    if not hasattr(model, "_delta_mem"):
        model(context, use_cache=False, logits_to_keep=1)
        return model(question, use_cache=False).logits
    state = hf.DeltaMemState.zeros(model, context.shape[0])
    model(context, delta_state=state, use_cache=False, logits_to_keep=1)
    return model(question, delta_state=state, delta_write=False, use_cache=False).logits


def step(model, context, question) -> dict[str, torch.Tensor]:
    """-> gradients by parameter"""
    logits = passes(model, context, question)
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide.flatten(0, 1), question[:, 1:].flatten())
    leaves = parameters(model)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def check(rows: dict, memories: Memories, model, tokens, dtype) -> float:
    """Gate our gradients; their budget is that of the eager row. -> largest share of it"""
    context, question = (tokens[:, :n] for n in GATE_TOKENS)
    double = with_eager_memory(copy.deepcopy(model).double(), memories)
    for memory in double.eager_memories:
        memory.memory.double().requires_grad_(True)
    want = step(double, context, question)
    plain, got = (step(rows[name], context, question) for name in (EAGER, KERNEL))
    share = 0.0
    for name, gradient in want.items():
        # a backbone of rounded sums, whose norms transformers computes in fp32 even in fp64: units of the largest
        units = 16 * torch.finfo(dtype).eps / 2 * gradient.abs().max()
        allowed = timing.budget(plain[name], gradient, dtype) + units
        timing.gate(f"training step: gradient of {name}", got[name], gradient, allowed)
        share = max(share, float(((got[name].double() - gradient).abs() / allowed).max()))
    return share


def main() -> None:
    options = timing.parser(__doc__, "fp32", seconds=3.0)
    options.add_argument("--geometry", default="tiny", choices=list(GEOMETRIES))
    options.add_argument("--write", type=int, default=2048, help="tokens")
    options.add_argument("--read", type=int, default=256, help="tokens")
    options.add_argument("--batch", type=int, default=1)
    options = options.parse_args()
    device, dtype = timing.pick_device(options.device), timing.DTYPES[options.dtype]
    env = timing.environment(device, options.dtype)
    size = f"{options.geometry}, batch {options.batch}, {options.write} written + {options.read} read"
    timing.print_header(f"training step: {size}", env)
    model = backbone(options.geometry, None, None, dtype, device)
    memories = Memories(model, None)
    rows = {KERNEL: memories.attach(sharing(model)), EAGER: with_eager_memory(sharing(model), memories)}
    for row in rows.values():
        for p in parameters(row).values():
            p.requires_grad_(True)
    tokens = torch.randint(model.config.vocab_size, (options.batch, options.write + options.read), device=device)
    env["gate"] = check(rows, memories, model, tokens, dtype)
    print(f"gate: largest error of a gradient {timing.percent(env['gate'])} of its budget")
    context, question = tokens[:, : options.write], tokens[:, options.write :]
    frozen = {FROZEN: [partial(torch.no_grad()(passes), model, context, question)]}
    cases = frozen | {KERNEL: [partial(step, rows[KERNEL], context, question)]}
    times = timing.measure(cases, device, options.seconds, graph=False)
    loop = {EAGER: [partial(step, rows[EAGER], context, question)]}  # takes a few turns of its own
    times |= timing.measure(loop, device, options.seconds, graph=False, rounds=3)
    table, results = timing.Table(COLUMNS), []
    for name, timed in times.items():
        results.append(
            {
                "write": options.write,
                "read": options.read,
                "row": name,
                "ms": timed.median * 1e3,
                "ms_low": timed.low * 1e3,
                "ms_high": timed.high * 1e3,
                "samples": timed.samples,
                "tokens_per_s": tokens.numel() / timed.median,
                "speedup_over_eager": times[EAGER].median / timed.median,
            }
        )
        row = results[-1]
        figures = (f"{row[key]:.2f}" for key in ("ms", "ms_low", "ms_high"))
        speed = "" if name == FROZEN else f"{row['speedup_over_eager']:.1f}x"
        table.row(options.write, options.read, name, *figures, f"{row['tokens_per_s']:,.0f}", speed)
    timing.write_results(options.output, env, results)


if __name__ == "__main__":
    main()
