"""Steps in bfloat16 with weights that are cast once: close to float32, also computed twice, and without a trace."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openblip.training.sharding import recompute_activations
from openblip.training.trainer import bfloat16_weights
from tasks.tiny_tasks import dialogs, make_blip2, make_task, questions, statements, videos
from tiny_blip import random_batch

PAIRS = random_batch([8, 5, 7], [1, 2, 3])
CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "pretraining": (lambda: make_task("pretraining", dropout=0.0), PAIRS),
    "videos": (lambda: make_task("filtering", dropout=0.0), videos([8, 5], [1, 2], frames=2)),
    "captioning": (lambda: make_task("captioning", dropout=0.0), PAIRS),
    "vqa": (lambda: make_task("vqa", dropout=0.0), questions([5, 4], [[3], [4, 3]])),
    "nlvr": (lambda: make_task("nlvr", dropout=0.0), statements([5, 4], [0, 1])),
    "visdial": (lambda: make_task("visdial", dropout=0.0), dialogs([5, 4], [6, 5, 4, 6])),
    "stage1": (lambda: make_blip2("stage1")[0], PAIRS),
    "stage1 with its image encoder": (lambda: make_blip2("stage1", train_vision=True)[0], PAIRS),
}


def losses_and_gradients(
    task: nn.Module, batch: Any, in_bfloat16: bool, passes: int = 1
) -> tuple[dict[str, float], dict[str, Tensor]]:
    task.train()
    task.zero_grad()
    frozen = [weight for part in task.frozen_parts() for weight in part.parameters()]
    with bfloat16_weights(task, frozen) if in_bfloat16 else nullcontext():
        for _ in range(passes):
            torch.manual_seed(0)
            losses = task(batch, 0, torch.Generator().manual_seed(0))
            sum(losses.values()).backward()
    gradients = {name: weight.grad for name, weight in task.named_parameters() if weight.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, gradients


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_float32_but_for_rounding(name: str) -> None:
    make, batch = CASES[name]
    task = make()
    losses, gradients = losses_and_gradients(task, batch, in_bfloat16=True)
    expected, exact = losses_and_gradients(task, batch, in_bfloat16=False)
    assert losses == pytest.approx(expected, rel=0.03)
    assert losses != expected
    assert gradients.keys() == exact.keys()
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    both = [torch.cat([each[key].flatten() for key in exact]) for each in (gradients, exact)]
    assert torch.cosine_similarity(*both, dim=0) > 0.99
    assert both[0].norm().item() == pytest.approx(both[1].norm().item(), rel=0.05)


def test_one_cast_serves_several_micro_batches() -> None:
    task = make_task("captioning", dropout=0.0)
    _, once = losses_and_gradients(task, PAIRS, in_bfloat16=True)
    once = {name: gradient.clone() for name, gradient in once.items()}
    _, twice = losses_and_gradients(task, PAIRS, in_bfloat16=True, passes=2)
    for name, gradient in once.items():
        torch.testing.assert_close(twice[name], 2 * gradient, rtol=1e-5, atol=0)


def test_what_is_computed_again_has_the_same_weights() -> None:
    results = []
    for recomputed in (False, True):
        task = make_task("pretraining", dropout=0.1)
        if recomputed:
            recompute_activations(task)
        results.append(losses_and_gradients(task, PAIRS, in_bfloat16=True))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        assert torch.equal(results[1][1][name], gradient), name


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_cast_within_the_context_only(fails: bool) -> None:
    module = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("one", "two", "kept")})
    module["two"].weight = module["one"].weight
    module.register_parameter("temperature", nn.Parameter(torch.tensor(0.07)))
    before = dict(module.named_parameters(remove_duplicate=False))
    try:
        with bfloat16_weights(module, module["kept"].parameters()):
            inside = dict(module.named_parameters(remove_duplicate=False))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    in_float32 = {name for name, weight in inside.items() if weight.dtype == torch.float32}
    assert in_float32 == {"temperature", "kept.weight", "kept.bias"}
    assert inside["two.weight"] is inside["one.weight"]
    after = dict(module.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[name] is weight for name, weight in before.items())
