"""What a source holds, for tests of what reads it."""

from openblip.data.sample import Reject, Sample, Source


def items_of(source: Source, **arguments: object) -> list[Sample | Reject]:
    """Every sample and reject of every shard, in order."""
    return [item for shard in source.shards() for _, item in source.read(shard, **arguments)]  # type: ignore[arg-type]
