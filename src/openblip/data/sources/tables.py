"""Tables of image paths and texts: .jsonl, .csv and .tsv.

Columns: the image's path in `image` (or `image_path`, `file_name`, ...), relative to the table's folder or to
`--images`; one caption or a list in `caption` (or `captions`, `text`, `txt`); the right one of two images in
`second_image`, a clip in `video`, and the fields of tasks under their own names. Rows of the same image, as
Flickr30k's tables have them, share its image id. A broken row is a reject that names the line.
"""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openblip.data.sample import Record, Reject, ShardIndex, caption_texts, safe_name
from openblip.data.sources import storage
from openblip.data.sources.files import ROWS_PER_SHARD, FileRecord
from openblip.data.sources.rows import Csv, Dialect, JsonLines, Row
from openblip.data.sources.task_fields import TASK_COLUMNS, task_fields
from openblip.errors import SourceError

IMAGE_COLUMNS = (
    "image",
    "image_path",
    "path",
    "file_name",
    "filename",
    "filepath",
    "file",
    "jpg",
    "png",
    "webp",
    "video",
)
CAPTION_COLUMNS = ("caption", "captions", "text", "txt")
KEY_COLUMNS = ("key", "__key__", "id")


def find_column(names: Iterable[str], wanted: Sequence[str], what: str, where: str) -> str:
    """The first of the `wanted` columns that exists; raises `SourceError` with the columns that do."""
    names = list(names)
    for name in wanted:
        if name in names:
            return name
    raise SourceError(f"{where}: no {what} column ({', '.join(wanted)}); found: {', '.join(names) or 'none'}")


def row_key(row: Mapping[str, Any], number: int) -> str:
    """The row's own key where it has one, else its number, as of LLaVA's conversations: their ids name the
    picture, about which there are several.
    """
    for name in () if "conversations" in row else KEY_COLUMNS:
        if isinstance(row.get(name), (str, int)) and str(row[name]):
            return safe_name(str(row[name]))
    return f"{number:09d}"


def row_captions(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    for name in CAPTION_COLUMNS:
        if captions := caption_texts(row.get(name), where):
            return captions
    return ()


@dataclass(frozen=True, slots=True)
class TableChunk:
    """A shard: `num_rows` rows of a file from byte `offset`, where line number `line` starts."""

    path: str
    dialect: Dialect
    offset: int
    line: int
    num_rows: int


@dataclass(slots=True)
class TableSource:
    """Files of rows, each in shards of at most `ROWS_PER_SHARD` rows."""

    name: str
    images: str | None
    chunks: dict[str, TableChunk] = field(repr=False)

    @classmethod
    def open(cls, spec: str, paths: list[str], images: str | None) -> "TableSource":
        chunks: dict[str, TableChunk] = {}
        for stem, path in storage.shard_names(paths).items():
            found = _chunks_of(path)
            for number, chunk in enumerate(found):
                chunks[stem if len(found) == 1 else f"{stem}-{number:05d}"] = chunk
        if not chunks:
            raise SourceError(f"{spec}: no rows")
        return cls(spec, images, chunks)

    def shards(self) -> Sequence[str]:
        return list(self.chunks)

    def index(self, shard: str) -> ShardIndex:
        chunk = self.chunks[shard]
        records: dict[str, Record] = {}
        rejects: list[Reject] = []
        with storage.open_binary(chunk.path) as file:
            file.seek(chunk.offset)
            for row in itertools.islice(chunk.dialect.rows(file, chunk.line), chunk.num_rows):
                where = f"{os.path.basename(chunk.path)} line {row.line}"
                try:
                    record = self._record(chunk, shard, row, where)
                except SourceError as error:
                    rejects.append(Reject(shard, f"{row.line:09d}", str(error)))
                    continue
                if records.setdefault(record.key, record) is not record:
                    rejects.append(Reject(shard, record.key, f"{where}: duplicate key, the first one stays"))
        return ShardIndex(list(records.values()), rejects)

    def _record(self, chunk: TableChunk, shard: str, row: Row, where: str) -> FileRecord:
        values = chunk.dialect.parse(row, where)
        folder = self.images or storage.parent(chunk.path)
        image = _path(values, find_column(values, IMAGE_COLUMNS, "image", where), where)
        second = None if values.get("second_image") in (None, "") else _path(values, "second_image", where)
        image_id = values.get("image_id")
        if image_id in (None, ""):
            image_id = image if second is None else f"{image} {second}"
        try:
            info = task_fields(values)
        except SourceError as error:
            raise SourceError(f"{where}: {error}") from error
        return FileRecord(
            key=row_key(values, row.line),
            shard=shard,
            image_path=storage.join(folder, image),
            captions=row_captions(values, where),
            image_id=f"{self.name}#{image_id}",
            info=info,
            second_image_path=None if second is None else storage.join(folder, second),
        )


def _path(values: Mapping[str, Any], column: str, where: str) -> str:
    image = values[column]
    if not isinstance(image, str) or not image or "\0" in image:
        raise SourceError(f"{where}: the image must be a path, not {image!r:.80}")
    return image


def _chunks_of(path: str) -> list[TableChunk]:
    """Cuts a file into shards with one pass over its lines."""
    chunks = []
    try:
        with storage.open_binary(path) as file:
            dialect: Dialect
            line = 1
            if path.lower().endswith((".csv", ".tsv")):
                dialect, line = Csv.of(file, path), 2
                find_column(dialect.columns, IMAGE_COLUMNS, "image", path)
                find_column(dialect.columns, (*CAPTION_COLUMNS, *TASK_COLUMNS), "caption", path)
            else:
                dialect = JsonLines()
            rows = dialect.rows(file, line)
            while chunk := list(itertools.islice(rows, ROWS_PER_SHARD)):
                chunks.append(TableChunk(path, dialect, chunk[0].offset, chunk[0].line, len(chunk)))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error}") from error
    return chunks
