"""Endless training batches: shuffled, decoded in worker processes, exactly resumable.

The main process walks the order (`order.py`), sends chunks of records to the workers and re-batches what
comes back in order; a worker reads, decodes and augments. Nothing random depends on which worker does it.

Shapes: B batch, S image size.
"""

import hashlib
import math
import signal
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from openblip.data.batch import Batch, Example, SampleProcessor
from openblip.data.order import Draw, DrawOrder
from openblip.data.sample import Record, Reject
from openblip.data.sources.opening import Mixture
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Augmentation, Preprocessing
from openblip.errors import ConfigError, ImageError, SourceError

_CHUNK = (
    32  # records per message to a worker: the message's own cost vanishes, a batch still spreads over workers
)

Chunk = list[tuple[Record, int]]  # record, epoch


@dataclass(frozen=True, slots=True)
class LoadedBatch:
    """A batch, the cursor after it (JSON-able; give it to a new `Loader` to go on from here), and what was
    skipped while it was filled.
    """

    batch: Batch
    cursor: dict[str, Any]
    rejects: list[Reject]


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A chunk after decoding. `reasons[i]` is None for a good record; the other fields hold the good ones
    only.
    """

    reasons: list[str | None]
    pixels: np.ndarray  # uint8 (good, 3, S, S), with F frames (good, F, 3, S, S); features (good, N, Dv)
    contents: list[Any]


@dataclass(frozen=True)
class _Decoder(Dataset[_Decoded]):
    """Runs in the workers: a chunk of records in, one stacked array of pixels out."""

    processor: SampleProcessor
    preprocessing: Preprocessing
    augmentation: Augmentation | None
    seed: int

    def __getitem__(self, chunk: Chunk) -> _Decoded:
        reasons: list[str | None] = []
        examples: list[Example] = []
        for record, epoch in chunk:
            try:
                examples.append(self._decode(record, epoch))
            except (SourceError, ImageError, OSError) as error:
                reasons.append(str(error))
                continue
            reasons.append(None)
        pixels = np.stack([example.pixels for example in examples]) if examples else np.empty(0, np.uint8)
        return _Decoded(reasons, pixels, [example.content for example in examples])

    def _decode(self, record: Record, epoch: int) -> Example:
        sample = record.read()
        name = f"{self.seed}/{epoch}/{sample.shard}/{sample.key}"
        rng = np.random.default_rng(
            int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "big")
        )
        return self.processor(sample, self._view, rng)

    def _view(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        if self.augmentation is None:
            return self.preprocessing(image)
        return self.augmentation(image, rng, self.preprocessing.image_size)


@dataclass(eq=False)
class _Chunks(Sampler[Chunk]):
    """Groups draws into chunks, and remembers the draws that are under way."""

    order: DrawOrder
    chunk_size: int
    under_way: deque[Draw] = field(default_factory=deque)

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            draws = [next(self.order) for _ in range(self.chunk_size)]
            self.under_way += draws
            yield [(draw.record, draw.epoch) for draw in draws]


class _Filling:
    """The batch being filled."""

    def __init__(self) -> None:
        self.examples: list[Example] = []
        self.rejects: list[Reject] = []

    def add(self, draw: Draw, decoded: _Decoded, i: int) -> None:
        record = draw.record
        self.examples.append(Example(record.key, record.shard, decoded.pixels[i], decoded.contents[i]))

    def batch(self, processor: SampleProcessor, tokenizer: Tokenizer | None) -> Batch:
        # A processor that makes no tokens does not look at the tokenizer.
        return processor.collate(self.examples, cast(Tokenizer, tokenizer))


class Loader:
    """Iterating gives `LoadedBatch`es for ever, always of `batch_size` samples.

    The order is a function of `seed`; `rank` takes every `world_size`-th draw, so W ranks of batch B together
    see what one rank of batch W*B sees (as long as nothing is rejected). A sample that cannot be read is
    skipped, named in `rejects`, and the next one takes its place. `processor` says what is taken of a sample;
    what it draws (which caption, which view) depends on (seed, epoch, shard, key) alone.
    `tokenizer` may be None for a processor that makes no tokens.
    With `cursor` the iteration goes on exactly where the batch that carried it ended; each rank keeps its
    own. Raises `SourceError` for a source without usable samples and `ConfigError` for a cursor of other
    data.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        tokenizer: Tokenizer | None,
        preprocessing: Preprocessing,
        augmentation: Augmentation | None = None,
        batch_size: int,
        seed: int,
        processor: SampleProcessor,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        shuffle_window_shards: int = 4,
        cursor: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1 or num_workers < 0:
            raise ConfigError(
                f"batch_size {batch_size} must be at least 1 and num_workers {num_workers} at least 0"
            )
        self.mixture, self.tokenizer, self.processor = mixture, tokenizer, processor
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.rank, self.world_size, self.window_shards, self.cursor = (
            rank,
            world_size,
            shuffle_window_shards,
            cursor,
        )
        self.decoder = _Decoder(processor, preprocessing, augmentation, seed)

    def __iter__(self) -> Iterator[LoadedBatch]:
        order = DrawOrder(
            self.mixture,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
            window_shards=self.window_shards,
            cursor=self.cursor,
        )
        chunks = _Chunks(order, min(_CHUNK, self.batch_size))
        hopeless = _Hopeless(self.mixture, self.world_size)
        filling = _Filling()
        for decoded in self._decoded(chunks):
            good = 0
            for reason in decoded.reasons:
                draw = chunks.under_way.popleft()
                filling.rejects += draw.rejects
                if reason is None:
                    filling.add(draw, decoded, good)
                    good += 1
                else:
                    filling.rejects.append(Reject(draw.record.shard, draw.record.key, reason))
                hopeless.check(draw, reason)
                if len(filling.examples) == self.batch_size:
                    batch = filling.batch(self.processor, self.tokenizer)
                    yield LoadedBatch(batch, order.cursor(draw.next_draw, draw.positions), filling.rejects)
                    filling = _Filling()

    def _decoded(self, chunks: _Chunks) -> Iterator[_Decoded]:
        """Chunks decoded in order, at most about two batches ahead."""
        ahead = math.ceil(2 * self.batch_size / (chunks.chunk_size * max(1, self.num_workers)))
        loader = DataLoader(
            self.decoder,
            batch_size=None,
            sampler=chunks,
            num_workers=self.num_workers,
            prefetch_factor=max(2, ahead) if self.num_workers else None,
            collate_fn=unchanged,
            worker_init_fn=start_worker,
            # Its own generator: the default would advance torch's global one and break exact resume.
            generator=torch.Generator().manual_seed(self.seed),
        )
        return iter(loader)


class _Hopeless:
    """Notices a source in which nothing can be read, which would otherwise be skipped through for ever."""

    def __init__(self, mixture: Mixture, world_size: int) -> None:
        self.mixture, self.world_size = mixture, world_size
        self.readable: set[int] = set()
        self.first_epoch: dict[int, int] = {}

    def check(self, draw: Draw, reason: str | None) -> None:
        if draw.source in self.readable:
            return
        if reason is None:
            self.readable.add(draw.source)
            return
        # A rank sees a part of each epoch: after world_size whole ones it has seen enough.
        if draw.epoch > self.first_epoch.setdefault(draw.source, draw.epoch) + self.world_size:
            name = self.mixture.sources[draw.source].name
            raise SourceError(
                f"{name}: no sample can be used; the last, {draw.record.shard}/{draw.record.key}: {reason}"
            )


def unchanged(decoded: Any) -> Any:
    return decoded


def start_worker(worker: int) -> None:
    """Signals to the whole group are the main process's: it finishes its step and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
