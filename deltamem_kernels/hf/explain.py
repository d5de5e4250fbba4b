"""Which path each attached layer runs, and why."""

from deltamem_kernels.hf.attach import attachment


def explain(model) -> None:
    """Print, for each layer with a memory, its path, the corrections it makes and how its last call went.

    ``fused``: the memory, QK-norm, RoPE, cache append and attention are one call of this package. ``generic``: the
    module runs its own attention between corrected projections.

    Raises:
        ValueError: Nothing is attached.
    """
    record = attachment("explain", model)
    for name, module in record.attentions.items():
        memory = module.delta_mem
        if memory.family is None:
            path = f"generic ({type(module).__name__} is not a family that the fused path knows)"
        else:
            path = f"fused ({memory.family.name})"
        active = [x for x in record.config.delta_heads if memory.get_parameter(f"delta_{x}_proj").any()]
        idle = [x for x in record.config.delta_heads if x not in active]
        heads = f"corrects {', '.join(active) or 'nothing'}"
        if idle:
            heads += f"; {', '.join(idle)} all zero, skipped at inference"
        print(f"{name}: {path}; {heads}; last call: {memory.path}")
