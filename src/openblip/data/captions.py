"""The caption files of a CapFilt run: one row per text, nothing dropped; selection happens at reading.

`DIR/scores/<name>/<shard>.parquet` holds a further score of the same rows, in the same order; its report, written last,
means that it is finished.
"""

import glob
import itertools
from collections.abc import Iterable, Sequence
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
SCORE_KEYS = ("key", "source", "index")  # the columns of a score file before its value
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


def read_texts(directory: str | Path, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a shard with its scores: the columns of the caption file, then one column for each finished score, by
    name, in the order of the caption file.

    columns: read only these, in this order; a score of which only some shards are finished is not among the columns of
    the others.

    Raises `SourceError` when a file is missing, damaged or about other texts, and for a column that is not there, with
    those that are.
    """
    path = Path(directory) / "captions" / f"{shard}.parquet"
    scores = finished_scores(directory, shard)
    try:
        with pq.ParquetFile(path) as file:
            available = list(file.schema_arrow.names)
            available += [name for name in scores if name not in available]
            if missing := [name for name in columns or () if name not in available]:
                raise SourceError(
                    f"{path}: no column {', '.join(missing)}; there are {', '.join(available)}. "
                    "`openblip capfilt-score` adds columns, to the shards that are finished when it runs"
                )
            wanted = available if columns is None else list(columns)
            joined = [name for name in scores if name in wanted and name not in file.schema_arrow.names]
            stored = [name for name in file.schema_arrow.names if name in wanted or (joined and name in SCORE_KEYS)]
            table = file.read(columns=stored).select(stored)
            kinds = [pa.field(name, _COLUMNS.get(name, table.field(name).type)) for name in stored]
            table = table.cast(pa.schema(kinds))
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: not a caption file of CapFilt: {error}") from error
    for name in joined:
        table = table.append_column(name, _read_score(directory, shard, name, table))
    return table.select(wanted)


def _read_score(directory: str | Path, shard: str, name: str, texts: pa.Table) -> pa.ChunkedArray:
    """The values of a score of the rows of `texts`, whose `SCORE_KEYS` are compared with the score file's."""
    path = score_file(directory, name, shard)
    try:
        scores = pq.read_table(path, columns=[*SCORE_KEYS, name])
        is_same = scores.num_rows == texts.num_rows and all(scores[key].equals(texts[key]) for key in SCORE_KEYS)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: not a score file of CapFilt: {error}") from error
    if not is_same:
        raise SourceError(f"{path}: holds scores of other texts than the caption file; remove it and score again")
    return scores[name]


def finished_scores(directory: str | Path, shard: str) -> list[str]:
    """The names of the scores that are finished for a shard, sorted."""
    reports = (Path(directory) / "scores").glob(f"*/{glob.escape(shard)}.report.json")
    return sorted(report.parent.name for report in reports)


def score_file(directory: str | Path, name: str, shard: str, suffix: str = "parquet") -> Path:
    """`DIR/scores/<name>/<shard>.<suffix>`: parquet, or report.json."""
    return Path(directory) / "scores" / name / f"{shard}.{suffix}"


def write_score(directory: str | Path, shard: str, name: str, values: pa.Array) -> None:
    """Write the values of a score, one for each row of the caption file, whole or not at all. The report is written
    after it, by the caller.
    """
    texts = read_texts(directory, shard, SCORE_KEYS)
    with atomic_file(score_file(directory, name, shard)) as partial:
        pq.write_table(texts.append_column(name, values), partial, compression="zstd", row_group_size=_ROWS_PER_GROUP)


def finished_shards(directory: str | Path) -> list[str]:
    """The shards whose report is written: a report is written last, so it means done."""
    suffix = ".report.json"
    return sorted(path.name.removesuffix(suffix) for path in (Path(directory) / "captions").glob(f"*{suffix}"))
