"""The caption files of a CapFilt run: one row per text, nothing dropped; selection happens at reading.

`DIR/scores/<name>/<shard>.parquet` holds a further score of the same rows, in the same order; its report, written last,
means that it is finished.
"""

import glob
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from openblip.data.decision import Decision, join_texts, judge
from openblip.errors import ConfigError, SourceError
from openblip.files import atomic_file, locate

_ROWS_PER_GROUP = 8192

_COLUMNS = {
    "key": pa.string(), "shard": pa.string(), "index": pa.int32(), "source": pa.string(), "caption": pa.string(),
    "itm": pa.float32(), "itc": pa.float32(), "logprob": pa.float32(),
}  # fmt: skip
SCORE_KEYS = ("key", "source", "index")  # the columns of a score file before its value
_RANK = pa.field("rank", pa.int32())  # of runs that rank their synthetic texts
CAPTION_SCHEMA = pa.schema([pa.field(name, kind, nullable=name == "logprob") for name, kind in _COLUMNS.items()])


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionRow:
    """One text of one image. `index` counts the texts of a source within the sample; `itm` is P(match), `itc` the
    cosine, `logprob` the captioner's own score, None for web text. `rank` is the place among the synthetic texts of the
    image, from 1, in runs that rank them.
    """

    key: str
    shard: str
    index: int
    source: Literal["web", "synthetic"]
    caption: str
    itm: float
    itc: float
    logprob: float | None = None
    rank: int | None = None


def caption_file(directory: str | Path, shard: str) -> Path:
    """`DIR/captions/<shard>.parquet`."""
    return locate(directory) / "captions" / f"{shard}.parquet"


