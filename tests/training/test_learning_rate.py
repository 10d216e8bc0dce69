"""Learning rates worked out by hand, and which weights decay."""

import pytest
import torch
from torch import nn

from openblip.errors import ConfigError
from openblip.training.config import TrainingConfig
from openblip.training.optimizer import Float32Muon, learning_rate_at, make_optimizers


def config(**changes: object) -> TrainingConfig:
    return TrainingConfig(**{"steps": 1000, "batch_size": 1, "learning_rate": 1e-3, **changes})  # type: ignore[arg-type]


def test_schedules() -> None:
    """Warm-up rises linearly. At a third of the cosine's way it is 1/2, so 3/4 is left. Step decay multiplies after
    each interval, counted from the end of the warm-up."""
    warmup = {"warmup_steps": 100, "warmup_learning_rate": 1e-5}
    steps = {"schedule": "step_decay", "decay_rate": 0.5, "decay_every": 10, "warmup_steps": 20}
    for settings, expected in (
        (
            config(schedule="constant", **warmup),
            {0: 1e-5, 50: 0.000505, 99: 0.0009901, 100: 1e-3, 101: 1e-3, 10_000: 1e-3},
        ),
        (
            config(warmup_steps=100, min_learning_rate=1e-4),
            {100: 1e-3, 400: 0.75e-3 + 0.25e-4, 550: 0.5e-3 + 0.5e-4, 1000: 1e-4, 1500: 1e-4},
        ),
        (
            config(schedule="step_decay", decay_rate=0.9, decay_every=100),
            {0: 1e-3, 99: 1e-3, 100: 9e-4, 250: 8.1e-4, 999: 3.87420489e-4},
        ),
        (config(**steps, min_learning_rate=2e-4), {29: 1e-3, 30: 5e-4, 40: 2.5e-4, 50: 2e-4, 500: 2e-4}),
    ):
        assert {step: learning_rate_at(step, settings) for step in expected} == pytest.approx(expected)


