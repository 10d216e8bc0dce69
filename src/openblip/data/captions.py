"""The caption files of a CapFilt run: one row per text, nothing dropped; selection happens at reading."""

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openblip.errors import SourceError
from openblip.files import atomic_file

_ROWS_PER_GROUP = 8192

_COLUMNS = {
    "key": pa.string(), "shard": pa.string(), "index": pa.int32(), "source": pa.string(), "caption": pa.string(),
    "itm": pa.float32(), "itc": pa.float32(), "logprob": pa.float32(),
}  # fmt: skip
CAPTION_SCHEMA = pa.schema([pa.field(name, kind, nullable=name == "logprob") for name, kind in _COLUMNS.items()])


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionRow:
    """One text of one image. `index` counts the texts of a source within the sample; `itm` is P(match), `itc` the
    cosine, `logprob` the captioner's own score, None for web text.
    """

    key: str
    shard: str
    index: int
    source: Literal["web", "synthetic"]
    caption: str
    itm: float
    itc: float
    logprob: float | None = None


def is_kept(itm: Any, threshold: float) -> Any:
    """BLIP's filter: P(match) strictly above the threshold, for one score or an array of them. Compared in float64, so
    that a stored float32 score is judged the same alone and in an array.
    """
    return np.asarray(itm, dtype=np.float64) > threshold


def write_captions(path: str | Path, rows: Iterable[CaptionRow]) -> None:
    """Write one shard's rows as parquet, as they come, so that memory does not grow with them. The file appears whole,
    and on the disk, or not at all.
    """
    remaining = iter(rows)
    with atomic_file(path) as partial, pq.ParquetWriter(partial, CAPTION_SCHEMA, compression="zstd") as writer:
        while group := [asdict(row) for row in itertools.islice(remaining, _ROWS_PER_GROUP)]:
            writer.write_table(pa.Table.from_pylist(group, schema=CAPTION_SCHEMA))


def read_captions(directory: str | Path, shard: str) -> pa.Table:
    """Every row of `directory/captions/<shard>.parquet`, in the order written, with the columns of `CAPTION_SCHEMA`.
    Raises `SourceError` when the file is missing, damaged or has other columns.
    """
    path = Path(directory) / "captions" / f"{shard}.parquet"
    try:
        return pq.read_table(path, columns=CAPTION_SCHEMA.names).select(CAPTION_SCHEMA.names).cast(CAPTION_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: not a caption file of CapFilt: {error}") from error


def finished_shards(directory: str | Path) -> list[str]:
    """The shards whose report is written: a report is written last, so it means done."""
    suffix = ".report.json"
    return sorted(path.name.removesuffix(suffix) for path in (Path(directory) / "captions").glob(f"*{suffix}"))
