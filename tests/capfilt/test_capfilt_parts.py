"""The decoding ahead, the files of a run."""

import io
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from capfilt_world import picture
from PIL import Image

from openblip.capfilt.decode import DecodedSample, decode_samples
from openblip.capfilt.folder import write_atomically, write_text
from openblip.data.sample import Reject, Sample
from openblip.data.transforms import Preprocessing


@dataclass
class MemoryRecord:
    """A record that answers from memory, or with an error."""

    key: str
    answer: bytes | Exception
    reads: list[str] = field(default_factory=list)
    shard: str = "s"

    def read(self) -> Sample:
        self.reads.append(self.key)
        if isinstance(self.answer, Exception):
            raise self.answer
        return Sample(self.key, self.shard, self.answer, ("a dog",), self.key)


PREPARE = Preprocessing(image_size=16)


def test_a_missing_file_is_a_reject_and_order_is_kept() -> None:
    records = [
        MemoryRecord("0", picture(0)),
        MemoryRecord("1", FileNotFoundError("gone")),
        MemoryRecord("2", b"no picture"),
        MemoryRecord("3", picture(3)),
    ]
    found = list(decode_samples(records, PREPARE, PREPARE, num_workers=3, ahead=4))
    assert [entry.key for entry in found] == ["0", "1", "2", "3"]
    assert [isinstance(entry, Reject) for entry in found] == [False, True, True, False]


@pytest.mark.parametrize("error", [ConnectionResetError("peer"), TimeoutError("slow"), OSError(5, "disk")])
def test_failures_of_the_machine_are_no_rejects(error: OSError) -> None:
    """A network outage must not write good samples off: the shard fails and is tried again."""
    records = [MemoryRecord("0", picture(0)), MemoryRecord("1", error)]
    with pytest.raises(type(error)):
        list(decode_samples(records, PREPARE, PREPARE, num_workers=2, ahead=2))


def test_reading_ahead_is_bounded_and_stops() -> None:
    reads: list[str] = []
    records = [MemoryRecord(str(n), picture(n), reads) for n in range(50)]
    entries = decode_samples(records, PREPARE, PREPARE, num_workers=2, ahead=8)
    for _ in range(3):
        next(entries)
    deadline = time.monotonic() + 20
    while len(reads) < 3 + 8 - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # long enough for the threads to read on, if they were allowed to
    assert len(reads) <= 3 + 8
    entries.close()
    assert len(reads) <= 3 + 8
    assert not [t for t in threading.enumerate() if t.name.startswith("capfilt-decode")]


def test_each_model_gets_its_own_size() -> None:
    records = [MemoryRecord("0", picture(0))]
    sample = next(decode_samples(records, PREPARE, Preprocessing(image_size=24), num_workers=1, ahead=1))
    assert isinstance(sample, DecodedSample)
    assert (sample.captioner_pixels.shape, sample.filter_pixels.shape) == ((3, 16, 16), (3, 24, 24))
    image = Image.open(io.BytesIO(picture(0))).convert("RGB")
    np.testing.assert_array_equal(sample.captioner_pixels, PREPARE(image))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"
