"""AdamW, Muon where a recipe asks for it, and their learning rates as a function of the step."""

import math
from typing import Any

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


class Optimizers:
    """AdamW and, where there is one, Muon: one object that steps, saves and loads them together."""

    def __init__(self, *members: torch.optim.Optimizer) -> None:
        self.members = members
        self._peaks = [[group["lr"] for group in member.param_groups] for member in members]

    def set_learning_rate(self, share: float) -> None:
        """Give every group `share` of the learning rate that it was made with."""
        for member, peaks in zip(self.members, self._peaks, strict=True):
            for group, peak in zip(member.param_groups, peaks, strict=True):
                group["lr"] = share * peak

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One update of every trained parameter."""
        for member in self.members:
            member.step()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` of equally made optimizers restores."""
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`. ValueError where the optimizers or their parameters differ."""
        for member, part in zip(self.members, state["members"], strict=True):
            member.load_state_dict(part)


def make_optimizers(task: nn.Module, config: TrainingConfig) -> Optimizers:
    """AdamW over what requires gradients; with `muon_learning_rate`, Muon over the weights of linear layers.

    The released code decays every parameter; biases, norms and the temperature are left out here, as usual.
    """
    linear = [module.weight for module in task.modules() if isinstance(module, nn.Linear)]
    muon = [] if config.muon_learning_rate is None else [weight for weight in linear if weight.requires_grad]
    theirs = {id(weight) for weight in muon}
    rest = [p for p in task.parameters() if p.requires_grad and id(p) not in theirs]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    if config.muon_learning_rate is None:
        return Optimizers(adamw)
    # Scaled to the size of AdamW's updates (Liu et al. 2025, section 2.2), so that one decay serves both.
    return Optimizers(
        adamw,
        torch.optim.Muon(
            muon,
            lr=config.muon_learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
    )
