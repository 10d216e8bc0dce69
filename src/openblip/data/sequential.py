"""One ordered pass over a source, for evaluation and inspection."""

from collections.abc import Iterator

from openblip.data.sample import Reject, Sample, Source
from openblip.errors import SourceError


def read_samples(source: Source) -> Iterator[Sample | Reject]:
    """Every sample of every shard in file order; what cannot be read comes as a `Reject`.

    Images are not decoded. Raises `SourceError` when a whole shard cannot be opened.
    """
    for shard in source.shards():
        index = source.index(shard)
        for record in index.records:
            try:
                yield record.read()
            except (SourceError, OSError) as error:
                yield Reject(shard, record.key, str(error))
        yield from index.rejects
