"""What the readers of public annotation files share: the file, the numbered samples that it lists, and the
source that hands them out in shards.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

from openblip.data.sample import Record, Reject, ShardIndex, clean_text
from openblip.data.sources import storage
from openblip.data.sources.files import chunk_names
from openblip.errors import SourceError


@dataclass(frozen=True, slots=True)
class AnnotationFile:
    """A parsed file and where its pictures are. `source` is the spec that named it, `split` what stood after
    a `#`.
    """

    source: str
    path: str
    content: Any = field(repr=False)
    images: str
    split: str | None = None

    @property
    def stem(self) -> str:
        return os.path.basename(self.path).rpartition(".")[0]

    def beside(self, name: str) -> str:
        """The path of a file in the same folder."""
        return storage.join(storage.parent(self.path), name)


def picture_folder(path: str, images: str | None) -> str:
    """The folder of the pictures or clips that an annotation file names; raises `SourceError` without one."""
    if images is None:
        raise SourceError(f"{path}: give the folder of its images with --images DIR")
    if not storage.is_directory(images):
        raise SourceError(f"{images}: no such folder of images")
    return images


class Annotations(Protocol):
    """The samples that an annotation file lists, numbered from 0."""

    known_as: ClassVar[str]
    """What the format is called, and what tells it: for the list of what can be read."""

    has_splits: ClassVar[bool]
    """Whether a file holds several splits, of which one is chosen after a `#`."""

    @classmethod
    def recognises(cls, content: Any) -> bool:
        """Whether a parsed json has this format's structure."""
        ...

    @classmethod
    def of(cls, file: AnnotationFile) -> Self:
        """Raises `SourceError` when a file that belongs to it is missing or nothing can be read of it."""
        ...

    def __len__(self) -> int: ...

    def where(self, number: int) -> str:
        """Where in the file a sample stands: `images[7]`."""
        ...

    def record(self, number: int, shard: str) -> Record:
        """Raises `SourceError` for a broken sample; the message need not say where."""
        ...

    def describe(self) -> dict[str, object]:
        """The format's name under `format`, and what of the file's companions was found or is `missing`."""
        ...


@dataclass(slots=True)
class AnnotationSource:
    """An annotation file in shards of a bounded number of samples, in its order."""

    name: str
    annotations: Annotations = field(repr=False)
    chunks: dict[str, range] = field(repr=False)

    @classmethod
    def of(cls, file: AnnotationFile, annotations: Annotations) -> "AnnotationSource":
        stem = file.stem if file.split is None else f"{file.stem}-{file.split}"
        chunks = dict(chunk_names(stem, len(annotations)))
        if not chunks:
            raise SourceError(f"{file.source}: it lists no samples")
        return cls(file.source, annotations, chunks)

    def shards(self) -> Sequence[str]:
        return list(self.chunks)

    def index(self, shard: str) -> ShardIndex:
        records: dict[str, Record] = {}
        rejects: list[Reject] = []
        for number in self.chunks[shard]:
            try:
                record = self.annotations.record(number, shard)
            except SourceError as error:
                where = self.annotations.where(number)
                rejects.append(Reject(shard, where, f"{where}: {error}"))
                continue
            if records.setdefault(record.key, record) is not record:
                where = self.annotations.where(number)
                rejects.append(Reject(shard, record.key, f"{where}: duplicate id, the first one stays"))
        return ShardIndex(list(records.values()), rejects)

    def describe(self) -> dict[str, object]:
        return self.annotations.describe()


def first_objects(rows: Any, count: int = 100) -> list[Mapping[str, Any]]:
    """The objects among the first of a list, which tell its format even where some are broken; none of
    anything else than a list.
    """
    return [row for row in rows[:count] if isinstance(row, dict)] if isinstance(rows, list) else []


def as_object(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise SourceError(f"expected an object, found {row!r:.80}")
    return row


def text_of(row: Mapping[str, Any], name: str) -> str:
    """A text that is not blank, cleaned; raises `SourceError` for anything else."""
    value = row.get(name)
    if not isinstance(value, str) or not (text := clean_text(value)):
        raise _wrong(row, name, "a text")
    return text


def id_of(row: Mapping[str, Any], name: str) -> int | str:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise _wrong(row, name, "a number or a name")
    return value


def number_of(row: Mapping[str, Any], name: str) -> int:
    """An id that is part of a file name, as of COCO; a text of digits counts."""
    value = id_of(row, name)
    try:
        return int(value)
    except ValueError as error:
        raise _wrong(row, name, "a number") from error


def file_name_of(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value or "\0" in value:
        raise _wrong(row, name, "the name of a file")
    return value


def _wrong(row: Mapping[str, Any], name: str, wanted: str) -> SourceError:
    return SourceError(f"{name} must be {wanted}, not {row[name]!r:.80}" if name in row else f"no {name}")
