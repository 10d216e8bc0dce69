"""Exact resume: everything that a run needs to continue as if it had not been stopped.

That is everything that changes: weights, momentum model, queue, optimizer and data cursor. Frozen models are loaded
from their source again, and their fingerprint is compared. The random state needs no file: each step seeds its
generators from the run's seed and the step.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from openblip.data.loader import join_cursors
from openblip.distributed import Process, barrier, gather_objects
from openblip.errors import CheckpointError, ConfigError
from openblip.files import atomic_folder, hash_bytes, read_json, write_json
from openblip.tasks.base import Task
from openblip.training.optimizer import Optimizers

NUM_SAMPLED = 4096
"""Values of a frozen tensor that go into its fingerprint."""
TASK, OPTIMIZER, FROZEN, CURSOR = "task.pt", "optimizer.pt", "frozen.json", "cursor.json"


class RunState:
    """Writes and restores the state of a run, and knows which weights never change.

    frozen_names: keys of the task's state within `Task.frozen_parts`, without those that require gradients.
    fingerprint: precision, shape and a hash of evenly spaced values of these, by name. It is taken at construction,
    because later the weights may be divided among processes.

    Raises CheckpointError when processes have loaded different frozen weights.
    """

    def __init__(self, task: Task, samples_per_step: int, process: Process) -> None:
        self.task, self.samples_per_step, self.process = task, samples_per_step, process
        parts = {id(part) for part in task.frozen_parts()}
        modules = task.named_modules(remove_duplicate=False)
        prefixes = tuple(f"{name}." for name, module in modules if id(module) in parts)
        trained = {name for name, part in task.named_parameters(remove_duplicate=False) if part.requires_grad}
        items = task.state_dict().items()
        frozen = {name: value for name, value in items if name.startswith(prefixes) and name not in trained}
        self.frozen_names = frozenset(frozen)
        self.fingerprint = {name: fingerprint(value) for name, value in frozen.items()}
        digests = gather_objects([hash_bytes(repr(sorted(self.fingerprint.items())))])
        different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if different:
            raise CheckpointError(
                f"Processes {', '.join(map(str, different))} hold other frozen weights than process 0: make sure "
                "that all machines load the same files."
            )

    def _changing(self) -> dict[str, Tensor]:
        """The task's state without frozen weights, sharing its memory: weights, momentum model, queue."""
        return {name: value for name, value in self.task.state_dict().items() if name not in self.frozen_names}

    def save(self, folder: Path, optimizers: Optimizers, cursor: dict[str, Any]) -> None:
        """Write weights, momentum model, queue, optimizer and the joint data cursor of all processes, atomically."""
        cursors = gather_objects([cursor])
        if self.process.is_main:
            with atomic_folder(folder) as partial:
                if self.frozen_names:
                    write_json(partial / FROZEN, self.fingerprint)
                joint = {"samples_per_step": self.samples_per_step, "cursor": join_cursors(cursors)}
                write_json(partial / CURSOR, joint)
                for name, content in ((TASK, self._changing()), (OPTIMIZER, optimizers.state_dict())):
                    with (partial / name).open("wb") as file:  # given a path, torch hides why it cannot write
                        torch.save(content, file)
        barrier()

    def load(self, folder: Path, optimizers: Optimizers) -> dict[str, Any]:
        """Restore what `save` wrote and return the data cursor, which serves any process of the run.

        The number of processes may have changed. Raises CheckpointError when a step now has another number of samples,
        or the run was saved with another model, frozen or not, or by version 0.1.
        """
        if not (folder / CURSOR).exists() and any(folder.glob("cursor_*.pt")):
            raise CheckpointError(
                f"{folder} was written by OpenBLIP 0.1, which took samples in another order; it cannot go on here. "
                "Finish it with 0.1, or begin anew.",
                page="train.md#go-on-with-a-training",
            )
        joint = _read(folder / CURSOR)
        if joint.get("samples_per_step") != self.samples_per_step:
            raise CheckpointError(
                f"{folder} was written by a run of {joint.get('samples_per_step')} samples a step, this one has "
                f"{self.samples_per_step}; choose training.batch_size, training.accumulation and the number of "
                "processes so that their product is the same."
            )
        if self.frozen_names and (changes := _changes(_read(folder / FROZEN), self.fingerprint, "not frozen")):
            raise CheckpointError(
                f"{folder} belongs to other frozen weights: {len(changes)} differ, first {changes[0]}. "
                "Resume with the frozen models that the run began with."
            )
        device, state = self.process.device, self._changing()
        try:
            saved = _read(folder / TASK, device)
            shapes, saved_shapes = ({n: tuple(t.shape) for n, t in part.items()} for part in (state, saved))
            if changes := _changes(saved_shapes, shapes, "missing"):
                raise ValueError("; ".join(changes))
            with torch.no_grad():
                for name, tensor in state.items():
                    tensor.copy_(saved[name])
            optimizers.load_state_dict(_read(folder / OPTIMIZER, device))
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder} does not fit this run: {error}") from error
        return cast(dict[str, Any], joint["cursor"])


def fingerprint(tensor: Tensor) -> str:
    """Precision, shape and a hash of up to 2 * NUM_SAMPLED evenly spaced values."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, len(flat) // NUM_SAMPLED)].contiguous().cpu()
    digest = hash_bytes(sample.view(torch.uint8).numpy().tobytes(), 8).hex()
    precision = str(tensor.dtype).removeprefix("torch.")
    return f"{precision} {'x'.join(map(str, tensor.shape))} {digest}"


def _changes(old: Mapping[str, object], new: Mapping[str, object], absent: str) -> list[str]:
    """The differences of two mappings in words, by name."""
    names = sorted({*old, *new})
    return [f"{n} was {old.get(n, absent)}, now {new.get(n, absent)}" for n in names if old.get(n) != new.get(n)]


def _read(file: Path, device: torch.device | None = None) -> dict[str, Any]:
    """The content of a json file, or of one that torch wrote."""
    try:
        if file.suffix == ".json":
            return read_json(file)
        return cast(dict[str, Any], torch.load(file, map_location=device, weights_only=True))
    except (ConfigError, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        problem = str(error) if isinstance(error, ConfigError) else f"{file} cannot be read: {error}"
        raise CheckpointError(f"{problem}. Remove {file.parent.name} to go on from an earlier checkpoint.") from error
