"""Parquet files with the encoded image and its texts in each row, as Hugging Face datasets writes them.

The image is a picture or, in the column `video`, a clip; the right one of two pictures is in `second_image`.
Captions and the fields of tasks are in columns of their names; a null is a field that the row does not have.

A row group is the smallest piece that can be read, so a file of several row groups is a shard per group, and
a worker keeps the groups it last read. Files with one huge row group work, but hold all of it in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openblip.data.sample import Record, Reject, Sample, ShardIndex, sample_image_id
from openblip.data.sources import storage
from openblip.data.sources.tables import CAPTION_COLUMNS, KEY_COLUMNS, find_column, row_captions, row_key
from openblip.data.sources.task_fields import TASK_COLUMNS, task_fields
from openblip.errors import SourceError

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "video", "mp4")
SECOND_IMAGE_COLUMN = "second_image"
_GROUPS_KEPT = 8


@dataclass(frozen=True, slots=True)
class ParquetRecord:
    """One row of a row group."""

    source: str
    shard: str
    key: str
    path: str
    group: int
    row: int
    image_column: str

    def read(self) -> Sample:
        where = f"{self.shard}/{self.key}"
        try:
            row = _read_group(self.path, self.group).slice(self.row, 1).to_pylist()[0]
        except (pa.ArrowException, ValueError) as error:  # ValueError: text that is not UTF-8
            raise SourceError(f"{where}: cannot be read from {self.path}: {error}") from error
        image = self._image(row.pop(self.image_column), self.image_column, where)
        second = row.pop(SECOND_IMAGE_COLUMN, None)
        if second is not None:
            second = self._image(second, SECOND_IMAGE_COLUMN, where)
        captions = row_captions(row, where)
        try:
            info = task_fields(_stated(row))
        except SourceError as error:
            raise SourceError(f"{where}: {error}") from error
        image_id = sample_image_id(self.source, self.shard, self.key, info)
        return Sample(self.key, self.shard, image, captions, image_id, info, second)

    def _image(self, value: Any, column: str, where: str) -> bytes:
        """The bytes themselves, or {bytes, path} with either of them."""
        if isinstance(value, Mapping):
            if value.get("bytes") is None and isinstance(value.get("path"), str):
                return storage.read_bytes(storage.join(storage.parent(self.path), value["path"]))
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise SourceError(f"{where}: no image in column {column}")
        return value


def _stated(value: Any) -> Any:
    """Without what a struct has for every row, although this one does not say it: nulls. Other encoded files
    are not kept either.
    """
    if isinstance(value, Mapping):
        return {k: _stated(v) for k, v in value.items() if v is not None and not isinstance(v, bytes)}
    return [_stated(item) for item in value] if isinstance(value, list) else value


@lru_cache(maxsize=_GROUPS_KEPT)
def _read_group(path: str, group: int) -> pa.Table:
    with storage.open_binary(path) as file:
        return pq.ParquetFile(file).read_row_group(group, use_threads=False)


@dataclass(slots=True)
class ParquetSource:
    """Parquet files, a shard per row group."""

    name: str
    groups: dict[str, tuple[str, int, str]] = field(repr=False)

    @classmethod
    def open(cls, spec: str, paths: list[str]) -> "ParquetSource":
        groups: dict[str, tuple[str, int, str]] = {}
        for stem, path in storage.shard_names(paths).items():
            try:
                with storage.open_binary(path) as file:
                    parquet = pq.ParquetFile(file)
                    names, num_groups = parquet.schema_arrow.names, parquet.num_row_groups
            except (OSError, pa.ArrowException) as error:
                raise SourceError(f"{path}: not a readable parquet file: {error}") from error
            image = find_column(names, IMAGE_COLUMNS, "image", path)
            find_column(names, (*CAPTION_COLUMNS, *TASK_COLUMNS), "caption", path)
            for group in range(num_groups):
                groups[stem if num_groups == 1 else f"{stem}-{group:05d}"] = (path, group, image)
        if not groups:
            raise SourceError(f"{spec}: no rows")
        return cls(spec, groups)

    def shards(self) -> Sequence[str]:
        return list(self.groups)

    def index(self, shard: str) -> ShardIndex:
        path, group, image = self.groups[shard]
        try:
            with storage.open_binary(path) as file:
                parquet = pq.ParquetFile(file)
                names = [name for name in KEY_COLUMNS if name in parquet.schema_arrow.names]
                num_rows = parquet.metadata.row_group(group).num_rows
                first = sum(parquet.metadata.row_group(g).num_rows for g in range(group))
                columns = parquet.read_row_group(group, columns=names, use_threads=False).to_pydict()
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{path}: cannot be read: {error}") from error
        records: dict[str, Record] = {}
        rejects: list[Reject] = []
        for row in range(num_rows):
            key = row_key({name: values[row] for name, values in columns.items()}, first + row)
            if key in records:
                rejects.append(Reject(shard, key, f"row {first + row}: duplicate key, the first one stays"))
            else:
                records[key] = ParquetRecord(self.name, shard, key, path, group, row, image)
        return ShardIndex(list(records.values()), rejects)
