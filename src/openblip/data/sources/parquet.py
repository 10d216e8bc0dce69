"""Parquet files with the encoded image and its texts in each row, as Hugging Face datasets writes them.

A null is a field that the row does not have. A row group is read as texts first, then its images a few at a time.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openblip.data.sample import Located, Reject, Sample, Selection, Source, image_id_of, is_transient
from openblip.data.sources import rows, storage
from openblip.errors import SourceError

_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "video", "mp4")
_SECOND_IMAGE = "second_image"
_ROWS_AT_ONCE = 32  # images that are in memory together
_BUFFER_BYTES = 4 << 20  # a column is read in requests of this size
_Item = Sample | Reject
_ROW_GROUP = re.compile(r"(?P<shard>.+)-(?P<group>\d{5})")


@dataclass
class ParquetSource(Source):
    """Parquet files, one shard each. A row group can be read as the shard `NAME-00003`, as earlier versions did."""

    name: str
    paths: dict[str, str] = field(repr=False)
    unused: Mapping[str, Counter[str]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, spec: str, paths: list[str]) -> "ParquetSource":
        """Look at the first file's columns; raises `SourceError`. Each other file is looked at in its turn."""
        source = cls(spec, storage.shard_names(paths))
        with source._opened(source.shards()[0]) as (file, _):
            if len(paths) == 1 and not file.metadata.num_rows:
                raise SourceError(f"{spec}: no rows")
        return source

    def shards(self) -> Sequence[str]:
        return list(self.paths)

    def has_shard(self, shard: str) -> bool:
        return self._file_of(shard)[0] in self.paths

    def file_name(self, shard: str) -> str:
        return os.path.basename(self.path(shard))

    def path(self, shard: str) -> str:
        return self.paths[self._file_of(shard)[0]]

    def _file_of(self, shard: str) -> tuple[str, int | None]:
        """The shard name of a file, and the number of the row group where `shard` is one."""
        match = None if shard in self.paths else _ROW_GROUP.fullmatch(shard)
        return (shard, None) if match is None else (match["shard"], int(match["group"]))

    def num_samples(self, shard: str) -> int:
        with self._opened(shard) as (file, groups):
            return sum(file.metadata.row_group(group).num_rows for group in groups)

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        with self._opened(shard, is_shared=selection.pieces[1] > 1) as (file, groups):
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            first = sum(sizes[: groups[0]]) if groups else 0  # row of the file that is the shard's sample 0
            reader = _GroupReader(self, shard, file, selection)
            for index, group in enumerate(groups):
                begin = sum(sizes[:group])
                in_piece = _rows_of_piece(selection.pieces, index, len(groups), sizes[group])
                wanted = [row for row in in_piece if begin + row >= first + selection.start]
                for row, item in reader.items(group, begin, wanted):
                    yield Located(begin + row - first, item)
            if reader.damage and not reader.is_readable:
                raise SourceError(f"{shard}: nothing can be read: {reader.damage}")

    @contextmanager
    def _opened(self, shard: str, *, is_shared: bool = False) -> Iterator[tuple[pq.ParquetFile, list[int]]]:
        """The open file of a shard and the row groups that belong to the shard."""
        path, (_, group) = self.path(shard), self._file_of(shard)
        with storage.source_errors(path, keep_transient=True):
            binary = storage.open_copied(path) if is_shared else storage.open_binary(path)
        with binary:
            try:
                file = pq.ParquetFile(binary, buffer_size=_BUFFER_BYTES)
            except (OSError, pa.ArrowException) as error:
                if is_transient(error):
                    raise
                binary.seek(0)
                what = storage.describe_content(binary.read(512)) or error
                raise SourceError(f"{path}: not a readable parquet file: {what}") from error
            rows.check_columns(file.schema_arrow.names, _IMAGE_COLUMNS, path)
            groups = list(range(file.num_row_groups)) if group is None else [group]
            if groups and groups[-1] >= file.num_row_groups:
                raise SourceError(f"{path}: has no row group {group}")
            yield file, groups


