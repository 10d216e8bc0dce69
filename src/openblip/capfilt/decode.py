"""Reads and decodes the images of a shard ahead of the models, in order and in constant memory."""

import errno
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from openblip.data.images import read_image
from openblip.data.sample import Record, Reject
from openblip.errors import ImageError, SourceError

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Prepare = Callable[[Image.Image], Pixels]

# Errors of the machine, not of the sample: the shard fails and the next run tries it again, instead of
# thousands of good samples being written off during a network outage.
_TRANSIENT = {
    errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENETDOWN, errno.ENETUNREACH,
    errno.EHOSTDOWN, errno.EHOSTUNREACH,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecodedSample:
    """One image as both models want it (uint8 (3, S, S), S may differ) and its web texts."""

    key: str
    web: tuple[str, ...]
    captioner_pixels: Pixels
    filter_pixels: Pixels


def decode_samples(
    records: Sequence[Record], captioner: Prepare, filter_: Prepare, *, num_workers: int, ahead: int
) -> Generator[DecodedSample | Reject]:
    """One entry per record, in order; at most `ahead` of them wait decoded.

    Threads do: PIL decodes and resizes without the interpreter lock. An unreadable sample is a `Reject`; a
    failure of the machine (connection lost, disk error) is raised.
    """

    def load(record: Record) -> DecodedSample | Reject:
        try:
            return _load(record, captioner, filter_)
        except OSError as error:
            if isinstance(error, (ConnectionError, TimeoutError)) or error.errno in _TRANSIENT:
                raise
            return Reject(record.shard, record.key, f"cannot be read: {error}")
        except (SourceError, ImageError) as error:
            return Reject(record.shard, record.key, str(error))

    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="capfilt-decode")
    waiting: deque[Future[DecodedSample | Reject]] = deque()
    try:
        for record in records:
            waiting.append(pool.submit(load, record))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _load(record: Record, captioner: Prepare, filter_: Prepare) -> DecodedSample:
    sample = record.read()
    image = read_image(sample.image, name=f"{record.shard}/{record.key}")
    captioner_pixels = captioner(image)
    same = captioner is filter_ or captioner == filter_
    return DecodedSample(
        key=record.key,
        web=sample.captions,
        captioner_pixels=captioner_pixels,
        filter_pixels=captioner_pixels if same else filter_(image),
    )
