"""Tables of image paths and texts: .jsonl, .csv and .tsv.

docs/data.md has their columns. Rows of the same image, as Flickr30k's tables have them, share its image id. A broken
row is a reject that names the line. pyarrow.csv is not used: it refuses a file for one broken row, and does not say in
which line a row begins.
"""

import csv
import io
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from openblip.data.sample import Reject, parse_json_object
from openblip.data.sources import rows, storage
from openblip.data.sources.rows import ImageRow, RowSource, find_column
from openblip.errors import SourceError

_BOM = b"\xef\xbb\xbf"
_LONGEST_ROW = 1 << 16  # bytes; a longer csv row is a quote that was never closed


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the rows of a file are written: one json object per line, or values under the header of a .csv or .tsv."""

    columns: tuple[str, ...] | None = None  # the header; None for json
    delimiter: str = ","  # or semicolon or tab

    @classmethod
    def of(cls, file: BinaryIO, path: str) -> tuple["Dialect", int]:
        """The dialect that the file's name tells, and the line at which rows begin, where the file is left."""
        if not path.lower().endswith((".csv", ".tsv")):
            return cls(), 1
        try:
            text = file.readline().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SourceError(f"{path}: the header is not UTF-8 text: {error}") from error
        delimiter = max(",;\t", key=text.count)
        return cls(tuple(name.strip() for name in next(csv.reader([text], delimiter=delimiter), [])), delimiter), 2

    def lines(self, file: BinaryIO, number: int) -> Iterator[tuple[int, int, bytes]]:
        """The rows from the file's position, the start of line `number`: number of the first line, offset and bytes.

        Empty lines are left out. A line break within the quotes of a csv does not end a row. A quote that is never
        closed makes its own line a broken row, and the next line is a row again.
        """
        offset = file.tell()
        while first := file.readline():
            data = first
            error = self._quote_error(data)
            while "unexpected end" in error and len(data) <= _LONGEST_ROW and (more := file.readline()):
                data += more
                error = self._quote_error(data)
            if error:
                data = first
                file.seek(offset + len(first))
            if data.removeprefix(_BOM).strip():
                yield number, offset, data
            number += data.count(b"\n")
            offset += len(data)

    def _quote_error(self, data: bytes) -> str:
        """What the csv parser has against a row; "unexpected end of data" where it ends inside quotes."""
        if self.columns is not None and b'"' in data:
            try:
                self._values(data, errors="replace")
            except csv.Error as error:
                return str(error)
        return ""

    def _values(self, data: bytes, errors: str = "strict") -> list[str]:
        text = io.StringIO(data.decode("utf-8", errors), newline="")
        return next(csv.reader(text, delimiter=self.delimiter, strict=True))

    def parse(self, data: bytes) -> Mapping[str, Any]:
        """The named values of a row; raises `SourceError`."""
        if self.columns is None:
            return parse_json_object(data.removeprefix(_BOM))
        try:
            values = self._values(data)
        except (csv.Error, UnicodeDecodeError) as error:
            raise SourceError(f"broken row: {error}") from error
        if len(values) != len(self.columns):
            raise SourceError(f"{len(values)} values for {len(self.columns)} columns")
        return dict(zip(self.columns, values, strict=True))


class _Chunk(NamedTuple):
    """A shard: `num_rows` rows of a file from byte `offset`, where line `line` begins."""

    path: str
    dialect: Dialect
    line: int
    offset: int
    num_rows: int


@dataclass
class TableSource(RowSource):
    """Files of rows, each in shards of a bounded number of rows."""

    name: str
    images: str | None
    chunks: dict[str, _Chunk] = field(repr=False)

    @classmethod
    def open(cls, spec: str, paths: list[str], images: str | None) -> "TableSource":
        """Pass once over each file to cut it into shards; raises `SourceError`."""
        shards: dict[str, _Chunk] = {}
        for stem, path in storage.shard_names(paths).items():
            chunks = []
            with storage.source_errors(path), storage.open_binary(path) as file:
                dialect, number = Dialect.of(file, path)
                if dialect.columns is not None:
                    rows.check_columns(dialect.columns, rows.IMAGE_COLUMNS, path)
                lines = dialect.lines(file, number)
                while chunk := list(itertools.islice(lines, rows.ROWS_PER_SHARD)):
                    chunks.append(_Chunk(path, dialect, *chunk[0][:2], len(chunk)))
            shards |= rows.chunk_names(stem, chunks)
        if not shards:
            raise SourceError(f"{spec}: no rows")
        return cls(spec, images, shards)

    def num_samples(self, shard: str) -> int:
        return self.chunks[shard].num_rows

    def file_name(self, shard: str) -> str:
        return os.path.basename(self.chunks[shard].path)

    def rows(self, shard: str) -> Iterator[tuple[str, ImageRow | Reject]]:
        chunk = self.chunks[shard]
        folder = self.images or storage.parent(chunk.path)
        with storage.source_errors(chunk.path):
            file = storage.open_binary(chunk.path)
        with file:
            file.seek(chunk.offset)
            for number, _, data in itertools.islice(chunk.dialect.lines(file, chunk.line), chunk.num_rows):
                place = f"{self.file_name(shard)} line {number}"
                try:
                    yield place, _row(chunk.dialect.parse(data), number, folder)
                except SourceError as error:
                    yield place, Reject(shard, f"{number:09d}", f"{place}: {error}")


def _row(values: Mapping[str, Any], number: int, folder: str) -> ImageRow:
    image = rows.file_name_of(values, find_column(values, rows.IMAGE_COLUMNS, "image"))
    second = None if values.get("second_image") in (None, "") else rows.file_name_of(values, "second_image")
    image_id = values.get("image_id")
    if image_id in (None, ""):
        image_id = image if second is None else f"{image} {second}"
    return ImageRow(
        key=rows.row_key(values, number),
        image=(storage.join(folder, image),),
        image_id=image_id,
        captions=rows.row_captions(values),
        info=rows.task_fields(values),
        second_image=None if second is None else storage.join(folder, second),
    )
