"""A part of a source, `SOURCE[:95%]` or `SOURCE[95%:]`: how a set is split for training and evaluation."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from openblip.data.sample import Described, ShardIndex, Source
from openblip.errors import SourceError

_PART = re.compile(r"^(?P<spec>.+)\[(?:(?P<start>\d+)%)?:(?:(?P<stop>\d+)%)?\]$")


def split_part(spec: str) -> tuple[str, tuple[int, int] | None]:
    """`a.tar[10%:]` -> `a.tar`, (10, 100); a spec without a part -> itself, None.

    Raises `SourceError` for an empty part.
    """
    found = _PART.match(spec)
    if found is None:
        return spec, None
    start, stop = int(found["start"] or 0), int(found["stop"] or 100)
    if not 0 <= start < stop <= 100:
        raise SourceError(
            f"{spec}: a part goes from a smaller to a larger percentage, as in [:95%] or [95%:]"
        )
    return found["spec"], (start, stop)


@dataclass(frozen=True, slots=True)
class PartSource:
    """The records of every shard from `start` to `stop` percent, in file order; parts that meet do not
    overlap."""

    name: str
    whole: Source = field(repr=False)
    start: int
    stop: int

    def shards(self) -> Sequence[str]:
        return self.whole.shards()

    def index(self, shard: str) -> ShardIndex:
        index = self.whole.index(shard)
        first, last = (len(index.records) * share // 100 for share in (self.start, self.stop))
        return ShardIndex(index.records[first:last], index.rejects)

    def describe(self) -> Mapping[str, object]:
        """What the whole source says of itself, nothing where it says nothing."""
        return self.whole.describe() if isinstance(self.whole, Described) else {}
