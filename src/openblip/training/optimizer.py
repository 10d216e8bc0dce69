"""AdamW, Muon where a recipe asks for it, and their learning rates as a function of the step."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openblip.errors import ConfigError
from openblip.training.config import TrainingConfig


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The learning rate of the update that follows `step` finished ones."""
    if step < config.warmup_steps:
        share = step / config.warmup_steps
        return config.warmup_learning_rate + share * (config.learning_rate - config.warmup_learning_rate)
    if config.schedule == "constant":
        return config.learning_rate
    after = step - config.warmup_steps
    if config.schedule == "step_decay":
        return max(config.learning_rate * config.decay_rate ** (after // config.decay_every), config.min_learning_rate)
    progress = min(1.0, after / max(1, config.steps - config.warmup_steps))
    cosine = (1.0 + math.cos(math.pi * progress)) / 2
    return config.min_learning_rate + cosine * (config.learning_rate - config.min_learning_rate)


def describe_change(step: int, before: TrainingConfig, now: TrainingConfig) -> str | None:
    """What changed settings mean for the schedule of a run that goes on after `step`; None when it is as before."""
    rates = [learning_rate_at(step, before), learning_rate_at(step, now), learning_rate_at(now.steps, now)]
    if before.steps == now.steps and rates[0] == rates[1] and learning_rate_at(now.steps, before) == rates[2]:
        return None
    return (
        f"the {now.schedule} schedule goes on at a learning rate of {rates[1]:.3g} (by the settings before: "
        f"{rates[0]:.3g}) and ends at step {now.steps} with {rates[2]:.3g}"
    )


class Float32Muon(torch.optim.Muon):
    """Muon for trainings in float32: torch's own orthogonalises in bfloat16 always, which a processor without
    instructions for it does twenty times more slowly. Updates always have the size of AdamW's ("match_rms_adamw"), and
    the momentum is always Nesterov's.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if "momentum_buffer" not in self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight.grad)
                buffer = self.state[weight]["momentum_buffer"]
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalised(weight.grad.lerp(buffer, group["momentum"]), group["ns_coefficients"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(weight.shape)))


def orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """The matrix (O, I) with all its singular values brought near 1, by five Newton-Schulz iterations of degree five.

    Source: Muon (Jordan et al. 2024); coefficients: the three of the polynomial.
    """
    is_tall, (a, b, c) = matrix.shape[0] > matrix.shape[1], coefficients
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


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

    def step(self) -> None:
        for member in self.members:
            member.step()

    def state_dict(self) -> dict[str, Any]:
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`, but for the settings of this run. ValueError where optimizers or parameters differ."""
        for member, part in zip(self.members, state["members"], strict=True):
            settings = [{k: v for k, v in group.items() if k != "params"} for group in member.param_groups]
            member.load_state_dict(part)
            for group, values in zip(member.param_groups, settings, strict=True):
                group.update(values)


def make_optimizers(
    task: nn.Module, config: TrainingConfig, layers_above: Mapping[str, int] | None = None
) -> Optimizers:
    """AdamW over what requires gradients; with `muon_learning_rate`, Muon over the weights of linear layers.

    layers_above: as `Task.layers_above` gives it, for `layer_decay`. The released code decays every parameter; biases,
    norms and the temperature are left out here, as usual. Raises ConfigError for a layer-wise decay that would change
    nothing, because no encoder is trained.
    """
    trained = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    decay, depths = config.layer_decay, layers_above or {}
    if decay is not None and not any(depths.get(name) for name in trained):
        raise ConfigError(
            f"training.layer_decay is {decay}, but this task trains no image encoder whose layers it could "
            "slow down: leave it out, or train the encoder."
        )
    scales = {name: 1.0 if decay is None else decay ** depths.get(name, 0) for name in trained}
    linear = {id(module.weight) for module in task.modules() if isinstance(module, nn.Linear)}
    muon = {name for name, p in trained.items() if id(p) in linear} if config.muon_learning_rate else set()

    def groups(names: Iterable[str], rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups of equal learning rate, the fastest first."""
        by_scale: dict[float, list[nn.Parameter]] = {}
        for name in names:
            by_scale.setdefault(scales[name], []).append(trained[name])
        ordered = sorted(by_scale.items(), reverse=True)
        return [{"params": part, "lr": rate * scale, "weight_decay": weight_decay} for scale, part in ordered]

    rest = [name for name in trained if name not in muon]
    matrices = groups([n for n in rest if trained[n].ndim > 1], config.learning_rate, config.weight_decay)
    vectors = groups([n for n in rest if trained[n].ndim <= 1], config.learning_rate, 0.0)
    adamw = torch.optim.AdamW([*matrices, *vectors], betas=(config.beta1, config.beta2), fused=True)
    if config.muon_learning_rate is None:
        return Optimizers(adamw)
    # Scaled to the size of AdamW's updates (Liu et al. 2025, section 2.2), so that one decay serves both.
    linear_weights = groups([n for n in trained if n in muon], config.muon_learning_rate, config.weight_decay)
    muon_class = torch.optim.Muon if config.dtype == "bfloat16" else Float32Muon
    return Optimizers(adamw, muon_class(linear_weights, adjust_lr_fn="match_rms_adamw"))
