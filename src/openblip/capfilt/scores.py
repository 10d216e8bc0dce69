"""The scores of a run as arrays: what is kept at a threshold, and how ITM probabilities are spread.

R rows (texts) of a shard, I images of a shard.
"""

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


@dataclass
class RunScores:
    """The scores of the shards that were added, at one threshold."""

    images: int = 0
    sources: dict[str, SourceScores] = field(default_factory=lambda: {name: SourceScores() for name in SOURCES})
    combinations: dict[tuple[bool, bool], int] = field(default_factory=lambda: dict.fromkeys(COMBINATIONS, 0))
    """For each of `COMBINATIONS`, the images whose first web and first synthetic text fared so. Images without web text
    are in none."""

    @property
    def texts(self) -> int:
        return sum(scores.texts for scores in self.sources.values())

    @property
    def kept(self) -> int:
        return sum(scores.kept for scores in self.sources.values())

    def add_shard(self, captions: Path, threshold: float) -> dict[tuple[bool, bool], Array]:
        """Add the scores in one caption file, and return the first rows (int64) of the images of each combination.

        Only the score columns are read.
        """
        table = pq.read_table(captions, columns=["key", "index", "source", "itm"])
        itm = table["itm"].to_numpy()  # (R,) float32
        kept = is_kept(itm, threshold)  # (R,) bool
        key = table["key"].combine_chunks()
        starts_image = np.ones(len(itm), bool)  # the rows of an image stand together
        if len(itm) > 1:
            starts_image[1:] = pc.not_equal(key[1:], key[:-1]).to_numpy(zero_copy_only=False)
        first_rows = np.flatnonzero(starts_image)  # (I,)
        image = np.cumsum(starts_image) - 1  # (R,) number of the image that a row belongs to
        is_first = table["index"].to_numpy() == 0
        fate = {name: np.full(len(first_rows), -1, np.int8) for name in SOURCES}  # (I,) -1: no such text
        self.images += len(first_rows)
        for name, scores in self.sources.items():
            rows = pc.equal(table["source"], name).to_numpy(zero_copy_only=False)  # (R,) bool
            scores.texts += int(rows.sum())
            scores.kept += int(kept[rows].sum())
            scores.histogram += np.histogram(itm[rows], bins=NUM_BINS, range=(0.0, 1.0))[0].astype(np.int64)
            firsts = np.flatnonzero(is_first & rows)
            fate[name][image[firsts]] = kept[firsts]
        rows_of = {
            (web, synthetic): first_rows[(fate["web"] == web) & (fate["synthetic"] == synthetic)]
            for web, synthetic in COMBINATIONS
        }
        for combination, firsts in rows_of.items():
            self.combinations[combination] += len(firsts)
        return rows_of
