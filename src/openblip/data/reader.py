"""One ordered pass over a source, read and decoded ahead: for captioning, evaluation, CapFilt and the feature cache."""

import contextlib
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Generic, NamedTuple, TypeVar

from openblip.data.sample import Located, Reject, Sample, Source, check_captions, is_transient
from openblip.data.sources.opening import Mixture
from openblip.errors import ImageError, SourceError

MOST_THREADS = 16  # that read and decode; more would wait for each other in Python

Prepared = TypeVar("Prepared")
Item = TypeVar("Item")


def read_source(
    source: Source,
    prepare: Callable[[Sample], Prepared],
    *,
    shards: Sequence[str] | None = None,
    skip: Callable[[str, str], bool] = lambda shard, key: False,
    share: tuple[int, int] = (0, 1),
    limit: int | None = None,
    num_workers: int | None = 2,
    ahead: int = 64,
    keep_going: bool = False,
) -> Generator[tuple[Sample, Prepared] | Reject]:
    """Yield each sample with what `prepare` made of it, in the source's order, or a `Reject`.

    Raises `SourceError` when a whole shard cannot be opened.

    Args:
        source: each shard is read once, front to back.
        prepare: runs in threads, usually decodes the image. `SourceError`, `ImageError` and `OSError` make the sample a
            reject; an error of the machine (connection lost, disk error) is raised.
        shards: the shards to read; all when None.
        skip: told shard and key, in the reading thread; where it is true, the sample's image is not read.
        share: (i, n) reads of every n samples and rejects of the source the one at i: the share of one process.
        limit: read only this many samples of the source, before it is shared.
        num_workers: number of threads that prepare; None: `num_cores`.
        ahead: at most this many samples wait prepared.
        keep_going: a shard that cannot be opened is a reject, and the others are read.
    """

    def load(item: Sample | Reject) -> tuple[Sample, Prepared] | Reject:
        if isinstance(item, Reject):
            return item
        try:
            check_captions(item)
            return item, prepare(item)
        except OSError as error:
            if is_transient(error):
                raise
            return Reject(item.shard, item.key, f"cannot be read: {error}")
        except (SourceError, ImageError) as error:
            return Reject(item.shard, item.key, str(error))

    items = _share(source, source.shards() if shards is None else shards, skip, share, limit, keep_going)
    yield from read_ahead(items, load, num_workers=num_workers, ahead=ahead)


class ReadBatch(NamedTuple, Generic[Prepared]):
    """Consecutive samples of a source with what was prepared of each, and the rejects among them."""

    samples: list[tuple[Sample, Prepared]]
    rejects: list[Reject]


def in_batches(
    entries: Generator[tuple[Sample, Prepared] | Reject], size: int, frames: Callable[[Prepared], int] = lambda _: 1
) -> Generator[ReadBatch[Prepared]]:
    """Yield what `read_source` yields in batches of samples with equally many frames, together at most `size`, or of
    one sample. `entries` is closed at the end.
    """
    batch: ReadBatch[Prepared] = ReadBatch([], [])
    num_frames = 1  # of each sample of the batch
    with contextlib.closing(entries):
        for entry in entries:
            if isinstance(entry, Reject):
                batch.rejects.append(entry)
            else:
                if batch.samples and frames(entry[1]) != num_frames:
                    yield batch
                    batch = ReadBatch([], [])
                num_frames = frames(entry[1])
                batch.samples.append(entry)
            if (len(batch.samples) + 1) * num_frames > size or len(batch.rejects) >= size:
                yield batch
                batch = ReadBatch([], [])
    if batch.samples or batch.rejects:
        yield batch


def texts_of_sources(mixture: Mixture, texts: Callable[[Sample], Iterable[str]], limit: int) -> Iterator[str]:
    """Yield at most `limit` texts, an equal share of every source, without reading images. `texts` gives the texts of a
    sample, or raises `SourceError`. Samples that cannot be read are passed over, because the loader names them.
    """
    for source in mixture.sources:
        left = limit // len(mixture.sources)
        for item in items_without_images(source):
            if left <= 0:
                break
            if not isinstance(item, Reject):
                with contextlib.suppress(SourceError):
                    for text in texts(item):
                        yield text
                        left -= 1


def items_without_images(source: Source) -> Iterator[Sample | Reject]:
    """Every sample, without its image, and every reject; a shard that cannot be opened is a reject, too."""
    return (item for shard in source.shards() for item in shard_items(source.read(shard, images=False), shard))


def shard_items(located: Iterator[Located], shard: str) -> Iterator[Sample | Reject]:
    """What is read of a shard, with a reject for why it cannot be opened."""
    try:
        for _, item in located:
            yield item
    except SourceError as error:
        yield Reject(shard, "", str(error))


def num_cores() -> int:
    """How many threads can read and decode at once: one on each core that this process may use, but not very many."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_THREADS)


def read_ahead(
    items: Iterator[Item], work: Callable[[Item], Prepared], *, num_workers: int | None, ahead: int
) -> Generator[Prepared]:
    """Yield what `work` makes of each item, in order. One thread takes the items and `num_workers` threads work on
    them (None: `num_cores`), at most `ahead` before they are wanted. What any of them raises is raised here, at the
    item's place. If `items` is a generator, it is closed at the end.
    """
    threads = ThreadPoolExecutor(num_workers or num_cores(), "openblip-read")
    free = threading.Semaphore(ahead)
    closing = threading.Event()
    results: SimpleQueue[Future[Prepared] | None] = SimpleQueue()

    def take_items() -> None:
        try:
            for item in items:
                free.acquire()
                if closing.is_set():
                    return
                results.put(threads.submit(work, item))
            results.put(None)
        except BaseException as error:
            failed: Future[Prepared] = Future()
            failed.set_exception(error)
            results.put(failed)

    # A daemon: after an error that nobody catches, a waiting thread would keep the process from ending.
    taker = threading.Thread(target=take_items, daemon=True)
    try:
        taker.start()
        while (result := results.get()) is not None:
            yield result.result()
            free.release()
    finally:
        closing.set()
        free.release()
        taker.join()
        threads.shutdown(cancel_futures=True)
        if isinstance(items, Generator):
            items.close()


class _LimitReached(Exception):
    """Ends the reading of a shard from within `skip`."""


def _share(
    source: Source,
    shards: Sequence[str],
    skip: Callable[[str, str], bool],
    share: tuple[int, int],
    limit: int | None,
    keep_going: bool,
) -> Iterator[Sample | Reject]:
    """The samples and rejects of one process; counted before any image is read, so that all count alike."""
    index, count = share
    num_items = num_samples = 0
    accepted: set[str] = set()  # the keys of samples that are being read

    def is_skipped(sample: Sample) -> bool:
        nonlocal num_items, num_samples
        if limit is not None and num_samples >= limit:
            raise _LimitReached
        is_shared = num_items % count == index
        num_items += 1
        num_samples += 1
        if not is_shared or skip(sample.shard, sample.key):
            return True
        accepted.add(sample.key)
        return False

    with contextlib.suppress(_LimitReached):
        for shard in shards:
            accepted.clear()
            located = source.read(shard, skip=is_skipped)
            for item in shard_items(located, shard) if keep_going else (item for _, item in located):
                if item.key in accepted:  # the sample, or why its image cannot be read
                    accepted.remove(item.key)
                    yield item
                    continue
                if num_items % count == index:
                    yield item
                num_items += 1
