"""ITC of BLIP-2: the best query counts, in-batch keys, all texts of a picture are right; by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from openblip.models.blip import similarity_matrix
from openblip.objectives import in_batch_itc_loss


def unit(*degrees: float) -> torch.Tensor:
    """Unit vectors (n, 2) in the plane."""
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_the_query_that_fits_best_counts() -> None:
    images = torch.stack([unit(0, 90), unit(180, 225)])  # (I=2, Q=2, E=2)
    texts = unit(30, 90, 180)
    half = math.sqrt(0.5)
    expected = [
        [math.cos(math.pi / 6), 1.0, 0.0],  # 0 and 90 degrees: the nearest of both
        [math.cos(math.pi * 150 / 180), 0.0, 1.0],
    ]
    found = similarity_matrix(images, texts)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)
    assert float(similarity_matrix(images, unit(270))[1, 0]) == pytest.approx(half)


def test_only_the_best_query_learns() -> None:
    images = torch.stack([unit(0, 90)]).requires_grad_()
    similarity_matrix(images, unit(30)).sum().backward()
    assert images.grad is not None
    assert images.grad[0, 0].abs().sum() > 0
    assert images.grad[0, 1].abs().sum() == 0


def test_a_loss_by_hand() -> None:
    """Two pairs, temperature 0.5, no smoothing: -log softmax of 1/0.5 against 0."""
    images = torch.stack([unit(0, 180), unit(90, 90)])
    texts = unit(0, 90)
    scores = similarity_matrix(images, texts) / 0.5
    torch.testing.assert_close(scores, torch.tensor([[2.0, 0.0], [0.0, 2.0]]), atol=1e-6, rtol=0)
    ids = torch.tensor([5, 6])
    loss = in_batch_itc_loss(scores, scores.T, ids, ids, label_smoothing=0.0)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-2.0)), abs=1e-6)


def test_label_smoothing_is_cross_entropys_when_pictures_are_distinct() -> None:
    torch.manual_seed(0)
    image_to_text, text_to_image = torch.randn(5, 5), torch.randn(5, 5)
    ids, places = torch.arange(5) + 10, torch.arange(5)
    expected = sum(F.cross_entropy(scores, places, label_smoothing=0.1) for scores in (image_to_text, text_to_image))
    found = in_batch_itc_loss(image_to_text, text_to_image, ids, ids, label_smoothing=0.1)
    torch.testing.assert_close(found, expected / 2)


def test_captions_of_one_picture_are_never_negatives() -> None:
    """Both texts of a picture are right alike: the best loss is that of equal shares, whatever its scores."""
    ids = torch.tensor([1, 1, 2])
    scores = torch.tensor([[9.0, 9.0, -9.0], [9.0, 9.0, -9.0], [-9.0, -9.0, 9.0]])
    loss = in_batch_itc_loss(scores, scores.T, ids, ids, label_smoothing=0.0)
    assert float(loss) == pytest.approx(2 * math.log(2) / 3, abs=1e-5)


def test_rows_of_a_part_are_told_from_the_joint_batch() -> None:
    """One process's rows against the keys of all: the second of two, whose ids stand at the end."""
    torch.manual_seed(1)
    whole = torch.randn(4, 4)
    joint = torch.tensor([1, 2, 3, 4])
    losses = [
        in_batch_itc_loss(whole[rows], whole.T[rows], joint[rows], joint, label_smoothing=0.1)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    together = in_batch_itc_loss(whole, whole.T, joint, joint, label_smoothing=0.1)
    torch.testing.assert_close(torch.stack(losses).mean(), together)
