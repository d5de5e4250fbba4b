"""One process of a distributed training run, for tests/test_train_adapter.py.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python train_process.py FOLDER "options" KIND...

For each KIND, ``ddp`` or ``fsdp2``: the first step's gradients, then the run; the results go to FOLDER/KIND.pt.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import train_adapter


def sharding(*args, **kwargs):
    """An ``Accelerator`` that shards on CPUs, as accelerate itself does on GPUs alone."""
    accelerator = Accelerator(*args, **kwargs)
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    return accelerator


def gradients(trainer) -> dict[str, torch.Tensor]:
    """Of the trainer's step, whole, by the adapter file's names."""
    trainer.gradients()
    return {
        f"{name}.{leaf}": whole(p.grad)
        for name, module in trainer.memory._delta_mem.attentions.items()
        for leaf, p in module.delta_mem.named_parameters()
        if p.requires_grad
    }


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor().clone() if hasattr(x, "full_tensor") else x.clone()


def main(folder: str, options: str, kinds: list[str]) -> None:
    torch.set_num_threads(1)
    AcceleratorState.destroy_process_group = lambda *args: None  # one group serves every kind
    for kind in kinds:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        train_adapter.Accelerator = sharding if kind == "fsdp2" else Accelerator
        arguments = train_adapter.arguments([*options.split(), "--output", f"{folder}/{kind}"])
        trainer = train_adapter.build(arguments)
        assert type(trainer.model).__name__.startswith("FSDP" if kind == "fsdp2" else "DistributedDataParallel")
        found = gradients(trainer)
        trainer.optimizer.zero_grad()
        trainer.run()
        if trainer.accelerator.is_main_process:
            torch.save(found, Path(folder) / f"{kind}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
