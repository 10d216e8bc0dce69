"""What the formats share that name image files: tables, COCO json and folders; and shards of a bounded
size.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from openblip.data.sample import Sample
from openblip.data.sources import storage

ROWS_PER_SHARD = 10_000  # so that a table of millions can be shuffled and resumed in pieces


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A sample whose texts are known and whose image is a file of its own."""

    key: str
    shard: str
    image_path: str
    captions: tuple[str, ...]
    image_id: str
    info: Mapping[str, Any]

    def read(self) -> Sample:
        image = storage.read_bytes(self.image_path)
        return Sample(self.key, self.shard, image, self.captions, self.image_id, self.info)


def chunk_names(stem: str, num_rows: int) -> Iterator[tuple[str, range]]:
    """Shard names and the rows they hold: `stem` alone, or `stem-00000`, `stem-00001`, ... of a longer
    list.
    """
    starts = range(0, num_rows, ROWS_PER_SHARD)
    for number, start in enumerate(starts):
        rows = range(start, min(start + ROWS_PER_SHARD, num_rows))
        yield (stem if len(starts) == 1 else f"{stem}-{number:05d}"), rows
