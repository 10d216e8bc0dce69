"""Rows: samples whose texts are in a table or list and whose images are files of their own.

Tables, annotation files and folders are read through here, in shards of a bounded number of rows.
"""

import errno
import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from openblip.data.sample import (
    Located,
    MissingFile,
    Reject,
    Sample,
    Selection,
    Source,
    caption_texts,
    is_transient,
    safe_name,
)
from openblip.data.sources import storage
from openblip.errors import SourceError

ROWS_PER_SHARD = 10_000  # so that a table of millions can be shuffled and resumed in pieces
Chunk = TypeVar("Chunk")

_REMOTE_THREADS = 8
_ROWS_AT_ONCE = 32

IMAGE_COLUMNS = (
    "image", "image_path", "path", "file_name", "filename", "filepath", "file", "jpg", "png", "webp", "video",
)  # fmt: skip
CAPTION_COLUMNS = ("caption", "captions", "text", "txt")
KEY_COLUMNS = ("key", "__key__", "id")


@dataclass(frozen=True, slots=True)
class ImageRow:
    """What a table or annotation file says of one sample, whose files are still to be read."""

    key: int | str
    image: Sequence[str]
    """Where the image may lie: the first path that exists counts."""
    image_id: Any = None
    """The data set's own name of the image: rows with the same one show the same image."""
    captions: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    second_image: str | None = None

    @property
    def sample_key(self) -> str:
        return safe_name(str(self.key))

    def texts(self, source: str, shard: str) -> Sample:
        """The sample without its image; raises `SourceError` or `OSError`."""
        return Sample(self.sample_key, shard, b"", self.captions, f"{source}#{self.image_id}", self.info)

    def read(self, source: str, shard: str, selection: Selection) -> Sample | Reject | None:
        """The sample, None where it is skipped, or the reject of what cannot be read."""
        try:
            sample = self.texts(source, shard)
            if selection.skips(sample):
                return None
            if not selection.images:
                return sample
            second = None if self.second_image is None else storage.read_bytes(self.second_image)
            return replace(sample, image=_read_first(self.image), second_image=second)
        except (SourceError, OSError) as error:
            return reject_of(shard, self.sample_key, error)


def reject_of(shard: str, key: str, error: SourceError | OSError) -> Reject:
    """The reject of a sample that cannot be read; an error of the machine or network is raised again."""
    if is_transient(error):
        raise error
    if isinstance(error, FileNotFoundError):
        return MissingFile(shard, key, f"cannot be read: {error}", str(error.filename or error))
    return Reject(shard, key, f"cannot be read: {error}" if isinstance(error, OSError) else str(error))


class RowSource(Source):
    """A source whose shards are lists of rows."""

    chunks: Mapping[str, Any]
    """By shard name, which rows they are."""

    def shards(self) -> Sequence[str]:
        return list(self.chunks)

    @abstractmethod
    def rows(self, shard: str) -> Iterator[tuple[str, ImageRow | Reject]]:
        """The rows of a shard, each with the place in its file that errors name."""

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        """As every source does; several threads read remote images."""
        wanted = self._wanted(shard, selection)

        def read(numbered: tuple[int, ImageRow | Reject]) -> Sample | Reject | None:
            row = numbered[1]
            return row if isinstance(row, Reject) else row.read(self.name, shard, selection)

        with ThreadPoolExecutor(_REMOTE_THREADS, thread_name_prefix="openblip-files") as pool:
            while batch := list(itertools.islice(wanted, _ROWS_AT_ONCE)):
                is_remote = any(isinstance(row, ImageRow) and storage.is_remote(row.image[0]) for _, row in batch)
                items = pool.map(read, batch) if is_remote else map(read, batch)
                for (number, _), item in zip(batch, items, strict=True):
                    if item is not None:
                        yield Located(number, item)

    def _wanted(self, shard: str, selection: Selection) -> Iterator[tuple[int, ImageRow | Reject]]:
        """The rows that are wanted, each with its number; a repeated key is a reject."""
        keys: set[str] = set()
        for number, (place, row) in enumerate(self.rows(shard)):
            if isinstance(row, ImageRow):
                if (key := row.sample_key) in keys:
                    row = Reject(shard, key, f"{place}: duplicate key, the first one stays")
                keys.add(key)
            if selection.has(number):
                yield number, row


def _read_first(paths: Sequence[str]) -> bytes:
    """Read the first of the files that exists; raises `FileNotFoundError` that names all of them."""
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


def cut_rows(num_rows: int) -> list[range]:
    """The rows of each shard of a list."""
    starts = range(0, num_rows, ROWS_PER_SHARD)
    return [range(start, min(start + ROWS_PER_SHARD, num_rows)) for start in starts]


def chunk_names(stem: str, chunks: Sequence[Chunk]) -> dict[str, Chunk]:
    """The shards of a file by name: `stem` alone, or `stem-00000`, `stem-00001`, ... where there are several."""
    return {stem if len(chunks) == 1 else f"{stem}-{number:05d}": chunk for number, chunk in enumerate(chunks)}


def find_column(names: Iterable[str], wanted: Sequence[str], what: str, place: str = "") -> str:
    """The first of the `wanted` columns that exists.

    Raises `SourceError`, whose message begins with `place` and names the columns that do exist.
    """
    names = list(names)
    for name in wanted:
        if name in names:
            return name
    raise SourceError(f"{place}no {what} column ({', '.join(wanted)}); found: {', '.join(names) or 'none'}")


def row_key(row: Mapping[str, Any], number: int) -> str:
    """The row's own key where it has one, else its number.

    The ids of LLaVA's conversations name the image, about which there are several: they are no keys.
    """
    for name in () if "conversations" in row else KEY_COLUMNS:
        if isinstance(row.get(name), (str, int)) and str(row[name]):
            return safe_name(str(row[name]))
    return f"{number:09d}"


def row_captions(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The captions of the first column that has any; raises `SourceError`."""
    stated = (caption_texts(row.get(name), name) for name in CAPTION_COLUMNS)
    return next(filter(None, stated), ())
