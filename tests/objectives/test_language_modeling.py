"""LM against a loop over tokens, gradients included."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.objectives import IGNORE_INDEX, answer_loss, lm_loss, next_token_labels


def lm_by_loops(logits: Tensor, ids: Tensor, mask: Tensor, prompt_length: int, smoothing: float) -> Tensor:
    """Each real token after the prompt, predicted from those before it; 0 when there is none."""
    losses = []
    for row in range(ids.shape[0]):
        for position in range(max(prompt_length, 1), ids.shape[1]):
            if not mask[row, position]:
                continue
            scores = logits[row, position - 1]
            log_probabilities = [score - scores.exp().sum().log() for score in scores]
            target = [smoothing / len(scores)] * len(scores)
            target[int(ids[row, position])] += 1 - smoothing
            losses.append(-sum(t * lp for t, lp in zip(target, log_probabilities, strict=True)))
    return torch.stack(losses).mean() if losses else 0.0 * logits.sum()


IDS = torch.tensor([[9, 3, 4, 5, 6], [9, 3, 4, 7, 0], [0, 0, 0, 0, 0]])  # the last row is all padding
MASK = torch.tensor([[True] * 5, [True] * 4 + [False], [False] * 5])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("prompt_length", [1, 3])
def test_lm_is_what_loops_say_with_its_gradients(prompt_length: int, smoothing: float) -> None:
    logits = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours = lm_loss(logits[:, :-1], next_token_labels(IDS, MASK, prompt_length), smoothing)
    slow = lm_by_loops(logits, IDS, MASK, prompt_length, smoothing)
    torch.testing.assert_close(ours, slow, atol=1e-6, rtol=1e-5)
    found, expected = (torch.autograd.grad(loss, logits)[0] for loss in (ours, slow))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert found[2].abs().max() == 0


def test_labels_by_hand() -> None:
    assert next_token_labels(IDS[:2], MASK[:2]).tolist() == [[3, 4, 5, 6], [3, 4, 7, IGNORE_INDEX]]
    assert next_token_labels(IDS[:2], MASK[:2], 3).tolist() == [
        [IGNORE_INDEX, IGNORE_INDEX, 5, 6],
        [IGNORE_INDEX, IGNORE_INDEX, 7, IGNORE_INDEX],
    ]
    assert IDS[0].tolist() == [9, 3, 4, 5, 6]  # the input stays


def test_a_batch_without_a_token_to_predict_is_zero_with_zero_gradients() -> None:
    logits = torch.randn(1, 4, 10).requires_grad_()
    loss = lm_loss(logits, next_token_labels(IDS[2:], MASK[2:]), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_bfloat16_logits_are_compared_in_float32() -> None:
    logits = torch.randn(1, 4, 3000, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(lm_loss(logits, labels, 0.1), lm_loss(logits.float(), labels, 0.1), atol=0, rtol=0)


def answers_by_loops(logits: Tensor, labels: Tensor, weights: Tensor, num_questions: int, smoothing: float) -> Tensor:
    """Token by token: the sum over an answer, times its weight; the sum of these over the questions."""
    total = torch.zeros(())
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1]):
            if labels[row, position] != IGNORE_INDEX:
                loss = F.cross_entropy(logits[row, position], labels[row, position], label_smoothing=smoothing)
                total = total + weights[row] * loss
    return total / num_questions


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_answers_are_what_loops_say_with_their_gradients(smoothing: float) -> None:
    logits = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[3, 4, 5, 6], [3, 4, 7, IGNORE_INDEX], [8, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]])
    weights = torch.tensor([0.7, 0.3, 0.2])  # two answers of a question, one of another
    ours = answer_loss(logits, labels, weights, 2, smoothing)
    slow = answers_by_loops(logits, labels, weights, 2, smoothing)
    torch.testing.assert_close(ours, slow, atol=1e-6, rtol=1e-5)
    found, expected = (torch.autograd.grad(loss, logits)[0] for loss in (ours, slow))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert found[2, 1:].abs().max() == 0  # padding


def test_answer_loss_by_hand() -> None:
    """Equal scores for each of four words cost log 4 a token; nothing is averaged over tokens."""
    logits = torch.zeros(2, 3, 4)
    labels = torch.tensor([[1, 2, 3], [1, IGNORE_INDEX, IGNORE_INDEX]])
    loss = answer_loss(logits, labels, torch.tensor([0.5, 0.25]), 2, 0.0)
    assert loss.item() == pytest.approx((0.5 * 3 + 0.25 * 1) * math.log(4) / 2)