def write_captions(path: str | Path, rows: Iterable[CaptionRow], *, has_ranks: bool = False) -> None:
    """Write one shard's rows as parquet, as they come, so that memory does not grow with them. The file appears whole,
    and on the disk, or not at all. has_ranks: whether there is a column `rank`.
    """
    remaining, schema = iter(rows), CAPTION_SCHEMA.append(_RANK) if has_ranks else CAPTION_SCHEMA
    with atomic_file(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        while group := [asdict(row) for row in itertools.islice(remaining, _ROWS_PER_GROUP)]:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def read_captions(directory: str | Path, shard: str) -> pa.Table:
    """Every row of `directory/captions/<shard>.parquet`, in the order written, with the columns of `CAPTION_SCHEMA`.
    Raises `SourceError` when the file is missing, damaged or has other columns.
    """
    path = caption_file(directory, shard)
    try:
        with path.open("rb") as file:
            table = pq.read_table(file, columns=CAPTION_SCHEMA.names)
        return table.select(CAPTION_SCHEMA.names).cast(CAPTION_SCHEMA)
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
    path = caption_file(directory, shard)
    scores = finished_scores(directory, shard)
    try:
        with path.open("rb") as stream, pq.ParquetFile(stream) as file:
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
        table = table.append_column(name, _read_values(score_file(directory, name, shard), name, table))
    return table.select(wanted)


def _read_values(path: Path, name: str, texts: pa.Table) -> pa.ChunkedArray:
    """A column of a file about the rows of `texts`, whose `SCORE_KEYS` are compared with the file's."""
    try:
        with path.open("rb") as file:
            values = pq.read_table(file, columns=[*SCORE_KEYS, name])
        is_same = values.num_rows == texts.num_rows and all(values[key].equals(texts[key]) for key in SCORE_KEYS)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: not a score file of CapFilt: {error}") from error
    if not is_same:
        raise SourceError(f"{path}: is about other texts than the caption file; remove it and compute it again")
    return values[name]


def text_columns(directory: str | Path, shard: str) -> list[str]:
    """The names of the columns that `read_texts` has of a shard. Raises `SourceError` as it does."""
    path = caption_file(directory, shard)
    try:
        with path.open("rb") as file:
            names = list(pq.read_schema(file).names)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: not a caption file of CapFilt: {error}") from error
    return names + [name for name in finished_scores(directory, shard) if name not in names]


def read_judged(
    directory: str | Path, shard: str, decision: Decision, columns: Sequence[str] | None = None
) -> pa.Table:
    """The texts of a finished shard with the columns `kept` (bool) and `weight` (float64, 0 where not kept).

    columns: read only these of the texts, in this order. What depends on the texts of all shards was computed and
    stored when the decision was made.

    Raises `SourceError` as `read_texts`, and `ConfigError` when the shard lacks a score that the decision uses, or was
    finished after the decision was made.
    """
    path = caption_file(directory, shard)
    available = text_columns(directory, shard)
    wanted = available if columns is None else list(columns)
    if decision.needs_all_shards:
        stored = decided_file(directory, decision.stored or "none", shard)
        if not stored.is_file():
            advice = f"run `openblip capfilt-select {directory}` again with the options of the decision"
            raise ConfigError(f"{path}: finished after the decision on what is kept was made ({decision}); {advice}")
        texts = read_texts(directory, shard, list(dict.fromkeys([*wanted, *SCORE_KEYS])))
        for name in ("kept", "weight"):
            texts = texts.append_column(name, _read_values(stored, name, texts))
    else:
        try:
            read = dict.fromkeys([*wanted, *decision.reads(available)])
            texts = judge(read_texts(directory, shard, list(read)), decision)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return texts.select([*wanted, "kept", "weight"])


def read_kept_pairs(
    directory: str | Path, shard: str, decision: Decision, columns: Sequence[str]
) -> list[dict[str, Any]]:
    """What a run has for training of a shard: the kept texts, with `columns` and their weight.

    Where a decision joins the texts of an image, they are one text of the source "joined". Its scores are the lowest of
    theirs, its weight the largest; other columns, in which they differ, are null. Raises as `read_judged`.
    """
    texts = read_judged(
        directory, shard, decision, list(dict.fromkeys(["key", "index", "source", "caption", *columns]))
    )
    rows: list[dict[str, Any]] = texts.filter(texts["kept"]).drop_columns(["kept"]).to_pylist()
    if decision.repair != "join":
        return rows
    pairs = []
    for _, group in itertools.groupby(rows, itemgetter("key")):  # the rows of an image stand together
        same = list(group)
        pair = {name: value if all(row[name] == value for row in same) else None for name, value in same[0].items()}
        if len(same) > 1:
            pair |= {name: min(row[name] for row in same) for name in ("itm", "itc") if name in pair}
            pair |= {"weight": max(row["weight"] for row in same), "source": "joined", "index": 0}
            pair["caption"] = join_texts(row["caption"] for row in same)
        pairs.append(pair)
    return pairs


def decided_file(directory: str | Path, folder: str, shard: str) -> Path:
    """Where `capfilt-select` stores what needs all shards: columns `SCORE_KEYS`, kept and weight of every text."""
    return locate(directory) / "selected" / folder / f"{shard}.parquet"


EMBEDDING_IMAGE = "image"  # the `source` of the row of an image; its texts have theirs
WriteEmbeddings = Callable[[Sequence[str], Sequence[str], Sequence[int], np.ndarray[Any, Any]], None]
"""Is given keys, sources, indices and unit vectors (R, E)."""


@contextmanager
def embedding_writer(path: str | Path, dim: int) -> Iterator[WriteEmbeddings]:
    """Write one shard's embeddings of width `dim` in float16; they appear whole or not at all. Yields what is called
    with some rows at a time.
    """
    kinds = [(name, _COLUMNS[name]) for name in SCORE_KEYS]
    schema = pa.schema([*kinds, ("embedding", pa.list_(pa.float16(), dim))])
    with atomic_file(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:

        def write(
            keys: Sequence[str], sources: Sequence[str], indices: Sequence[int], vectors: np.ndarray[Any, Any]
        ) -> None:
            flat = pa.array(vectors.astype(np.float16).reshape(-1))
            columns = [keys, sources, indices, pa.FixedSizeListArray.from_arrays(flat, dim)]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

        yield write


def embedding_file(directory: str | Path, shard: str) -> Path:
    """`DIR/embeddings/<shard>.parquet`."""
    return locate(directory) / "embeddings" / f"{shard}.parquet"


class ShardEmbeddings(NamedTuple):
    """Unit vectors of a shard, float16: of its images, in order, and of the texts of its caption file, row by row. I
    images, R texts, E their width."""

    images: np.ndarray[Any, Any]  # (I, E)
    texts: np.ndarray[Any, Any]  # (R, E)


def read_embeddings(directory: str | Path, shard: str) -> ShardEmbeddings:
    """Read `DIR/embeddings/<shard>.parquet`; raises `SourceError` where it is missing, damaged or about other texts."""
    path = embedding_file(directory, shard)
    texts = read_texts(directory, shard, SCORE_KEYS)
    try:
        with path.open("rb") as file:
            table = pq.read_table(file)
        vectors = table["embedding"].combine_chunks()
        dim = vectors.type.list_size
        flat = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
        is_image = pc.equal(table["source"], EMBEDDING_IMAGE).to_numpy(zero_copy_only=False)
        of_texts = table.filter(~is_image)
        is_same = of_texts.num_rows == len(texts) and all(of_texts[key].equals(texts[key]) for key in SCORE_KEYS)
    except (OSError, pa.ArrowException, KeyError, AttributeError) as error:
        raise SourceError(f"{path}: no file of CapFilt's embeddings: {error}") from error
    if not is_same:
        raise SourceError(f"{path}: is about other texts than the caption file")
    return ShardEmbeddings(flat[is_image], flat[~is_image])


def finished_scores(directory: str | Path, shard: str) -> list[str]:
    """The names of the scores that are finished for a shard, sorted."""
    reports = (locate(directory) / "scores").glob(f"*/{glob.escape(shard)}.report.json")
    return sorted(report.parent.name for report in reports)


def score_file(directory: str | Path, name: str, shard: str, suffix: str = "parquet") -> Path:
    """`DIR/scores/<name>/<shard>.<suffix>`: parquet, or report.json."""
    return locate(directory) / "scores" / name / f"{shard}.{suffix}"


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
    return sorted(path.name.removesuffix(suffix) for path in (locate(directory) / "captions").glob(f"*{suffix}"))
