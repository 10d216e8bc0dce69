"""Parquet and Arrow files with the image, encoded or by its path, and its texts in each row, as Hugging Face datasets
writes them. An Arrow file or stream is read as if its record batches were the row groups of a parquet file.

A null is a field that the row does not have. Of a row group the texts and the images are read a few at a time.
"""

import io
import itertools
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from openblip.data.config import SourceOptions
from openblip.data.sample import Located, Reject, Sample, Selection, Source, image_id_of, is_transient
from openblip.data.sources import rows, storage
from openblip.errors import SourceError

_ENCODED_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "video", "mp4", "images")
_IMAGE_COLUMNS = (*_ENCODED_COLUMNS, *(name for name in rows.IMAGE_COLUMNS if name not in _ENCODED_COLUMNS))
_SECOND_IMAGE = "second_image"
_ROWS_AT_ONCE = 32  # images that are in memory together
_TEXTS_AT_ONCE = 128  # rows whose texts are
_BUFFER_BYTES = 4 << 20  # a column is read in requests of this size
_Item = Sample | Reject
# What pyarrow raises for damaged files and for names and texts that are not UTF-8. Its own errors are among them.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, OverflowError, NotImplementedError, SystemError, RecursionError,
           MemoryError, pa.ArrowException)  # fmt: skip
_ROW_GROUP = re.compile(r"(?P<shard>.+)-(?P<group>\d{5})")


@dataclass
class ParquetSource(Source):
    """Parquet or Arrow files, one shard each. A row group can be read as the shard `NAME-00003`, as earlier versions
    did.
    """

    name: str
    paths: dict[str, str] = field(repr=False)
    unused: Mapping[str, Counter[str]] = field(default_factory=dict, repr=False)
    options: SourceOptions = SourceOptions()  # noqa: RUF009 (frozen)
    lacks: str = ""
    option_names = frozenset({"images", "image_column", "caption_column"})

    @classmethod
    def open(cls, spec: str, paths: list[str], options: SourceOptions) -> "ParquetSource":
        """Look at the first file's columns; raises `SourceError`. Each other file is looked at in its turn."""
        source = cls(spec, storage.shard_names(paths), options=options)
        with source._opened(source.shards()[0]) as (file, groups):
            if len(paths) == 1 and not any(map(file.num_rows, groups)):
                raise SourceError(f"{spec}: no rows")
            source.lacks = rows.check_columns(file.schema.names, _IMAGE_COLUMNS, options, paths[0])
        return source

    def shards(self) -> Sequence[str]:
        return list(self.paths)

    def has_shard(self, shard: str) -> bool:
        return self._file_of(shard)[0] in self.paths

    def file_name(self, shard: str) -> str:
        return os.path.basename(self.path(shard))

    def file_state(self, shard: str) -> Mapping[str, Any]:
        return storage.file_state(self.path(shard))

    def is_self_contained(self, shard: str) -> bool:
        with self._opened(shard) as (file, _):
            columns = rows.named_columns(self.options.image_column, _IMAGE_COLUMNS)
            image = file.schema.field(rows.find_column(file.schema.names, columns, "image"))
            return bool(pa.types.is_binary(image.type) or pa.types.is_large_binary(image.type))

    def path(self, shard: str) -> str:
        return self.paths[self._file_of(shard)[0]]

    def _file_of(self, shard: str) -> tuple[str, int | None]:
        """The shard name of a file, and the number of the row group where `shard` is one."""
        match = None if shard in self.paths else _ROW_GROUP.fullmatch(shard)
        return (shard, None) if match is None else (match["shard"], int(match["group"]))

    def num_samples(self, shard: str) -> int:
        with self._opened(shard) as (file, groups):
            return sum(map(file.num_rows, groups))

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        with self._opened(shard, is_shared=selection.pieces[1] > 1) as (file, groups):
            sizes = [file.num_rows(group) for group in range(file.num_groups)]
            first = sum(sizes[: groups[0]]) if groups else 0  # row of the file that is the shard's sample 0
            reader = _GroupReader(self, shard, file, selection)
            for index, group in enumerate(groups):
                begin = sum(sizes[:group])
                in_piece = _rows_of_piece(selection.pieces, index, len(groups), sizes[group])
                wanted = in_piece[bisect_left(in_piece, first + selection.start - begin) :]
                for row, item in reader.items(group, begin, wanted):
                    yield Located(begin + row - first, item)
            if reader.damage and not reader.is_readable:
                raise SourceError(f"{shard}: nothing can be read: {reader.damage}")

    @contextmanager
    def _opened(self, shard: str, *, is_shared: bool = False) -> Iterator[tuple["_File", list[int]]]:
        """The open file of a shard and the row groups that belong to the shard."""
        path, (_, group) = self.path(shard), self._file_of(shard)
        with storage.source_errors(path, keep_transient=True):
            is_arrow = path.lower().endswith((".arrow", ".feather"))
            binary = storage.open_copied(path) if is_shared or is_arrow else storage.open_binary(path)
        with binary:
            try:
                file = _ArrowFile(binary) if is_arrow else _ParquetFile(binary)
                names = list(file.schema.names)
            except _DAMAGE as error:
                if is_transient(error):
                    raise
                binary.seek(0)
                what = storage.describe_content(binary.read(512)) or error
                raise SourceError(f"{path}: not a readable {path.rpartition('.')[2]} file: {what}") from error
            if repeated := [name for name, count in Counter(names).items() if count > 1]:
                raise SourceError(f"{path}: several columns are called {repeated[0]:.80}; rename all but one")
            rows.check_columns(names, _IMAGE_COLUMNS, self.options, path)
            groups = list(range(file.num_groups)) if group is None else [group]
            if groups and groups[-1] >= file.num_groups:
                raise SourceError(f"{path}: has no row group {group}")
            yield file, groups


