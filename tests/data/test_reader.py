"""The ordered pass over a source: rejects, errors of the machine, bounded read-ahead, shares."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from openblip.data.reader import Share, read_source
from openblip.data.sample import Reject, Sample, ShardIndex
from openblip.errors import ImageError, SourceError


@dataclass
class MemoryRecord:
    """A record that answers from memory, or with an error."""

    key: str
    answer: bytes | Exception
    reads: list[str]
    shard: str = "s"

    def read(self) -> Sample:
        self.reads.append(self.key)
        if isinstance(self.answer, Exception):
            raise self.answer
        return Sample(self.key, self.shard, self.answer, ("a dog",), self.key)


@dataclass
class MemorySource:
    """One shard of answers."""

    answers: Sequence[bytes | Exception]
    name: str = "memory"
    reads: list[str] = field(default_factory=list)

    def shards(self) -> list[str]:
        return ["s"]

    def index(self, shard: str) -> ShardIndex:
        records = [MemoryRecord(str(n), answer, self.reads) for n, answer in enumerate(self.answers)]
        return ShardIndex(list(records), [])


def upper(sample: Sample) -> bytes:
    if sample.image == b"bad":
        raise ImageError(f"{sample.key}: no image")
    return sample.image.upper()


def keys(source: MemorySource, **settings: object) -> list[str]:
    entries = read_source(source, upper, **settings)  # type: ignore[arg-type]
    return [entry.key if isinstance(entry, Reject) else entry[0].key for entry in entries]


def test_a_damaged_sample_is_a_reject_and_order_is_kept() -> None:
    source = MemorySource([b"a", FileNotFoundError("gone"), b"bad", SourceError("broken json"), b"e"])
    entries = list(read_source(source, upper, num_workers=3, ahead=4))
    assert keys(source) == ["0", "1", "2", "3", "4"]
    assert [isinstance(entry, Reject) for entry in entries] == [False, True, True, True, False]
    assert entries[0][1] == b"A"
    assert entries[2].reason == "2: no image"


@pytest.mark.parametrize("error", [ConnectionResetError("peer"), TimeoutError("slow"), OSError(5, "disk")])
def test_failures_of_the_machine_are_no_rejects(error: OSError) -> None:
    """A network outage must not write good samples off: the work fails and is tried again."""
    with pytest.raises(type(error)):
        keys(MemorySource([b"a", error]), num_workers=2, ahead=2)


def test_reading_ahead_is_bounded_and_stops() -> None:
    source = MemorySource([b"a"] * 50)
    entries = read_source(source, upper, num_workers=2, ahead=8)
    for _ in range(3):
        next(entries)
    deadline = time.monotonic() + 20
    while len(source.reads) < 3 + 8 - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # long enough for the threads to read on, if they were allowed to
    assert len(source.reads) <= 3 + 8
    entries.close()
    assert len(source.reads) <= 3 + 8
    assert not [t for t in threading.enumerate() if t.name.startswith("openblip-read")]


def test_shares_are_disjoint_and_whole() -> None:
    source = MemorySource([b"a"] * 7)
    shares = [keys(source, share=Share(index, 3)) for index in range(3)]
    assert shares == [["0", "3", "6"], ["1", "4"], ["2", "5"]]
    assert [keys(source, share=Share(index, 3), limit=4) for index in range(3)] == [["0", "3"], ["1"], ["2"]]


def test_what_is_skipped_is_not_read() -> None:
    source = MemorySource([b"a"] * 4)
    assert keys(source, skip=lambda shard, key: key in ("1", "2")) == ["0", "3"]
    assert sorted(source.reads) == ["0", "3"]
