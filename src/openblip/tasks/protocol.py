"""What the trainer asks of a task."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class TrainingTask(nn.Module, ABC):
    """A module that holds the model and its objectives. All but `forward` has a default."""

    @abstractmethod
    def forward(self, batch: Any, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Named losses of a batch, scalars with gradients, whose sum is trained on.

        step: number of finished steps. generator: in the same state on every process.
        """

    def after_step(self) -> None:
        """Called once after every optimizer step, whatever the gradient accumulation."""

    def frozen_parts(self) -> Sequence[nn.Module]:
        """Modules of this task that the run takes from elsewhere and leaves as they are.

        No checkpoint of the run holds their weights, except those that require gradients (adapters), and no
        process sends them to another; so weights that move otherwise, as a momentum twin's, must not be here.
        """
        return ()

    def layers_above(self) -> Mapping[str, int]:
        """How far below the end of an encoder a parameter stands, by its name in this task; others are at 0.

        With layer-wise decay d its learning rate is d to this power: for an encoder of L blocks 1 for the
        last, L for the first, L + 1 for the embeddings.
        """
        return {}
