"""ITC against loops over pairs, gradients included.

B batch, Q queue, K = B + Q keys, E embedding width.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from openblip.objectives import alpha_at, clamp_temperature, itc_loss, positive_targets


def unit(count: int, seed: int) -> Tensor:
    values = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return values / values.norm(dim=1, keepdim=True)


def one_way_by_loops(
    query: Tensor, momentum: Tensor, keys: Tensor, ids: Sequence[int], key_ids: Sequence[int], t: Tensor, alpha: float
) -> Tensor:
    """Mean cross-entropy of queries over keys, an entry at a time (ALBEF equations 1, 2 and 6)."""
    losses = []
    for q in range(len(query)):
        similarity = [(query[q] * key).sum() / t for key in keys]
        taught = [float((momentum[q] * key).sum() / t.detach()) for key in keys]
        positives = [float(key_id == ids[q]) for key_id in key_ids]
        loss = torch.zeros(())
        log_sum = torch.stack(similarity).exp().sum().log()
        for k in range(len(keys)):
            soft = math.exp(taught[k]) / sum(math.exp(x) for x in taught)
            target = alpha * soft + (1 - alpha) * positives[k] / sum(positives)
            loss = loss - target * (similarity[k] - log_sum)
        losses.append(loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_queued", [0, 5])
def test_itc_is_what_loops_say_with_its_gradients(alpha: float, num_queued: int) -> None:
    ids = [7, 8, 7, 9]  # pairs 0 and 2 show the same image
    queued_ids = [8, 1, 2, 8, 3][:num_queued]  # the queue holds the image of pair 1 twice
    momentum_image, momentum_text = unit(4, 3), unit(4, 4)
    key_ids = ids + queued_ids
    keys = (
        torch.cat([momentum_image, unit(num_queued, 5)]),
        torch.cat([momentum_text, unit(num_queued, 6)]),
        torch.tensor(key_ids),
    )
    inputs = [unit(4, 1).requires_grad_(), unit(4, 2).requires_grad_(), torch.tensor(0.3, requires_grad=True)]
    image, text, temperature = inputs
    ours = itc_loss(image, text, momentum_image, momentum_text, torch.tensor(ids), keys, temperature, alpha)
    slow = 0.5 * (
        one_way_by_loops(image, momentum_image, keys[1], ids, key_ids, temperature, alpha)
        + one_way_by_loops(text, momentum_text, keys[0], ids, key_ids, temperature, alpha)
    )
    torch.testing.assert_close(ours, slow, atol=1e-5, rtol=1e-5)
    for found, expected in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(slow, inputs), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_every_key_of_the_same_image_is_an_equal_positive() -> None:
    targets = positive_targets(torch.tensor([4, 5]), torch.tensor([4, 5, 4, -1, 5, 5]))
    expected = torch.tensor([[1 / 2, 0, 1 / 2, 0, 0, 0], [0, 1 / 3, 0, 0, 1 / 3, 1 / 3]])
    torch.testing.assert_close(targets, expected)


def test_similarities_stay_float32_under_autocast() -> None:
    """bf16 similarities over a temperature of 0.01 would be off by about one."""
    image, text = unit(8, 1), unit(8, 2)
    keys = (image, text, torch.arange(8))
    arguments = (image, text, image, text, torch.arange(8), keys, torch.tensor(0.01), 0.4)
    exact = itc_loss(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = itc_loss(*arguments)
    torch.testing.assert_close(mixed, exact, atol=0, rtol=0)


def test_no_gradient_reaches_the_targets() -> None:
    momentum_image, momentum_text = unit(3, 3).requires_grad_(), unit(3, 4).requires_grad_()
    keys = (momentum_image.detach(), momentum_text.detach(), torch.arange(3))
    loss = itc_loss(
        unit(3, 1).requires_grad_(), unit(3, 2), momentum_image, momentum_text, torch.arange(3), keys,
        torch.tensor(0.1), 0.4,
    )  # fmt: skip
    loss.backward()
    assert momentum_image.grad is None
    assert momentum_text.grad is None


@pytest.mark.parametrize(
    ("step", "ramp", "expected"),
    [(0, 100, 0.0), (25, 100, 0.1), (100, 100, 0.4), (1000, 100, 0.4), (0, 0, 0.4), (3, 0, 0.4)],
)
def test_alpha_ramps_up_linearly_and_stays(step: int, ramp: int, expected: float) -> None:
    assert alpha_at(step, 0.4, ramp) == pytest.approx(expected)


@pytest.mark.parametrize(("before", "after"), [(0.0001, 0.001), (0.07, 0.07), (3.0, 0.5)])
def test_temperature_is_kept_in_its_bounds_in_place(before: float, after: float) -> None:
    log_temperature = torch.nn.Parameter(torch.tensor(math.log(before)))
    clamp_temperature(log_temperature)
    assert math.exp(log_temperature.item()) == pytest.approx(after, rel=1e-5)
