"""Less memory: frozen models are divided among the processes, and activations are computed again.

The trainer replicates trained weights with DDP, which averages their gradients. FSDP2 divides the blocks of frozen
models of transformers: each process keeps its share and gathers a block when it computes it. Adapters within the blocks
belong to DDP like everything that is trained, so optimizer, clipping and checkpoints meet plain tensors. Embeddings and
output layer of a divided model stay whole on every process: they are used outside of its forward pass, and often are
one tensor. docs/architecture.md says how much of a model they are.
"""

from collections.abc import Sequence
from functools import partial, update_wrapper
from typing import NamedTuple

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from openblip.distributed import Process
from openblip.errors import ConfigError


class Stack(NamedTuple):
    """A model of transformers, or of peft around one, with its transformer blocks."""

    model: nn.Module
    blocks: list[nn.Module]


def find_stacks(module: nn.Module) -> list[Stack]:
    """The outermost models of transformers in a module, with their blocks.

    transformers names the classes of blocks in `_no_split_modules`, and of embeddings; blocks stand in a ModuleList.
    """
    kinds = getattr(module, "_no_split_modules", None)
    if not kinds:
        return [stack for child in module.children() for stack in find_stacks(child)]
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return [Stack(module, [block for part in lists for block in part if type(block).__name__ in kinds])]


def recompute_activations(task: nn.Module) -> None:
    """Keep only the inputs of every transformer block for the backward pass, which computes the block again.

    Our own transformers have a switch for it. That of transformers' models does nothing in eval mode, in which frozen
    language models stay, so their blocks are wrapped here. Only `forward` is, so that the hooks around a block, such as
    FSDP's, run once.
    """
    for module in task.modules():
        if isinstance(getattr(module, "activation_checkpointing", None), bool):
            module.activation_checkpointing = True  # type: ignore[assignment]  # torch types all as modules
    for stack in find_stacks(task):
        for block in stack.blocks:
            recomputed = partial(checkpoint, block.forward, use_reentrant=False)
            block.forward = update_wrapper(recomputed, block.forward)


def shard_frozen(parts: Sequence[nn.Module], process: Process) -> None:
    """Divide the frozen weights of the blocks in `parts` among the processes; with one process, keep them.

    Blocks move to the process's device one by one, so the whole model need not fit there. Raises ConfigError when there
    is nothing to divide.
    """
    stacks = [stack for part in parts for stack in find_stacks(part)]
    if not any(stack.blocks for stack in stacks):
        raise ConfigError(
            "training.shard_frozen divides frozen models of transformers, and this task has none whose "
            "blocks are known: leave it out."
        )
    if process.world_size == 1:
        return
    mesh = init_device_mesh(process.device.type, (process.world_size,))
    for model, blocks in stacks:
        divided: set[nn.Parameter] = set()
        for block in blocks:
            trained = {parameter for parameter in block.parameters() if parameter.requires_grad}
            fully_shard(block, mesh=mesh, ignored_params=trained)
            divided.update(set(block.parameters()) - trained)
        # The model itself divides nothing more; it has the next block gathered while one is computed.
        fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()) - divided)


def gather_frozen(parts: Sequence[nn.Module], process: Process) -> None:
    """Gather on the main process, on its CPU, what `shard_frozen` divided: for writing the model."""
    for part in parts:
        for module in part.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    whole = parameter.full_tensor()  # every process takes part
                    if process.is_main:
                        setattr(module, name, nn.Parameter(whole.cpu(), requires_grad=False))
