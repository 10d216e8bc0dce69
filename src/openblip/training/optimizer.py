"""AdamW and its learning rate as a function of the step."""

import math

import torch
from torch import nn

from openblip.training.config import TrainingConfig


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The learning rate of the update that follows `step` finished ones."""
    if step < config.warmup_steps:
        share = step / config.warmup_steps
        return config.warmup_learning_rate + share * (config.learning_rate - config.warmup_learning_rate)
    after = step - config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "step_decay":
        decayed = config.learning_rate * config.decay_rate ** (after // config.decay_every)
        return max(decayed, config.min_learning_rate)
    progress = min(1.0, after / max(1, config.steps - config.warmup_steps))
    cosine = (1.0 + math.cos(math.pi * progress)) / 2
    return config.min_learning_rate + cosine * (config.learning_rate - config.min_learning_rate)


def make_optimizer(task: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over what requires gradients.

    The released code decays every parameter; biases, norms and the temperature are left out here, as usual.
    """
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
