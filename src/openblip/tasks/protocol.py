"""What the trainer asks of a task."""

from typing import Protocol

import torch
from torch import Tensor

from openblip.data.readings import AnyBatch


class TrainingTask(Protocol):
    """A module that holds the model and its objectives.

    Called with a batch, the number of finished steps and a generator in the same state on every process,
    it returns named losses, scalars with gradients; their sum is trained on.
    """

    def __call__(self, batch: AnyBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]: ...

    def after_step(self) -> None:
        """Called once after every optimizer step, whatever the gradient accumulation."""
