"""Exact resume: everything a run needs to go on as if it had not been stopped.

The random state needs no file: each step seeds its generators from the run's seed and the step.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openblip.errors import CheckpointError
from openblip.training.distributed import Process, wait_for_all
from openblip.training.optimizer import Optimizers

TASK, OPTIMIZER = "task.pt", "optimizer.pt"


def save_state(
    folder: Path, task: nn.Module, optimizers: Optimizers, cursor: dict[str, Any], process: Process
) -> None:
    """Write weights, momentum twin, queue, optimizer and every process's data cursor; rename when whole."""
    partial = folder.with_name(folder.name + ".partial")
    if process.is_main:
        partial.mkdir(parents=True, exist_ok=True)
    wait_for_all(process)
    torch.save(cursor, partial / _cursor_name(process))
    if process.is_main:
        torch.save(task.state_dict(), partial / TASK)
        torch.save(optimizers.state_dict(), partial / OPTIMIZER)
    wait_for_all(process)
    if process.is_main:
        os.replace(partial, folder)
    wait_for_all(process)


def load_state(folder: Path, task: nn.Module, optimizers: Optimizers, process: Process) -> dict[str, Any]:
    """Restore what `save_state` wrote and return this process's data cursor.

    Raises CheckpointError when the run was saved by another number of processes or another model.
    """
    saved = len(list(folder.glob("cursor_*.pt")))
    if saved != process.world_size:
        raise CheckpointError(
            f"{folder} was written by {saved} processes, this run has {process.world_size}; "
            "resume with the same number."
        )
    try:
        task.load_state_dict(_read(folder / TASK, process))
        optimizers.load_state_dict(_read(folder / OPTIMIZER, process))
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} does not fit this run: {error}") from error
    cursor: dict[str, Any] = _read(folder / _cursor_name(process), process)
    return cursor


def _cursor_name(process: Process) -> str:
    return f"cursor_{process.rank:05d}.pt"


def _read(file: Path, process: Process) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(file, map_location=process.device, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}. Remove {file.parent.name} to go on from an earlier checkpoint."
        ) from error
    return content