def _rows_of_piece(pieces: tuple[int, int], group: int, num_groups: int, num_rows: int) -> range:
    """The rows of a row group in a piece: all or none where there are enough groups, else several pieces share one."""
    piece, num_pieces = pieces
    if num_pieces <= num_groups:
        return range(num_rows if group % num_pieces == piece else 0)
    if piece % num_groups != group:
        return range(0)
    num_sharing = num_pieces // num_groups + (group < num_pieces % num_groups)
    return range(piece // num_groups, num_rows, num_sharing)


class _GroupReader:
    """Reads the row groups of one open shard, one after the other."""

    def __init__(self, source: ParquetSource, shard: str, file: pq.ParquetFile, selection: Selection) -> None:
        self.source, self.shard, self.file, self.selection = source, shard, file, selection
        schema = file.schema_arrow
        image = rows.find_column(schema.names, _IMAGE_COLUMNS, "image")
        self.image_columns = [image, *({_SECOND_IMAGE} & {*schema.names})]
        is_encoded = {c.name: pa.types.is_binary(c.type) or pa.types.is_large_binary(c.type) for c in schema}
        self.text_columns = [name for name in schema.names if not (name in self.image_columns or is_encoded[name])]
        has_conversations = "conversations" in schema.names  # whose ids are no keys
        self.key_columns = [name for name in self.text_columns if name in rows.KEY_COLUMNS and not has_conversations]
        self.keys: set[str] = set()
        self.is_readable, self.damage = False, ""

    def items(self, group: int, first: int, wanted: Sequence[int]) -> Iterator[tuple[int, _Item]]:
        """The wanted rows of a group, whose first row is row `first` of the file, each with its place."""
        columns = self.text_columns if wanted else self.key_columns
        if not columns:
            return
        try:
            texts = self.file.read_row_group(group, columns=columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            if wanted:
                yield wanted[0], self._damaged(first + wanted[0], error)
            return
        wanted_rows, items = set(wanted), dict[int, _Item]()
        for row in range(texts.num_rows):
            stated: Mapping[str, Any] = {}
            if self.key_columns:
                with suppress(ValueError):  # a text that is not UTF-8
                    stated = texts.select(self.key_columns).slice(row, 1).to_pylist()[0]
            key = rows.row_key(stated, first + row)
            if row in wanted_rows:
                if key in self.keys:
                    items[row] = Reject(self.shard, key, f"row {first + row}: duplicate key, the first one stays")
                elif (item := self._texts(texts.slice(row, 1), key)) is not None:
                    items[row] = item
            self.keys.add(key)
        if self.selection.images and any(isinstance(item, Sample) for item in items.values()):
            yield from self._with_images(group, first, items)
        else:
            self.is_readable = True
            yield from items.items()

    def _texts(self, row: pa.Table, key: str) -> _Item | None:
        """The sample without its image, None where it is skipped."""
        try:
            values = row.to_pylist()[0]
            captions, info = rows.row_captions(values), rows.task_fields(_stated(values))
        except (SourceError, pa.ArrowException, ValueError) as error:
            return self._broken(key, error)
        sample = Sample(key, self.shard, b"", captions, image_id_of(self.source.name, self.shard, key, info), info)
        return None if self.selection.skips(sample) else sample

    def _broken(self, key: str, error: Exception) -> Reject:
        reason = str(error) if isinstance(error, SourceError) else f"cannot be read: {error}"
        return Reject(self.shard, key, f"{self.shard}/{key}: {reason}")

    def _with_images(self, group: int, first: int, items: dict[int, _Item]) -> Iterator[tuple[int, _Item]]:
        row, last = 0, max(items)
        columns = self.image_columns
        try:
            for batch in self.file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
                self.is_readable = True
                for place in range(batch.num_rows):
                    if (item := items.get(row)) is not None:
                        yield row, self._with_image(item, batch.slice(place, 1)) if isinstance(item, Sample) else item
                    row += 1
                if row > last:
                    return
        except (OSError, pa.ArrowException) as error:
            yield row, self._damaged(first + row, error)

    def _with_image(self, sample: Sample, row: pa.RecordBatch) -> _Item:
        try:
            values = row.to_pylist()[0]
            image, *second = (
                self._image(values[column], column)
                for column in self.image_columns
                if column != _SECOND_IMAGE or values[column] is not None
            )
        except (SourceError, OSError) as error:
            return rows.reject_of(self.shard, sample.key, error)
        except (pa.ArrowException, ValueError) as error:
            return self._broken(sample.key, error)
        return replace(sample, image=image, second_image=next(iter(second), None))

    def _image(self, value: Any, column: str) -> bytes:
        """The bytes themselves, or {bytes, path} with either of them."""
        if isinstance(value, Mapping):
            if value.get("bytes") is None and isinstance(value.get("path"), str):
                folder = storage.parent(self.source.path(self.shard))
                return storage.read_bytes(storage.join(folder, value["path"]))
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise SourceError(f"no image in column {column}")
        return value

    def _damaged(self, row: int, error: OSError | pa.ArrowException) -> Reject:
        """The reject of the rest of a row group that cannot be decoded."""
        if is_transient(error):
            raise error
        self.damage = self.damage or str(error)
        return Reject(self.shard, "", f"row {row} and the rest of its row group cannot be read: {error}")


def _stated(value: Any) -> Any:
    """The value without nulls, which a struct has for what this row does not say, and without other encoded files."""
    if isinstance(value, Mapping):
        return {k: _stated(v) for k, v in value.items() if v is not None and not isinstance(v, bytes)}
    return [_stated(item) for item in value] if isinstance(value, list) else value
