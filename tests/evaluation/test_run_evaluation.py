"""A source walked through: order, batches, what is skipped and where it stops."""

from typing import Any

import pytest

from listed_source import ListSource, numbers, sample
from openblip.data.sample import Reject, Sample
from openblip.errors import ConfigError, SourceError
from openblip.evaluation.run import READ_AT_ONCE, Walked, walk

BROKEN = Sample("bad", "s0", b"no number", (), "list/bad")


def anything(given: Sample) -> None:
    """Every sample will do."""


def walked(source: ListSource, **options: Any) -> tuple[Walked, list[int]]:
    """The pictures' numbers, and the sizes of the batches that were worked on without an error."""
    sizes: list[int] = []

    def work(samples: list[Sample]) -> list[int]:
        found = numbers(given.image for given in samples)
        sizes.append(len(found))
        return found

    found = walk(source, work, label="walking", **({"accept": anything} | options))
    return found, sizes


def test_samples_come_in_order_and_in_batches() -> None:
    count = 2 * READ_AT_ONCE + 5
    found, sizes = walked(ListSource([sample(i) for i in range(count)], per_shard=50))
    assert found.results == list(range(count))
    assert sizes == [READ_AT_ONCE, READ_AT_ONCE, 5]
    assert found.rejects == []
    assert walked(ListSource([sample(i) for i in range(7)]), at_once=3)[1] == [3, 3, 1]


def test_what_cannot_be_used_is_named_and_the_rest_of_its_batch_is_used() -> None:
    def accept(given: Sample) -> None:
        if given.key == "003":
            raise SourceError("no caption")

    samples = [sample(0), "damaged", BROKEN, sample(3), sample(4)]
    index_reject = Reject("s0", "x", "no image")
    source = ListSource(samples, rejects={"s0": [index_reject]})
    found, sizes = walked(source, accept=accept)
    assert found.results == [0, 4]
    assert found.rejects == [
        Reject("s0", "damaged", "damaged"),
        Reject("s0", "bad", "b'no number' is no number"),
        Reject("s0", "003", "no caption"),
        index_reject,
    ]
    assert sizes == [1, 1]  # one by one, after the batch with the bad picture


def test_a_limit_takes_the_first_samples_and_opens_no_further_shard() -> None:
    opened: list[str] = []

    class Noting(ListSource):
        def index(self, shard: str) -> Any:
            opened.append(shard)
            return super().index(shard)

    found, _ = walked(Noting([sample(i) for i in range(9)], per_shard=3), limit=4)
    assert found.results == [0, 1, 2, 3]
    assert opened == ["s0", "s1"]
    assert walked(ListSource([sample(i) for i in range(3)]), limit=99)[0].results == [0, 1, 2]


def test_a_source_without_a_usable_sample_is_an_error_that_says_why() -> None:
    with pytest.raises(
        SourceError, match=r"list has no sample that can be used; s0/a: damaged; s0/b: damaged"
    ):
        walked(ListSource(["a", "b"]))
    with pytest.raises(SourceError, match=r"list has no sample that can be used\."):
        walked(ListSource([]))


def test_errors_that_are_not_a_samples_go_through() -> None:
    def work(samples: list[Sample]) -> list[int]:
        raise ConfigError("no such head")

    with pytest.raises(ConfigError, match="no such head"):
        walk(ListSource([sample(0)]), work, label="walking", accept=anything)
