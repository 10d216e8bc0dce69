"""A new decision about what a CapFilt run keeps, without a model run.

What depends on the texts of all shards (repeats, the largest weight) is computed here and stored beside the run:

```
DIR/selected/<folder>/<shard>.parquet  key, source, index, kept and weight of every text, in the caption file's order
```

Every call writes a folder of its own, which is whole before the manifest names it: `capfilt:DIR` follows the earlier
decision until then.
"""

import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openblip.capfilt.check import report_at
from openblip.capfilt.folder import CapFiltFolder, RunScores
from openblip.capfilt.report import write_report
from openblip.data.captions import CAPTION_SCHEMA, SCORE_KEYS, decided_file, read_texts, text_columns
from openblip.data.decision import Decision, Rule, judge
from openblip.data.reader import read_ahead
from openblip.errors import ConfigError
from openblip.files import atomic_file, remove_folder, write_json

SHARDS_AHEAD = 32
FILES_AT_ONCE = 16  # most of their time is waiting for the disk
# A caption without outer and double spaces; most have none, and are not rewritten
_SPACED = r"""
CASE WHEN regexp_matches(caption, '[^\S ]|^ | $|  ')
    THEN trim(regexp_replace(caption, '\s+', ' ', 'g')) ELSE caption END
"""


def select(
    directory: str | Path,
    threshold: float | None = None,
    rule: Rule = Rule(),  # noqa: B008 (frozen)
) -> RunScores:
    """Give the run in `directory` another `Decision` and a new report, and return what is kept now.

    The arguments are the whole decision; those of an earlier one are forgotten. Without a `threshold` it is the run's,
    or none where an expression decides in its place; without `best_captions` the run's own number of candidates that
    are kept, if it has one. `capfilt:DIR` and `capfilt-export` follow at once.

    Raises `ConfigError` for a decision that the texts cannot be judged by, such as one about a column that there is
    not, and when the folder is not a CapFilt run; nothing is changed then.
    """
    folder = CapFiltFolder(directory)
    manifest = folder.read_manifest()
    if threshold is None and rule.where is None and rule.weight is None:
        threshold = manifest["threshold"]
    decision = Decision(**vars(rule), threshold=threshold)
    if decision.best_captions is None:
        decision = replace(decision, best_captions=manifest["config"].get("keep_best"))
    _decide(folder, decision)
    return write_report(folder.root)


def decide_again(folder: CapFiltFolder) -> None:
    """Compute a decision that needs all shards anew, for those that were not there when it was made."""
    if (decision := folder.decision).needs_all_shards:
        _decide(folder, decision)


def _decide(folder: CapFiltFolder, decision: Decision) -> None:
    """Judge every finished shard, store what needs all of them, and then name the decision in the manifest."""
    shards = folder.done_shards()
    decision.check(read_texts(folder.root, shards[0]).schema if shards else CAPTION_SCHEMA)
    judged = _judged(folder, shards, decision)
    if decision.needs_all_shards:
        stored = uuid.uuid4().hex[:16]
        if decision.max_repeats is not None:
            judged = _without_repeats(judged, len(shards), decision.max_repeats)

        def store(shard_texts: tuple[str, pa.Table]) -> float:
            """Write what is decided of a shard, and return its largest weight."""
            shard, texts = shard_texts
            with atomic_file(decided_file(folder.root, stored, shard)) as partial:
                pq.write_table(texts.select([*SCORE_KEYS, "kept", "weight"]), partial, compression="zstd")
            return float(texts["weight"].to_numpy().max(initial=0.0))

        in_order = zip(shards, judged, strict=True)
        weights = read_ahead(in_order, store, num_workers=FILES_AT_ONCE, ahead=SHARDS_AHEAD)
        decision = replace(decision, stored=stored, largest_weight=max(weights, default=0.0) or 1.0)
    else:
        for _ in judged:  # so that a decision that cannot be computed is not made
            pass
    manifest = folder.read_manifest()
    # The threshold alone is what earlier versions read
    threshold = manifest["threshold"] if decision.threshold is None else decision.threshold
    manifest |= {"threshold": threshold, "decision": asdict(decision)}
    if "filter_check" in manifest:
        manifest["filter_check"] = {**manifest["filter_check"], **report_at(folder.root, threshold)}
    write_json(folder.manifest, manifest)
    for earlier in (folder.root / "selected").glob("*"):
        if earlier.name != decision.stored:
            remove_folder(earlier)


def _judged(folder: CapFiltFolder, shards: Sequence[str], decision: Decision) -> Iterator[pa.Table]:
    """The texts of each shard as the decision judges them, in order; several are read at once."""

    def judge_shard(shard: str) -> pa.Table:
        try:
            columns = decision.reads(text_columns(folder.root, shard))
            return judge(read_texts(folder.root, shard, columns), decision)
        except ConfigError as error:
            raise ConfigError(f"{folder.file(shard, 'parquet')}: {error}") from error

    return read_ahead(iter(shards), judge_shard, num_workers=None, ahead=SHARDS_AHEAD)


def _without_repeats(judged: Iterator[pa.Table], num_shards: int, most: int) -> Iterator[pa.Table]:
    """The same texts, of which no more than `most` that are equal are kept: those with the highest ITM.

    All shards are read before the first is given out. What has to be remembered of them is on the disk.
    """
    with tempfile.TemporaryDirectory(prefix="openblip-") as scratch, duckdb.connect(f"{scratch}/texts") as database:
        database.execute("BEGIN")  # one transaction: a commit waits for the disk
        database.execute("CREATE TABLE texts (caption UBIGINT, itm FLOAT, shard INTEGER, row INTEGER)")
        for number, texts in enumerate(judged):
            rows = pa.array(np.arange(texts.num_rows, dtype=np.int32))
            database.register("kept", texts.append_column("row", rows).filter(texts["kept"]))
            database.execute(f"INSERT INTO texts SELECT hash(lower({_SPACED})), itm, {number}, row FROM kept")
            database.unregister("kept")
            pq.write_table(texts.select([*SCORE_KEYS, "kept", "weight"]), f"{scratch}/{number}.parquet")
        database.execute(f"""
            CREATE TABLE surplus AS
            WITH repeated AS (SELECT caption FROM texts GROUP BY caption HAVING count(*) > {most}),
            placed AS (
                SELECT shard, row, row_number() OVER (PARTITION BY caption ORDER BY itm DESC, shard, row) AS place
                FROM texts SEMI JOIN repeated USING (caption)
            )
            SELECT shard, row FROM placed WHERE place > {most} ORDER BY shard
        """)
        for number in range(num_shards):
            texts = pq.read_table(f"{scratch}/{number}.parquet")
            surplus = database.execute("SELECT row FROM surplus WHERE shard = ?", [number]).fetchnumpy()["row"]
            for name in ("kept", "weight"):
                values = texts[name].to_numpy().copy()
                values[surplus] = 0
                texts = texts.set_column(texts.column_names.index(name), name, pa.array(values))
            yield texts
