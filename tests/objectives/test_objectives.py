"""The losses against loops, gradients included; the queue against a list that is cut.

B local batch, G joint batch, Q queue, K = B + Q keys, E embedding width.
"""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openblip.errors import ConfigError
from openblip.models.blip import similarity_matrix
from openblip.objectives import (
    EPSILON,
    IGNORE_INDEX,
    EmbeddingQueue,
    alpha_at,
    answer_loss,
    clamp_temperature,
    draw_negatives,
    in_batch_itc_loss,
    itc_loss,
    itm_loss,
    lm_loss,
    negative_weights,
    next_token_labels,
    positive_targets,
    update_average,
)
from tiny_blip import assert_same


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
    assert_same(ours, slow, inputs)


def test_every_key_of_the_same_image_is_an_equal_positive() -> None:
    targets = positive_targets(torch.tensor([4, 5]), torch.tensor([4, 5, 4, -1, 5, 5]))
    expected = torch.tensor([[1 / 2, 0, 1 / 2, 0, 0, 0], [0, 1 / 3, 0, 0, 1 / 3, 1 / 3]])
    torch.testing.assert_close(targets, expected)


def test_similarities_stay_float32_under_autocast() -> None:
    """bf16 similarities over a temperature of 0.01 would be off by about one."""
    image, text, ids = unit(8, 1), unit(8, 2), torch.arange(8)
    arguments = (image, text, image, text, ids, (image, text, ids), torch.tensor(0.01), 0.4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = itc_loss(*arguments)
    torch.testing.assert_close(mixed, itc_loss(*arguments), atol=0, rtol=0)


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


def at_degrees(*degrees: float) -> torch.Tensor:
    """Unit vectors (n, 2) in the plane."""
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_the_query_that_fits_best_counts() -> None:
    images = torch.stack([at_degrees(0, 90), at_degrees(180, 225)])  # (I=2, Q=2, E=2)
    texts = at_degrees(30, 90, 180)
    # 0 and 90 degrees: the nearest of both
    expected = [[math.cos(math.pi / 6), 1.0, 0.0], [math.cos(math.pi * 150 / 180), 0.0, 1.0]]
    found = similarity_matrix(images, texts)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)
    assert float(similarity_matrix(images, at_degrees(270))[1, 0]) == pytest.approx(math.sqrt(0.5))
    # only the best query learns
    images = torch.stack([at_degrees(0, 90)]).requires_grad_()
    similarity_matrix(images, at_degrees(30)).sum().backward()
    assert images.grad is not None
    assert images.grad[0, 0].abs().sum() > 0
    assert images.grad[0, 1].abs().sum() == 0


def test_a_loss_by_hand() -> None:
    """Two pairs, temperature 0.5, no smoothing: -log softmax of 1/0.5 against 0."""
    images = torch.stack([at_degrees(0, 180), at_degrees(90, 90)])
    texts = at_degrees(0, 90)
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
    whole, joint = torch.randn(4, 4), torch.tensor([1, 2, 3, 4])
    first, second, together = (
        in_batch_itc_loss(whole[rows], whole.T[rows], joint[rows], joint, label_smoothing=0.1)
        for rows in (slice(0, 2), slice(2, 4), slice(0, 4))
    )
    torch.testing.assert_close((first + second) / 2, together)


