"""The scores of a run as arrays: what is kept at a threshold, and how ITM probabilities are spread.

R rows (texts) of a shard, I images of a shard.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from openblip.data.captions import is_kept

Array = np.ndarray[Any, Any]

SOURCES = ("web", "synthetic")
NUM_BINS = 40
COMBINATIONS = ((False, True), (True, True), (True, False), (False, False))
"""(web kept, synthetic kept) of an image's first texts, in the order a report shows them."""


@dataclass
class SourceScores:
    """Texts of one source, those kept, and how many fall into each of `NUM_BINS` equal bins of [0, 1]."""

    texts: int = 0
    kept: int = 0
    histogram: Array = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))

    def add(self, other: "SourceScores") -> None:
        self.texts += other.texts
        self.kept += other.kept
        self.histogram += other.histogram


@dataclass(frozen=True)
class ShardScores:
    """The scores of one shard.

    combinations: for each of `COMBINATIONS`, the first rows (int64) of the images whose first web and first
    synthetic text fared so. Images without web text are in none.
    """

    images: int
    sources: dict[str, SourceScores]
    combinations: dict[tuple[bool, bool], Array]


@dataclass
class RunScores:
    """The scores of all shards of a run, added up."""

    images: int = 0
    sources: dict[str, SourceScores] = field(default_factory=lambda: {name: SourceScores() for name in SOURCES})
    combinations: dict[tuple[bool, bool], int] = field(default_factory=lambda: dict.fromkeys(COMBINATIONS, 0))

    def add(self, shard: ShardScores) -> None:
        self.images += shard.images
        for name, scores in shard.sources.items():
            self.sources[name].add(scores)
        for combination, rows in shard.combinations.items():
            self.combinations[combination] += len(rows)

    @property
    def texts(self) -> int:
        return sum(scores.texts for scores in self.sources.values())

    @property
    def kept(self) -> int:
        return sum(scores.kept for scores in self.sources.values())


def read_scores(captions: Path, threshold: float) -> ShardScores:
    """The scores in one caption file. Only the score columns are read."""
    table = pq.read_table(captions, columns=["key", "index", "source", "itm"])
    itm = table["itm"].to_numpy()  # (R,) float32
    kept = is_kept(itm, threshold)  # (R,) bool
    source = {name: pc.equal(table["source"], name).to_numpy(zero_copy_only=False) for name in SOURCES}
    key = table["key"].combine_chunks()
    starts_image = np.ones(len(itm), bool)  # the rows of an image stand together
    if len(itm) > 1:
        starts_image[1:] = pc.not_equal(key[1:], key[:-1]).to_numpy(zero_copy_only=False)
    first_rows = np.flatnonzero(starts_image)  # (I,)
    image = np.cumsum(starts_image) - 1  # (R,) number of the image that a row belongs to
    is_first = table["index"].to_numpy() == 0
    fate = {name: np.full(len(first_rows), -1, np.int8) for name in SOURCES}  # (I,) -1: no such text
    for name in SOURCES:
        rows = np.flatnonzero(is_first & source[name])
        fate[name][image[rows]] = kept[rows]
    return ShardScores(
        images=len(first_rows),
        sources={
            name: SourceScores(
                texts=int(rows.sum()),
                kept=int(kept[rows].sum()),
                histogram=np.histogram(itm[rows], bins=NUM_BINS, range=(0.0, 1.0))[0].astype(np.int64),
            )
            for name, rows in source.items()
        },
        combinations={
            (web, synthetic): first_rows[(fate["web"] == web) & (fate["synthetic"] == synthetic)]
            for web, synthetic in COMBINATIONS
        },
    )


def read_run_scores(captions: Iterable[Path], threshold: float) -> RunScores:
    """The scores of several caption files, added up."""
    total = RunScores()
    for path in captions:
        total.add(read_scores(path, threshold))
    return total
