"""Several sources one after the other, for all that reads a source once: captions, CapFilt, evaluation."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from openblip.data.sample import Located, Sample, Selection, Source


@dataclass
class JoinedSource(Source):
    """The shards of all sources in order. Before a shard's name stands the number of its source, from 1 on, so that two
    sources may have shards of the same name.
    """

    name: str
    sources: tuple[Source, ...] = field(repr=False)

    def __post_init__(self) -> None:
        self.option_names = {name for source in self.sources for name in source.option_names}
        self.lacks = next((source.lacks for source in self.sources if source.lacks), "")

    def shards(self) -> Sequence[str]:
        return [f"{number}-{shard}" for number, source in enumerate(self.sources, 1) for shard in source.shards()]

    def has_shard(self, shard: str) -> bool:
        number, _, own_name = shard.partition("-")
        is_number = number.isdecimal() and 1 <= int(number) <= len(self.sources)
        return is_number and self.sources[int(number) - 1].has_shard(own_name)

    def file_name(self, shard: str) -> str:
        source, own_name = self._find(shard)
        return source.file_name(own_name)

    def image_id_prefix(self, shard: str) -> str:
        source, own_name = self._find(shard)
        return source.image_id_prefix(own_name)

    def num_samples(self, shard: str) -> int | None:
        source, own_name = self._find(shard)
        return source.num_samples(own_name)

    @property
    def unused(self) -> Mapping[str, Counter[str]]:  # type: ignore[override]
        """Of every source, by its number before the name of the shard."""
        numbered = enumerate(self.sources, 1)
        return {f"{number}-{shard}": count for number, source in numbered for shard, count in source.unused.items()}

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        source, own_name = self._find(shard)

        def is_skipped(sample: Sample) -> bool:
            return selection.skips(replace(sample, shard=shard))

        for number, item in source.read_selected(own_name, selection._replace(skip=is_skipped)):
            yield Located(number, replace(item, shard=shard))

    def _find(self, shard: str) -> tuple[Source, str]:
        number, _, own_name = shard.partition("-")
        return self.sources[int(number) - 1], own_name