def rows(first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings and ids that say their number."""
    numbers = torch.arange(first, first + count)
    return numbers[:, None].float().expand(-1, 3), -numbers[:, None].float().expand(-1, 3), numbers


@pytest.mark.parametrize("capacity", [1, 4, 6, 10])
@pytest.mark.parametrize("batches", [[4, 4, 4], [3, 3, 3, 3], [1, 2, 5, 3], [25], [2, 25, 2], [6]], ids=str)
def test_the_queue_holds_the_last_rows(capacity: int, batches: Sequence[int]) -> None:
    queue, expected, first = EmbeddingQueue(capacity, 3), [], 0
    for count in batches:
        queue.put(*rows(first, count))
        expected = [*expected, *range(first, first + count)][-capacity:]
        first += count
        images, texts, ids = queue.content()
        assert sorted(ids.tolist()) == expected
        assert torch.equal(images, ids[:, None].float().expand(-1, 3))  # an image stays with its id
        assert torch.equal(texts, -images)


def test_a_queue_of_none_stays_empty_and_a_new_one_offers_no_keys() -> None:
    queue = EmbeddingQueue(0, 3)
    queue.put(*rows(0, 5))
    for each in (queue, EmbeddingQueue(5, 3)):
        assert [part.shape for part in each.content()] == [(0, 3), (0, 3), (0,)]
    with pytest.raises(ConfigError, match="-1 embeddings"):
        EmbeddingQueue(-1, 3)


def test_a_queue_survives_its_state_dict() -> None:
    queue, copy = EmbeddingQueue(4, 3), EmbeddingQueue(4, 3)
    queue.put(*rows(0, 6))
    copy.load_state_dict(queue.state_dict())
    for each in (queue, copy):
        each.put(*rows(6, 1))
    torch.testing.assert_close(queue.content(), copy.content(), atol=0, rtol=0)
    for name, value in EmbeddingQueue(4, 3).state_dict().items():  # as the state of a run is read: in place
        copy.state_dict()[name].copy_(value)
    assert len(copy.content()[0]) == 0
    images, texts, ids = (x.clone() for x in rows(0, 4))
    queue.put(images, texts, ids)
    images.fill_(99)  # what was put is copied
    assert queue.content()[0].max() == 3


def test_the_moving_average_is_exact() -> None:
    """ALBEF section 3.2: m * average + (1 - m) * current, for every parameter."""
    average, current = ([torch.tensor([1.0, -2.0]), torch.tensor(4.0)], [torch.tensor([3.0, 2.0]), torch.tensor(0.0)])
    before = [x.clone() for x in current]
    update_average(average, (torch.nn.Parameter(x) for x in current), 0.75)
    torch.testing.assert_close(average, [torch.tensor([1.5, -1.0]), torch.tensor(3.0)])
    torch.testing.assert_close(current, before, atol=0, rtol=0)
    average = [torch.zeros(1)]
    for _ in range(3000):
        update_average(average, [torch.ones(1)], 0.995)
    assert average[0].item() == pytest.approx(1 - 0.995**3000, abs=1e-5)


def test_itm_is_what_loops_say_with_its_gradients() -> None:
    logits = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels, counted = [1, 0, 1, 0, 0], [True, True, True, False, True]
    losses = [logits[row].exp().sum().log() - logits[row, labels[row]] for row in range(5) if counted[row]]
    slow = torch.stack(losses).mean()
    ours = itm_loss(logits, torch.tensor(labels), torch.tensor(counted))
    assert_same(ours, slow, [logits])


def test_weights_are_softmax_plus_epsilon_and_zero_for_the_same_image() -> None:
    similarity = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, -1.0]], requires_grad=True)
    weights = negative_weights(similarity, torch.tensor([5, 6]), torch.tensor([5, 6, 5]))
    first, second = (sum(math.exp(x) for x in row) for row in similarity.tolist())
    expected = [[0, math.exp(0) / first + EPSILON, 0], [1 / second + EPSILON, 0, math.exp(-1) / second + EPSILON]]
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert not weights.requires_grad
    # an unlikely negative stays possible
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


def test_rows_draw_independently_and_the_generator_decides() -> None:
    found = draws(torch.ones(4, 4), 500)
    assert 0.15 < (found[:, 0] == found[:, 1]).float().mean() < 0.35
    weights = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws(weights, 3), draws(weights, 3))


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
    monkeypatch.setattr(torch, "rand", lambda size, generator, dtype: torch.full((size,), uniform, dtype=dtype))
    weights = torch.tensor([[0.0, 0.1, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1e-4, 0.0], [0.3, 0.0, 0.1, 0.7]])
    index, possible = draw_negatives(weights, torch.Generator())
    assert possible.tolist() == [True, False, True, True]
    assert index.tolist() == ([1, 0, 2, 0] if uniform == 0 else [2, 0, 2, 3])


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
    (found,) = assert_same(ours, slow, [logits])
    assert found[2].abs().max() == 0


def test_labels_by_hand() -> None:
    assert next_token_labels(IDS[:2], MASK[:2]).tolist() == [[3, 4, 5, 6], [3, 4, 7, IGNORE_INDEX]]
    after_prompt = [[IGNORE_INDEX, IGNORE_INDEX, 5, 6], [IGNORE_INDEX, IGNORE_INDEX, 7, IGNORE_INDEX]]
    assert next_token_labels(IDS[:2], MASK[:2], 3).tolist() == after_prompt
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
    (found,) = assert_same(ours, slow, [logits])
    assert found[2, 1:].abs().max() == 0  # padding


def test_answer_loss_by_hand() -> None:
    """Equal scores for each of four words cost log 4 a token; nothing is averaged over tokens."""
    logits = torch.zeros(2, 3, 4)
    labels = torch.tensor([[1, 2, 3], [1, IGNORE_INDEX, IGNORE_INDEX]])
    loss = answer_loss(logits, labels, torch.tensor([0.5, 0.25]), 2, 0.0)
    assert loss.item() == pytest.approx((0.5 * 3 + 0.25 * 1) * math.log(4) / 2)