class _ParquetFile:
    """An open parquet file."""

    def __init__(self, binary: BinaryIO) -> None:
        self.file = pq.ParquetFile(binary, buffer_size=_BUFFER_BYTES)
        self.schema, self.num_groups = self.file.schema_arrow, self.file.num_row_groups

    def num_rows(self, group: int) -> int:
        return int(self.file.metadata.row_group(group).num_rows)

    def batches(self, group: int, columns: list[str], size: int) -> Iterator[pa.RecordBatch]:
        """The rows of a group, a few at a time: what is far smaller in the file is never whole in memory."""
        yield from self.file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False)


class _ArrowFile:
    """An open Arrow file or stream; a local one is mapped into memory. What cannot be read of its end is a group of one
    row, so that it becomes a reject.
    """

    def __init__(self, binary: BinaryIO) -> None:
        source = pa.memory_map(binary.name) if isinstance(binary, io.BufferedReader) else pa.PythonFile(binary)
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        self.schema, self.groups, self.damage = reader.schema, list[pa.RecordBatch](), list[Exception]()
        try:
            for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
                self.groups.append(batch)
        except _DAMAGE as error:
            self.damage.append(error)
        self.num_groups = len(self.groups) + len(self.damage)

    def num_rows(self, group: int) -> int:
        return self.groups[group].num_rows if group < len(self.groups) else 1

    def batches(self, group: int, columns: list[str], size: int) -> Iterator[pa.RecordBatch]:
        if group == len(self.groups):
            raise self.damage[0]
        batch = self.groups[group].select(columns)
        _check_places(batch)
        yield from (batch.slice(start, size) for start in range(0, batch.num_rows, size))


def _check_places(batch: pa.RecordBatch) -> None:
    """Raise `ArrowInvalid` where a value would lie outside of its buffer, which pyarrow would read all the same. A text
    that is not UTF-8 is the matter of its row.
    """
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        for column in batch.columns:
            is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
            (column.cast(pa.large_binary()) if is_text else column).validate(full=True)


