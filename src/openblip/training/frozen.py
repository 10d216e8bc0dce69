"""Frozen parts of a task: which of its weights never change, and how they are recognised at a resume."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from openblip.distributed import Process, gather_objects
from openblip.errors import CheckpointError
from openblip.tasks.protocol import TrainingTask

SAMPLED = 4096


class FrozenParts:
    """Names and fingerprint of what is frozen for good.

    names: of the task's state, within `TrainingTask.frozen_parts`, without what requires gradients there.
    fingerprint: precision, shape and a hash of evenly spaced values, by name. It is taken at once: later the
    weights may be divided among processes.
    """

    def __init__(self, task: TrainingTask) -> None:
        parts = {id(part) for part in task.frozen_parts()}
        modules = task.named_modules(remove_duplicate=False)
        prefixes = tuple(f"{name}." for name, module in modules if id(module) in parts)
        parameters = task.named_parameters(remove_duplicate=False)
        trained = {name for name, parameter in parameters if parameter.requires_grad}
        state = {
            name: value
            for name, value in task.state_dict().items()
            if name.startswith(prefixes) and name not in trained
        }
        self.names = frozenset(state)
        self.fingerprint = {name: fingerprint(value) for name, value in state.items()}

    def changing_state(self, task: TrainingTask) -> dict[str, Tensor]:
        """All of the task's state but the frozen, sharing its memory: weights, momentum twin, queue."""
        return {name: value for name, value in task.state_dict().items() if name not in self.names}

    def check_equal_everywhere(self, process: Process) -> None:
        """CheckpointError where processes have loaded different frozen parts."""
        digest = hashlib.blake2b(repr(sorted(self.fingerprint.items())).encode()).hexdigest()
        others = gather_objects([digest])
        different = [rank for rank, other in enumerate(others) if other != others[0]]
        if different:
            raise CheckpointError(
                f"Processes {', '.join(map(str, different))} hold other frozen weights than process 0: do "
                "all machines load the same files?"
            )

    def check_as_saved(self, saved: Mapping[str, str], origin: str) -> None:
        """CheckpointError unless the fingerprint is the one that `origin` was saved with."""
        changes = [
            f"{name} was {saved.get(name, 'not frozen')}, now {self.fingerprint.get(name, 'not frozen')}"
            for name in sorted({*saved, *self.fingerprint})
            if saved.get(name) != self.fingerprint.get(name)
        ]
        if changes:
            raise CheckpointError(
                f"{origin} belongs to other frozen weights: {len(changes)} differ, first {changes[0]}. "
                "Resume with the frozen models that the run began with."
            )


def fingerprint(tensor: Tensor) -> str:
    """Precision, shape and a hash of up to 2 * SAMPLED evenly spaced values."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, len(flat) // SAMPLED)].contiguous().cpu()
    digest = hashlib.blake2b(sample.view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()
    precision = str(tensor.dtype).removeprefix("torch.")
    return f"{precision} {'x'.join(map(str, tensor.shape))} {digest}"
