"""Dropout, with fast random numbers on CPUs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 2**16


def dropout(x: Tensor, probability: float) -> Tensor:
    """Zero each element with this probability and scale the rest to keep the expected value.

    On a CPU torch draws from its generator for every element, which took a twentieth of a training step. Here one draw
    of 64 bits decides four elements, so the probability there is a multiple of 1/65536.
    """
    num_dropped = round(probability * LEVELS)
    if x.device.type != "cpu" or not 0 < num_dropped < LEVELS:
        return F.dropout(x, probability)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= num_dropped - LEVELS // 2
    return torch.where(kept, x, 0.0) * (LEVELS / (LEVELS - num_dropped))


class Dropout(nn.Module):
    """`dropout` while training; otherwise nothing."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, kept."""
        return dropout(x, self.probability) if self.training and self.probability else x
