"""A part of a source, `SOURCE[:95%]` or `SOURCE[95%:]`: how a set is split for training and evaluation."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from openblip.data.sample import Located, Sample, Selection, Source
from openblip.errors import SourceError
from openblip.files import hash_int

_SLICE = re.compile(r"^(?P<spec>.+)\[(?:(?P<start>\d+)%)?:(?:(?P<stop>\d+)%)?\]$")


def split_slice(spec: str) -> tuple[str, tuple[int, int] | None]:
    """`a.tar[10%:]` -> `a.tar`, (10, 100); a spec without a slice -> itself, None.

    Raises `SourceError` for an empty slice.
    """
    match = _SLICE.match(spec)
    if match is None:
        return spec, None
    start, stop = int(match["start"] or 0), int(match["stop"] or 100)
    if not 0 <= start < stop <= 100:
        raise SourceError(f"{spec}: a part goes from a smaller to a larger percentage, as in [:95%] or [95%:]")
    return match["spec"], (start, stop)


@dataclass
class PercentSlice(Source):
    """The samples whose image falls between `start` and `stop` percent.

    A hash of the data set's own image id decides, or of the name of the shard's file and the key where it has none. So
    nothing is counted, no image is on both sides of a split, and a copy of the source elsewhere is split in the same
    way. The rejects of the whole source are given by every slice.
    """

    name: str
    whole: Source = field(repr=False)
    start: int
    stop: int

    @classmethod
    def open(cls, spec: str, whole: Source, start: int, stop: int) -> "PercentSlice":
        """Read texts until a sample of the slice is met; raises `SourceError` when there is none."""
        source = cls(spec, whole, start, stop)
        failure: SourceError | None = None
        for shard in whole.shards():
            try:
                if any(isinstance(item, Sample) for _, item in source.read(shard, images=False)):
                    return source
            except SourceError as error:  # of this shard; others may be whole
                failure = failure or error
        raise failure or SourceError(f"{spec}: no sample falls into this part; the source is too small")

    def shards(self) -> Sequence[str]:
        return self.whole.shards()

    def has_shard(self, shard: str) -> bool:
        return self.whole.has_shard(shard)

    def file_name(self, shard: str) -> str:
        return self.whole.file_name(shard)

    @property
    def image_id_prefix(self) -> str:
        return self.whole.image_id_prefix

    def describe(self) -> Mapping[str, object]:
        return self.whole.describe()

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        def is_outside(sample: Sample) -> bool:
            return not self._has(sample) or selection.skips(sample)

        return self.whole.read_selected(shard, selection._replace(skip=is_outside))

    def _has(self, sample: Sample) -> bool:
        image_id = sample.image_id.removeprefix(self.image_id_prefix)
        if not image_id.startswith("#"):  # then it is shard and key
            image_id = f"{self.file_name(sample.shard)}/{image_id.removeprefix(f'/{sample.shard}/')}"
        return self.start <= hash_int(image_id) % 100 < self.stop
