"""Texts that stand on many images: a title of a shop or the name of a site says nothing of an image, and drowns what
other texts teach.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

from openblip.data.texts import normalize_caption
from openblip.files import hash_int

MOST_TEXTS = 500_000  # that are counted
MIN_IMAGES, MIN_SHARE = 20, 0.001  # of one text, to count as repeated
LARGE_SHARE = 0.05  # the share of all texts that repeated ones have together
MANY_IMAGES = 1000  # of one text, worth saying at any share


class Repeats(NamedTuple):
    """How many texts were counted, and the repeated ones with their numbers of images, the most frequent first."""

    num_texts: int
    texts: list[tuple[str, int]]

    @property
    def num_repeated(self) -> int:
        return sum(count for _, count in self.texts)

    def line(self) -> str:
        """What is worth saying of them; empty where there is nothing."""
        if not self.texts:
            return ""
        share, (text, most) = self.num_repeated / self.num_texts, self.texts[0]
        if share < LARGE_SHARE and most < MANY_IMAGES:
            return ""
        shown = text if len(text) <= 60 else f"{text[:59]}…"
        few = f"one text stands on {most:,} of {self.num_texts:,} images ({share:.0%}): {shown!r}"
        many = (
            f"{len(self.texts)} texts stand on {self.num_repeated:,} of {self.num_texts:,} images ({share:.0%}), the "
            f"most frequent on {most:,}: {shown!r}"
        )
        return few if len(self.texts) == 1 else many


def count_repeats(texts: Iterable[str]) -> Repeats:
    """Count texts, alike after normalisation, of the first `MOST_TEXTS` at most."""
    counts: Counter[int] = Counter()
    originals: dict[int, str] = {}  # of those that were met twice
    for text in islice(texts, MOST_TEXTS):
        number = hash_int(normalize_caption(text))
        counts[number] += 1
        if counts[number] == 2:
            originals[number] = text
    least = max(MIN_IMAGES, MIN_SHARE * counts.total())
    repeated = [(originals[number], count) for number, count in counts.items() if count >= least]
    return Repeats(counts.total(), sorted(repeated, key=lambda each: (-each[1], each[0])))