_File = _ParquetFile | _ArrowFile


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

    def __init__(self, source: ParquetSource, shard: str, file: _File, selection: Selection) -> None:
        self.source, self.shard, self.file, self.selection = source, shard, file, selection
        schema, options = file.schema, source.options
        image = rows.find_column(schema.names, rows.named_columns(options.image_column, _IMAGE_COLUMNS), "image")
        self.image_columns = [image, *({_SECOND_IMAGE} & {*schema.names})]
        self.caption_columns = rows.named_columns(options.caption_column, rows.CAPTION_COLUMNS)
        is_encoded = {c.name: pa.types.is_binary(c.type) or pa.types.is_large_binary(c.type) for c in schema}
        self.path_column = None if is_encoded[image] or pa.types.is_nested(schema.field(image).type) else image
        encoded = {*self.image_columns} - {self.path_column}
        self.text_columns = [name for name in schema.names if not (name in encoded or is_encoded[name])]
        has_conversations = "conversations" in schema.names  # whose ids are no keys
        self.key_columns = [name for name in self.text_columns if name in rows.KEY_COLUMNS and not has_conversations]
        self.keys: dict[str, int] = {}
        self.is_readable, self.damage = False, ""

    def items(self, group: int, first: int, wanted: range) -> Iterator[tuple[int, _Item]]:
        """The wanted rows of a group, whose first row is row `first` of the file, each with its place."""
        columns = self.text_columns if wanted else self.key_columns
        if not columns and not wanted:
            return
        text_rows = self._text_rows(group, columns)
        images, position, is_damaged = self._image_rows(group), 0, False  # position: the row whose image comes next
        for row in range(self.file.num_rows(group)):
            try:
                stated, texts = next(text_rows)
            except (StopIteration, *_DAMAGE) as error:
                if left := [place for place in wanted if place >= row]:
                    yield left[0], self._damaged(first + left[0], error)
                return
            stated_key = rows.row_key(stated, first + row)
            key = rows.unique_key(stated_key, self.keys)
            if row not in wanted or (item := self._texts(texts, key, stated_key)) is None:
                continue
            if self.selection.images and isinstance(item, Sample):
                try:
                    while position <= row:
                        image = next(images)
                        position += 1
                    item = self._with_image(item, image)
                except _DAMAGE as error:
                    row, item = position, self._damaged(first + position, error)
                    wanted, is_damaged = range(0), True
            yield row, item
        self.is_readable |= not is_damaged

    def _text_rows(self, group: int, columns: list[str]) -> Iterator[tuple[Mapping[str, Any], pa.RecordBatch | None]]:
        """For each row of a group its key columns, nothing of one with a text that is not UTF-8, and its texts."""
        if not columns:
            yield from itertools.repeat(({}, None), self.file.num_rows(group))
            return
        for batch in self.file.batches(group, columns, _TEXTS_AT_ONCE):
            for row, stated in enumerate(self._stated_keys(batch)):
                yield stated, batch.slice(row, 1)

    def _stated_keys(self, batch: pa.RecordBatch) -> list[Mapping[str, Any]]:
        keys = batch.select(self.key_columns)
        if not self.key_columns:
            return [{}] * batch.num_rows
        try:
            return list[Mapping[str, Any]](keys.to_pylist())
        except _DAMAGE:
            each: list[Mapping[str, Any]] = []
            for row in range(batch.num_rows):
                stated: Mapping[str, Any] = {}
                with suppress(*_DAMAGE):
                    stated = keys.slice(row, 1).to_pylist()[0]
                each.append(stated)
            return each

    def _texts(self, row: pa.RecordBatch | None, key: str, stated_key: str) -> _Item | None:
        """The sample without its image, None where it is skipped. Rows that state the same key show the same image."""
        try:
            values = {} if row is None else row.to_pylist()[0]
            captions, info = rows.row_captions(values, self.caption_columns), rows.task_fields(_stated(values))
        except (SourceError, *_DAMAGE) as error:
            return self._broken(key, error)
        image_id = image_id_of(self.source.name, self.shard, stated_key, info)
        if self.path_column in info and info.get("image_id") is None:
            image_id = f"{self.source.name}#{info[self.path_column]}"
        sample = Sample(key, self.shard, b"", captions, image_id, info)
        return None if self.selection.skips(sample) else sample

    def _broken(self, key: str, error: Exception) -> Reject:
        reason = str(error) if isinstance(error, SourceError) else f"cannot be read: {error}"
        return Reject(self.shard, key, f"{self.shard}/{key}: {reason}")

    def _image_rows(self, group: int) -> Iterator[pa.RecordBatch]:
        """The image columns of each row of a group."""
        for batch in self.file.batches(group, self.image_columns, _ROWS_AT_ONCE):
            self.is_readable = True
            yield from (batch.slice(place, 1) for place in range(batch.num_rows))
        raise pa.ArrowInvalid("it has fewer images than rows")

    def _with_image(self, sample: Sample, row: pa.RecordBatch) -> _Item:
        try:
            values = row.to_pylist()[0]
            column, *others = self.image_columns
            listed = values[column] if isinstance(values[column], list) else [values[column]]
            named = [(value, column) for value in listed]
            named += [(values[name], name) for name in others if values[name] is not None]
            if not 1 <= len(named) <= 2:
                raise SourceError(f"{column} lists {len(named)} images, and a sample has one, or two with a statement")
            image, *second = (self._image(value, name) for value, name in named)
        except (SourceError, OSError) as error:
            return rows.reject_of(self.shard, sample.key, error)
        except _DAMAGE as error:
            return self._broken(sample.key, error)
        return replace(sample, image=image, second_image=next(iter(second), None))

    def _image(self, value: Any, column: str) -> bytes:
        """The bytes themselves, a path, or {bytes, path} with either of them."""
        if isinstance(value, Mapping):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str) and value:
            folder = self.source.options.images or storage.parent(self.source.path(self.shard))
            return storage.read_bytes(storage.join(folder, value))
        if not isinstance(value, bytes):
            raise SourceError(f"no image in column {column}")
        return value

    def _damaged(self, row: int, error: Exception) -> Reject:
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
