"""Several processes in one run: what is trained is on each of them, what is frozen can be divided.

DDP replicates the trained weights and averages their gradients. FSDP2 divides the blocks of frozen models of
transformers: each process keeps its share and gathers a block when it computes it. FSDP is given frozen
weights only. Adapters within the blocks belong to DDP like everything that is trained, so optimizer, clipping
and checkpoints meet plain tensors. Embeddings and output layer of a divided model stay whole on every
process: they are used outside of its forward pass, and often are one tensor. docs/architecture.md has their
share.
"""

from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from openblip.distributed import Process
from openblip.errors import ConfigError
from openblip.tasks.protocol import TrainingTask
from openblip.training.blocks import find_stacks
from openblip.training.frozen import FrozenParts


def shard_frozen(parts: Sequence[nn.Module], process: Process) -> None:
    """Divide the frozen weights of the blocks within `parts` among the processes; one process keeps them.

    Blocks move to the process's device one by one, so the whole need not fit there. ConfigError where there
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
        # The model itself divides nothing more; it lets the next block be gathered while one is computed.
        fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()) - divided)


def gather_frozen(parts: Sequence[nn.Module], process: Process) -> None:
    """Give the main process the whole of what `shard_frozen` divided, on the CPU: for writing the model."""
    for part in parts:
        for module in part.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    whole = parameter.full_tensor()  # every process takes part
                    if process.is_main:
                        setattr(module, name, nn.Parameter(whole.cpu(), requires_grad=False))


def replicate(task: TrainingTask, frozen: FrozenParts, process: Process) -> nn.Module:
    """The task with its gradients averaged over all processes, which begin with the main one's weights.

    Frozen parts are not sent around: every process has them from their source.
    """
    if process.world_size == 1:
        return task
    if frozen.names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, sorted(frozen.names))
    # The buffers are the queue, which every process fills alike: sending it at each step would be waste.
    return DistributedDataParallel(task, broadcast_buffers=False)
