"""One ordered pass over a source with read-ahead, for everything that is not training.

Captioning, evaluation, CapFilt and the feature cache read through here: samples come in the source's order,
decoded by threads ahead of the model, and what cannot be read comes as a `Reject`.
"""

import errno
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from openblip.data.sample import Record, Reject, Sample, Source
from openblip.errors import ImageError, SourceError

Prepared = TypeVar("Prepared")

# Errors of the machine, not of the sample: they are raised, so that thousands of good samples are not written
# off during a network outage.
_TRANSIENT = {
    errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENETDOWN, errno.ENETUNREACH,
    errno.EHOSTDOWN, errno.EHOSTUNREACH,
}  # fmt: skip


@dataclass(frozen=True)
class Share:
    """The part of one process of several: of every `count` entries the one at `index`.

    Samples and rejects are counted alike, so the entries of all shares, taken in turns, are the source in
    order.
    """

    index: int = 0
    count: int = 1


def read_source(
    source: Source,
    prepare: Callable[[Sample], Prepared],
    *,
    shards: Sequence[str] | None = None,
    skip: Callable[[str, str], bool] = lambda shard, key: False,
    share: Share = Share(),
    limit: int | None = None,
    num_workers: int = 2,
    ahead: int = 64,
) -> Generator[tuple[Sample, Prepared] | Reject]:
    """Yield each sample with what `prepare` made of it in a thread, in the source's order, or a `Reject`.

    Args:
        source: what is read; each shard once, front to back.
        prepare: runs in threads, usually decodes the image. `SourceError`, `ImageError` and `OSError` make
            the sample a reject; an error of the machine (connection lost, disk error) is raised.
        shards: the shards to read; all when None.
        skip: told shard and key; samples for which it holds are passed over without being read.
        share: the entries of this process, counted over the whole source.
        limit: read only this many samples of the source, before it is shared.
        num_workers: number of threads.
        ahead: at most this many samples wait decoded.

    Raises:
        SourceError: a whole shard cannot be opened.
    """

    def load(record: Record) -> tuple[Sample, Prepared] | Reject:
        try:
            sample = record.read()
            return sample, prepare(sample)
        except OSError as error:
            if isinstance(error, (ConnectionError, TimeoutError)) or error.errno in _TRANSIENT:
                raise
            return Reject(record.shard, record.key, f"cannot be read: {error}")
        except (SourceError, ImageError) as error:
            return Reject(record.shard, record.key, str(error))

    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="openblip-read")
    waiting: deque[Future[tuple[Sample, Prepared] | Reject] | Reject] = deque()

    def results(most: int) -> Iterator[tuple[Sample, Prepared] | Reject]:
        while len(waiting) > most:
            first = waiting.popleft()
            yield first if isinstance(first, Reject) else first.result()

    try:
        for entry in _entries(source, shards, share, limit):
            if isinstance(entry, Reject):
                waiting.append(entry)
            elif not skip(entry.shard, entry.key):
                waiting.append(pool.submit(load, entry))
            yield from results(ahead - 1)
        yield from results(0)
    finally:
        pool.shutdown(cancel_futures=True)


def _entries(
    source: Source, shards: Sequence[str] | None, share: Share, limit: int | None
) -> Iterator[Record | Reject]:
    number = num_samples = 0
    for shard in source.shards() if shards is None else shards:
        index = source.index(shard)
        entries: list[Record | Reject] = [*index.records, *index.rejects]
        for entry in entries:
            if not isinstance(entry, Reject):
                if limit is not None and num_samples >= limit:
                    return
                num_samples += 1
            if number % share.count == share.index:
                yield entry
            number += 1
