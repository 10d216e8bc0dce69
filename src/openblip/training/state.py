"""Exact resume: everything a run needs to go on as if it had not been stopped.

That is everything that changes. Frozen models come from their source again; their fingerprint is kept.
The random state needs no file: each step seeds its generators from the run's seed and the step.
"""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openblip.distributed import Process, barrier
from openblip.errors import CheckpointError
from openblip.tasks.protocol import TrainingTask
from openblip.training.frozen import FrozenParts
from openblip.training.optimizer import Optimizers

TASK, OPTIMIZER, FROZEN = "task.pt", "optimizer.pt", "frozen.json"


def save_state(
    folder: Path,
    task: TrainingTask,
    frozen: FrozenParts,
    optimizers: Optimizers,
    cursor: dict[str, Any],
    process: Process,
) -> None:
    """Write weights, momentum twin, queue, optimizer and every process's data cursor; rename when whole."""
    partial = folder.with_name(folder.name + ".partial")
    if process.is_main:
        partial.mkdir(parents=True, exist_ok=True)
    barrier()
    torch.save(cursor, partial / _cursor_name(process))
    if process.is_main:
        if frozen.names:
            (partial / FROZEN).write_text(json.dumps(frozen.fingerprint, indent=1) + "\n", encoding="utf-8")
        torch.save(frozen.changing_state(task), partial / TASK)
        torch.save(optimizers.state_dict(), partial / OPTIMIZER)
    barrier()
    if process.is_main:
        os.replace(partial, folder)
    barrier()


def load_state(
    folder: Path, task: TrainingTask, frozen: FrozenParts, optimizers: Optimizers, process: Process
) -> dict[str, Any]:
    """Restore what `save_state` wrote and return this process's data cursor.

    Raises CheckpointError when the run was saved by another number of processes, or with another model,
    frozen or not.
    """
    saved = len(list(folder.glob("cursor_*.pt")))
    if saved != process.world_size:
        raise CheckpointError(
            f"{folder} was written by {saved} processes, this run has {process.world_size}; "
            "resume with the same number."
        )
    if frozen.names:
        frozen.check_as_saved(_read_json(folder / FROZEN), str(folder))
    try:
        _restore(frozen.changing_state(task), _read(folder / TASK, process))
        optimizers.load_state_dict(_read(folder / OPTIMIZER, process))
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} does not fit this run: {error}") from error
    cursor: dict[str, Any] = _read(folder / _cursor_name(process), process)
    return cursor


@torch.no_grad()
def _restore(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved values over a task's own. ValueError, before the first, unless names and shapes agree."""
    shapes, saved_shapes = ({n: tuple(t.shape) for n, t in part.items()} for part in (own, saved))
    different = [
        f"{name} was {saved_shapes.get(name, 'missing')}, now {shapes.get(name, 'missing')}"
        for name in sorted({*shapes, *saved_shapes})
        if shapes.get(name) != saved_shapes.get(name)
    ]
    if different:
        raise ValueError("; ".join(different))
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def _cursor_name(process: Process) -> str:
    return f"cursor_{process.rank:05d}.pt"


def _read(file: Path, process: Process) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(file, map_location=process.device, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise _unreadable(file, error) from error
    return content


def _read_json(file: Path) -> dict[str, str]:
    try:
        content: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    return content


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file} cannot be read: {error}. Remove {file.parent.name} to go on from an earlier checkpoint."
    )
