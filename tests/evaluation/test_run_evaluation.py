"""An evaluation over a source: order, batches, what is skipped and where it stops."""

from collections.abc import Iterator
from typing import Any

import pytest

from listed_source import ListSource, numbers, sample
from openblip.data.reader import read_source
from openblip.data.sample import Located, Reject, Sample, Selection
from openblip.errors import ConfigError, SourceError
from openblip.evaluation.run import SAMPLES_PER_BATCH, EvaluationResults, run_evaluation

BROKEN = Sample("bad", "s0", b"no number", (), "list/bad")


def anything(given: Sample) -> None:
    """Every sample will do."""


def evaluated(source: ListSource, **options: Any) -> tuple[EvaluationResults[int], list[int]]:
    """The images' numbers, and the sizes of the batches that were worked on without an error."""
    sizes: list[int] = []

    def predict(samples: list[Sample]) -> list[int]:
        found = numbers(given.image for given in samples)
        sizes.append(len(found))
        return found

    found = run_evaluation(source, predict, label="testing", **({"check_sample": anything} | options))
    return found, sizes


def test_samples_come_in_order_and_in_batches() -> None:
    count = 2 * SAMPLES_PER_BATCH + 5
    found, sizes = evaluated(ListSource([sample(i) for i in range(count)], per_shard=50))
    assert found.results == list(range(count))
    assert sizes == [SAMPLES_PER_BATCH, SAMPLES_PER_BATCH, 5]
    assert found.rejects == []
    assert evaluated(ListSource([sample(i) for i in range(7)]), samples_per_batch=3)[1] == [3, 3, 1]


def test_what_cannot_be_used_is_named_and_the_rest_of_its_batch_is_used() -> None:
    def check_sample(given: Sample) -> None:
        if given.key == "003":
            raise SourceError("no caption")

    samples = [sample(0), "damaged", BROKEN, sample(3), sample(4)]
    index_reject = Reject("s0", "x", "no image")
    source = ListSource(samples, rejects={"s0": [index_reject]})
    found, sizes = evaluated(source, check_sample=check_sample)
    assert found.results == [0, 4]
    assert found.rejects == [
        Reject("s0", "damaged", "damaged"),
        Reject("s0", "bad", "b'no number' is no number"),
        Reject("s0", "003", "no caption"),
        index_reject,
    ]
    assert sizes == [1, 1]  # one by one, after the batch with the bad image


def test_a_limit_takes_the_first_samples_and_opens_no_further_shard() -> None:
    opened: list[str] = []

    class Noting(ListSource):
        def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
            opened.append(shard)
            return super().read_selected(shard, selection)

    found, _ = evaluated(Noting([sample(i) for i in range(9)], per_shard=3), limit=4)
    assert found.results == [0, 1, 2, 3]
    assert opened == ["s0", "s1"]
    assert evaluated(ListSource([sample(i) for i in range(3)]), limit=99)[0].results == [0, 1, 2]


def test_a_source_without_a_usable_sample_is_an_error_that_says_why() -> None:
    with pytest.raises(SourceError, match=r"list has no sample that can be used; s0/a: damaged; s0/b: damaged"):
        evaluated(ListSource(["a", "b"]))
    with pytest.raises(SourceError, match=r"list has no sample that can be used\."):
        evaluated(ListSource([]))


def test_errors_that_are_not_a_samples_go_through() -> None:
    def predict(samples: list[Sample]) -> list[int]:
        raise ConfigError("no such head")

    with pytest.raises(ConfigError, match="no such head"):
        run_evaluation(ListSource([sample(0)]), predict, label="testing", check_sample=anything)


def test_the_shares_of_all_processes_taken_in_turns_are_the_source() -> None:
    rejects = {f"s{shard}": [Reject(f"s{shard}", "bad", "no image")] for shard in range(2)}
    source = ListSource([sample(0), "gone", *map(sample, range(2, 6))], per_shard=3, rejects=rejects)

    def keys(share: tuple[int, int]) -> list[str]:
        entries = read_source(source, anything, share=share)
        return [entry.key if isinstance(entry, Reject) else entry[0].key for entry in entries]

    shares = [keys((index, 3)) for index in range(3)]
    turns = [share[turn] for turn in range(3) for share in shares if turn < len(share)]
    assert turns == keys((0, 1)) == ["000", "gone", "002", "bad", "003", "004", "005", "bad"]


@pytest.mark.parametrize(
    ("reject", "line"),
    [
        (Reject("s", "a", "broken"), "s/a: broken"),
        (Reject("s", "a", "s/a: broken"), "s/a: broken"),
        (Reject("s", "a", "a: broken"), "s/a: broken"),
        (Reject("", "x/a.jpg", "x/a.jpg: broken"), "x/a.jpg: broken"),
        (Reject("s", "", "cut short"), "s: cut short"),
    ],
)
def test_a_reject_names_its_place_once(reject: Reject, line: str) -> None:
    assert str(reject) == line
