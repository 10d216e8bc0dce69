"""The queue against a list that is cut, and the moving average against its formula."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from openblip.errors import ConfigError
from openblip.objectives import EmbeddingQueue, update_average


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


def test_the_oldest_row_goes_first() -> None:
    queue = EmbeddingQueue(4, 3)
    queue.put(*rows(0, 4))
    queue.put(*rows(4, 3))
    queue.put(*rows(7, 2))
    assert sorted(queue.content()[2].tolist()) == [5, 6, 7, 8]


def test_a_queue_of_none_stays_empty() -> None:
    queue = EmbeddingQueue(0, 3)
    queue.put(*rows(0, 5))
    images, texts, ids = queue.content()
    assert images.shape == texts.shape == (0, 3)
    assert ids.shape == (0,)


def test_a_new_queue_offers_no_keys() -> None:
    assert EmbeddingQueue(5, 3).content()[0].shape == (0, 3)


def test_a_negative_capacity_is_refused() -> None:
    with pytest.raises(ConfigError, match="-1 embeddings"):
        EmbeddingQueue(-1, 3)


def test_a_queue_survives_its_state_dict() -> None:
    queue, copy = EmbeddingQueue(4, 3), EmbeddingQueue(4, 3)
    queue.put(*rows(0, 6))
    copy.load_state_dict(queue.state_dict())
    for each in (queue, copy):
        each.put(*rows(6, 1))
    for ours, theirs in zip(queue.content(), copy.content(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_put_is_copied() -> None:
    queue, (images, texts, ids) = EmbeddingQueue(4, 3), rows(0, 2)
    images = images.clone()
    queue.put(images, texts, ids)
    images.fill_(99)
    assert queue.content()[0].max() == 1


def test_the_moving_average_is_exact() -> None:
    """ALBEF section 3.2: m * average + (1 - m) * current, for every parameter."""
    average, current = ([torch.tensor([1.0, -2.0]), torch.tensor(4.0)], [torch.tensor([3.0, 2.0]), torch.tensor(0.0)])
    before = [x.clone() for x in current]
    update_average(average, (torch.nn.Parameter(x) for x in current), 0.75)
    torch.testing.assert_close(average, [torch.tensor([1.5, -1.0]), torch.tensor(3.0)])
    torch.testing.assert_close(current, before, atol=0, rtol=0)


def test_a_slow_moving_average_arrives_in_float32() -> None:
    average = [torch.zeros(1)]
    for _ in range(3000):
        update_average(average, [torch.ones(1)], 0.995)
    assert average[0].item() == pytest.approx(1 - 0.995**3000, abs=1e-5)
