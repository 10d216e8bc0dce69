"""What a source holds, counted: every shard is indexed, some samples are read and decoded."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from openblip.data.images import read_image
from openblip.data.sample import Record, Reject, Sample, Source
from openblip.errors import ImageError, SourceError


@dataclass
class Inspection:
    """Counts over a source. What is said of captions and image sizes is of the `num_read` samples that were
    read.
    """

    num_shards: int = 0
    num_samples: int = 0
    num_read: int = 0
    rejects: list[Reject] = field(default_factory=list)
    captions_per_image: Counter[int] = field(default_factory=Counter)
    caption_words: list[int] = field(default_factory=list)
    image_sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    examples: list[Sample] = field(default_factory=list)

    def add(self, sample: Sample, num_examples: int) -> None:
        """Counts a sample; raises `ImageError` when its image cannot be decoded."""
        image = read_image(sample.image, name=f"{sample.shard}/{sample.key}")
        self.image_sizes[image.size] += 1
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
    them when None. What cannot be read becomes a reject. Raises `SourceError` when a whole shard cannot be
    opened.
    """
    found = Inspection()
    records: list[Record] = []
    for shard in source.shards():
        index = source.index(shard)
        records += index.records
        found.rejects += index.rejects
        found.num_shards += 1
        on_shard()
    found.num_samples = len(records)
    for record in _spread(records, num_read):
        try:
            found.add(record.read(), num_examples)
        except (SourceError, ImageError, OSError) as error:
            found.rejects.append(Reject(record.shard, record.key, str(error)))
        found.num_read += 1
    return found


def _spread(records: Sequence[Record], count: int | None) -> list[Record]:
    if count is None or count >= len(records):
        return list(records)
    return [records[i * len(records) // count] for i in range(count)]
