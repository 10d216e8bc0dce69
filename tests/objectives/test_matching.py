"""ITM against a loop, and the negatives it is given: how often each is drawn, and which never.

B local batch, G joint batch.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openblip import objectives
from openblip.objectives import EPSILON, draw_negatives, itm_loss, negative_weights


def test_itm_is_what_loops_say_with_its_gradients() -> None:
    logits = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels, counted = [1, 0, 1, 0, 0], [True, True, True, False, True]
    losses = []
    for row in range(5):
        if counted[row]:
            losses.append(logits[row].exp().sum().log() - logits[row, labels[row]])
    slow = torch.stack(losses).mean()
    ours = itm_loss(logits, torch.tensor(labels), torch.tensor(counted))
    torch.testing.assert_close(ours, slow)
    found, expected = (torch.autograd.grad(loss, logits)[0] for loss in (ours, slow))
    torch.testing.assert_close(found, expected)


def test_weights_are_softmax_plus_epsilon_and_zero_for_the_same_image() -> None:
    similarity = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, -1.0]], requires_grad=True)
    weights = negative_weights(similarity, torch.tensor([5, 6]), torch.tensor([5, 6, 5]))
    first, second = (sum(math.exp(x) for x in row) for row in similarity.tolist())
    expected = [[0, math.exp(0) / first + EPSILON, 0], [1 / second + EPSILON, 0, math.exp(-1) / second + EPSILON]]
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert not weights.requires_grad


def test_an_unlikely_negative_stays_possible() -> None:
    weights = negative_weights(torch.tensor([[100.0, 50.0, -100.0]]), torch.tensor([1]), torch.tensor([1, 2, 3]))
    assert (weights[0, 1:] >= EPSILON * 0.99).all()


def draws(weights: Tensor, count: int) -> Tensor:
    """(count, B) indices."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([draw_negatives(weights, generator)[0] for _ in range(count)])


def test_negatives_are_drawn_by_their_weights() -> None:
    """Chi-square of each row at p = 0.001; 4 columns, of which one is impossible: 2 degrees of freedom."""
    weights = torch.tensor([[0.0, 0.1, 0.2, 0.7], [0.5, 0.0, 0.3, 0.2], [3.0, 1.0, 0.0, 4.0], [2.0, 2.0, 1.0, 0.0]])
    count = 3000
    found = draws(weights, count)
    for row in range(4):
        observed = torch.bincount(found[:, row], minlength=4).double()
        expected = (weights[row] / weights[row].sum()).double() * count
        assert observed[row] == 0
        possible = expected > 0
        statistic = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
        assert statistic < 13.8


def test_rows_draw_independently() -> None:
    found = draws(torch.ones(4, 4), 500)
    same = (found[:, 0] == found[:, 1]).float().mean()
    assert 0.15 < same < 0.35


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=7), seed=st.integers(0, 10_000))
def test_a_negative_is_never_of_the_same_image(ids: list[int], seed: int) -> None:
    image_ids = torch.tensor(ids)
    generator = torch.Generator().manual_seed(seed)
    similarity = 30 * torch.randn(len(ids), len(ids), generator=generator)
    index, possible = draw_negatives(negative_weights(similarity, image_ids, image_ids), generator)
    assert possible.tolist() == [any(other != own for other in ids) for own in ids]
    assert ((index >= 0) & (index < len(ids))).all()
    assert (image_ids[index][possible] != image_ids[possible]).all()
    assert (index[~possible] == 0).all()


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53, 1.0])
def test_the_ends_of_the_unit_interval_draw_possible_columns(uniform: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        objectives.torch, "rand", lambda size, generator, dtype: torch.full((size,), uniform, dtype=dtype)
    )
    weights = torch.tensor([[0.0, 0.1, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1e-4, 0.0], [0.3, 0.0, 0.1, 0.7]])
    index, possible = draw_negatives(weights, torch.Generator())
    assert possible.tolist() == [True, False, True, True]
    assert index.tolist() == ([1, 0, 2, 0] if uniform == 0 else [2, 0, 2, 3])


def test_the_same_generator_state_draws_the_same() -> None:
    weights = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    first, second = (draw_negatives(weights, torch.Generator().manual_seed(4))[0] for _ in range(2))
    assert torch.equal(first, second)