def test_only_matrices_decay_and_frozen_weights_stay() -> None:
    """Without gradients, an AdamW update is the decay alone."""
    module = nn.ModuleDict({"linear": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "frozen": nn.Linear(2, 2)})
    module["frozen"].requires_grad_(False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
    optimizers = make_optimizers(module, config(learning_rate=0.1, weight_decay=0.5))
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    values = {name: parameter.flatten()[0].item() for name, parameter in module.named_parameters()}
    assert values.pop("linear.weight") == pytest.approx(0.95)
    assert set(values.values()) == {1.0}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_muon_turns_the_gradient_of_linear_layers_orthogonal(dtype: str) -> None:
    """Their update has near equal singular values and the size of AdamW's; AdamW keeps the rest."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"linear": nn.Linear(128, 64), "embedding": nn.Embedding(4, 8)})
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    settings = config(learning_rate=1e-3, muon_learning_rate=0.1, weight_decay=0.0, dtype=dtype)
    optimizers = make_optimizers(module, settings)
    optimizers.set_learning_rate(0.5)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers.step()
    steps = {name: before[name] - parameter.detach() for name, parameter in module.named_parameters()}
    singular_values = torch.linalg.svdvals(steps["linear.weight"])
    assert singular_values.min() / singular_values.max() > 0.5
    gradient = module["linear"].weight.grad
    assert gradient is not None
    assert torch.linalg.svdvals(gradient).min() < 0.4 * torch.linalg.svdvals(gradient).max()
    # 0.2 is the usual size of an AdamW update (Liu et al. 2025, equation 4)
    assert steps["linear.weight"].square().mean().sqrt() == pytest.approx(0.5 * 0.1 * 0.2, rel=0.2)
    for name in ("linear.bias", "embedding.weight"):  # the first update of Adam is the sign of the gradient
        torch.testing.assert_close(steps[name].abs(), torch.full_like(steps[name], 0.5 * 1e-3), rtol=1e-3, atol=0)


def test_muon_in_float32_is_torchs_without_its_rounding() -> None:
    """In the second step momentum and decay count too, and the state of one is that of the other."""
    torch.manual_seed(0)
    gradients = [[torch.randn(24, 40), torch.randn(40, 24)] for _ in range(2)]
    settings = [{"lr": 0.1, "weight_decay": 0.05, "adjust_lr_fn": "match_rms_adamw"}] * 2
    ours, torchs = ([nn.Parameter(torch.ones_like(g)) for g in gradients[0]] for _ in range(2))
    optimizers = [
        each(w, **s) for each, w, s in zip((Float32Muon, torch.optim.Muon), (ours, torchs), settings, strict=True)
    ]
    for step in gradients:
        for weights, optimizer in zip((ours, torchs), optimizers, strict=True):
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
    for found, expected in zip(ours, torchs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
        assert (found - 1).abs().max() > 0.02
    optimizers[0].load_state_dict(optimizers[1].state_dict())
    assert set(optimizers[0].state[ours[0]]) == {"momentum_buffer"}


RATES = ("learning_rate", "muon_learning_rate")
COUNTS = ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every")


@pytest.mark.parametrize("name", [*RATES, *COUNTS, "clip_norm", "layer_decay"])
def test_rates_counts_and_norms_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"training.{name} is 0"):
        config(**{name: 0})


DEPTHS = {"patches.weight": 3, "blocks.0.weight": 2, "blocks.0.bias": 2, "blocks.1.weight": 1}


def encoder() -> nn.Module:
    """Two blocks above patch embeddings, and a head that stands outside of the encoder."""
    parts = {"patches": nn.Linear(3, 3, bias=False), "head": nn.Linear(3, 3)}
    blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3, bias=False)])
    return nn.ModuleDict({**parts, "blocks": blocks})


@pytest.mark.parametrize("muon", [None, 1e-3])
def test_layer_decay_scales_the_updates_at_every_step_of_the_schedule(muon: float | None) -> None:
    """With gradients that never change, an update of Adam is the learning rate in size; LAVIS's rates forget
    the decay as soon as its schedule sets them."""
    torch.manual_seed(0)
    module = encoder()
    for parameter in module.parameters():
        nn.init.zeros_(parameter)  # so that the smallest updates are not rounded
    decays = {"layer_decay": 0.5, "weight_decay": 0.0}
    settings = config(steps=10, warmup_steps=2, min_learning_rate=1e-4, muon_learning_rate=muon, **decays)
    optimizers = make_optimizers(module, settings, DEPTHS)
    gradient = {name: torch.randn_like(parameter) for name, parameter in module.named_parameters()}
    for step in range(10):
        before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        rate = learning_rate_at(step, settings)
        optimizers.set_learning_rate(rate / settings.learning_rate)
        for name, parameter in module.named_parameters():
            parameter.grad = gradient[name].clone()
        optimizers.step()
        for name, parameter in module.named_parameters():
            size = (before[name] - parameter.detach()).norm() / parameter.numel() ** 0.5
            scale = 0.5 ** DEPTHS.get(name, 0)
            by_muon = muon is not None and name.endswith("weight")
            usual = 0.2 if by_muon else 1.0  # Muon's updates are 0.2 in size, up to its few iterations
            assert size.item() == pytest.approx(rate * scale * usual, rel=0.25 if by_muon else 1e-3), name


def test_layer_decay_keeps_biases_from_weight_decay() -> None:
    module = encoder()
    optimizers = make_optimizers(module, config(layer_decay=0.5, weight_decay=0.1), DEPTHS)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizers.members[0].param_groups
        for parameter in group["params"]
    }
    assert found == {
        "patches.weight": (1.25e-4, 0.1),
        "blocks.0.weight": (2.5e-4, 0.1),
        "blocks.0.bias": (2.5e-4, 0.0),
        "blocks.1.weight": (5e-4, 0.1),
        "head.weight": (1e-3, 0.1),
        "head.bias": (1e-3, 0.0),
    }


def test_a_layer_decay_without_a_trained_encoder_is_refused() -> None:
    """Instead of having no effect."""
    module = encoder()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    with pytest.raises(ConfigError, match=r"training\.layer_decay is 0\.9, but this task trains no image"):
        make_optimizers(module, config(layer_decay=0.9), DEPTHS)


@pytest.mark.parametrize("decay", [-0.5, 1.5])
def test_a_layer_decay_must_be_a_share(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"training\.layer_decay"):
        config(layer_decay=decay)
