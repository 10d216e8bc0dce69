"""What a source holds, counted: every shard is indexed, some samples are read and decoded."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from openblip.data.images import read_image
from openblip.data.sample import Described, Record, Reject, Sample, Source
from openblip.data.task_counts import TaskCounts
from openblip.errors import ImageError, MissingExtraError, SourceError


@dataclass
class Inspection:
    """Counts over a source. What is said of captions and pictures is of the `num_read` samples that were
    read. `tasks` are counted over `num_counted` samples: all whose texts the index knows, and of the others
    those that were read.
    """

    described: Mapping[str, object] = field(default_factory=dict)
    num_shards: int = 0
    num_samples: int = 0
    num_read: int = 0
    num_counted: int = 0
    num_pairs: int = 0
    num_clips: int = 0
    rejects: list[Reject] = field(default_factory=list)
    missing_files: list[str] = field(default_factory=list)
    captions_per_image: Counter[int] = field(default_factory=Counter)
    caption_words: list[int] = field(default_factory=list)
    image_sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    tasks: TaskCounts = field(default_factory=TaskCounts)
    examples: list[Sample] = field(default_factory=list)

    def count_tasks(self, info: Mapping[str, Any]) -> None:
        self.tasks.add(info)
        self.num_counted += 1

    def add(self, sample: Sample, num_examples: int) -> None:
        """Counts a sample; raises `ImageError` when what it shows cannot be decoded."""
        name = f"{sample.shard}/{sample.key}"
        if is_clip(sample.image):
            image = _first_frame(sample.image, name)
            self.num_clips += 1
        else:
            image = read_image(sample.image, name=name)
        self.image_sizes[image.size] += 1
        if sample.second_image is not None:
            self.num_pairs += 1
            self.image_sizes[read_image(sample.second_image, name=f"{name} (right)").size] += 1
        self.captions_per_image[len(sample.captions)] += 1
        self.caption_words += [len(caption.split()) for caption in sample.captions]
        if len(self.examples) < num_examples:
            self.examples.append(sample)


def inspect_source(
    source: Source,
    *,
    num_read: int | None = 200,
    num_examples: int = 5,
    on_shard: Callable[[], None] = lambda: None,
) -> Inspection:
    """Indexes every shard, then reads and decodes `num_read` samples spread evenly over the source, or all of
    them when None. What cannot be read becomes a reject, and a file that is not there is named beside. Raises
    `SourceError` when a whole shard cannot be opened.
    """
    found = Inspection(source.describe() if isinstance(source, Described) else {})
    chosen = _Spread(num_read)
    for shard in source.shards():
        index = source.index(shard)
        for record in index.records:
            chosen.add(record)
            if (info := _known_info(record)) is not None:
                found.count_tasks(info)
        found.rejects += index.rejects
        found.num_samples += len(index.records)
        found.num_shards += 1
        on_shard()
    for record in chosen.records():
        found.num_read += 1
        try:
            sample = record.read()
            if _known_info(record) is None:
                found.count_tasks(sample.info)
            found.add(sample, num_examples)
        except FileNotFoundError as error:
            found.missing_files.append(str(error.filename or error))
            found.rejects.append(Reject(record.shard, record.key, "no such file as its picture"))
        except (SourceError, ImageError, MissingExtraError, OSError) as error:
            found.rejects.append(Reject(record.shard, record.key, str(error)))
    return found


def _known_info(record: Record) -> Mapping[str, Any] | None:
    """The sample's texts where indexing read them already, as of annotation files and tables."""
    info: Mapping[str, Any] | None = getattr(record, "info", None)
    return info


class _Spread:
    """About evenly spread records of a source whose length is not known before its end: every 1st, 2nd, 4th,
    ... one is kept, so that those of millions never lie in memory together.
    """

    def __init__(self, count: int | None) -> None:
        self.count, self.step, self.seen = count, 1, 0
        self.kept: list[Record] = []

    def add(self, record: Record) -> None:
        if self.seen % self.step == 0:
            self.kept.append(record)
        self.seen += 1
        if self.count is not None and len(self.kept) > 2 * self.count:
            del self.kept[1::2]
            self.step *= 2

    def records(self) -> list[Record]:
        if self.count is None or self.count >= len(self.kept):
            return self.kept
        return [self.kept[i * len(self.kept) // self.count] for i in range(self.count)]


def is_clip(payload: bytes) -> bool:
    """Whether the first bytes are of mp4 and its kin, Matroska or AVI; AVIF and HEIC are pictures."""
    if payload[4:8] == b"ftyp":
        return payload[8:12] not in (b"avif", b"avis", b"heic", b"heix", b"mif1")
    return payload.startswith(b"\x1aE\xdf\xa3") or (payload.startswith(b"RIFF") and payload[8:11] == b"AVI")


def _first_frame(payload: bytes, name: str) -> Image.Image:
    from openblip.data.video import read_frames

    return read_frames(payload, 1, name=name)[0]
