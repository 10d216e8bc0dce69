"""What the formats share that name image files: tables, annotation files and folders; and shards of a bounded
size.
"""

import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from openblip.data.sample import Sample
from openblip.data.sources import storage

ROWS_PER_SHARD = 10_000  # so that a table of millions can be shuffled and resumed in pieces


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A sample whose texts are known and whose image is a file of its own.

    `other_paths` are where else the image may lie, for data sets that do not say which of their folders has
    it.
    """

    key: str
    shard: str
    image_path: str
    captions: tuple[str, ...]
    image_id: str
    info: Mapping[str, Any]
    second_image_path: str | None = None
    other_paths: tuple[str, ...] = ()

    def read(self) -> Sample:
        """The sample; raises `FileNotFoundError` when an image is in none of its places."""
        second = None if self.second_image_path is None else storage.read_bytes(self.second_image_path)
        image = read_first(self.image_path, *self.other_paths)
        return Sample(self.key, self.shard, image, self.captions, self.image_id, self.info, second)


def read_first(*paths: str) -> bytes:
    """The first of the files that is there; raises `FileNotFoundError` that names all of them."""
    for path in paths[:-1]:
        try:
            return storage.read_bytes(path)
        except FileNotFoundError:
            continue
    try:
        return storage.read_bytes(paths[-1])
    except FileNotFoundError as error:
        if len(paths) == 1:
            raise
        others = ", nor ".join(paths[1:])
        raise FileNotFoundError(errno.ENOENT, f"No such file, nor {others}", paths[0]) from error


def present_folders(images: str, *names: str) -> tuple[str, ...]:
    """Where pictures of a data set lie: those of the named folders that are in `images`, then `images` itself
    for pictures without the data set's folders.
    """
    folders = (storage.join(images, name) for name in names)
    return (*(folder for folder in folders if storage.is_directory(folder)), images)


def chunk_names(stem: str, num_rows: int) -> Iterator[tuple[str, range]]:
    """Shard names and the rows they hold: `stem` alone, or `stem-00000`, `stem-00001`, ... of a longer
    list.
    """
    starts = range(0, num_rows, ROWS_PER_SHARD)
    for number, start in enumerate(starts):
        rows = range(start, min(start + ROWS_PER_SHARD, num_rows))
        yield (stem if len(starts) == 1 else f"{stem}-{number:05d}"), rows
