"""Endless training batches: streamed, shuffled, decoded in worker processes, exactly resumable.

A job has S streams. Draw d of the job is of stream d % S and row d // S. Process r of W owns the streams s % W == r, so
the processes together draw what one process would, wherever W divides S. A process's streams are divided among its
workers, which read their shards front to back, one block ahead, decode and augment. The training process puts the rows
of a batch together, in the order of their draws, and makes tokens. Before the first batch only shard names are known.

A pool is a set of shards that are drawn from together: all of a mixture without weights, one source of a mixture with
weights. Of n shards each is read in m = max(1, ceil(S / n)) pieces, so that every stream has a piece of its own. Slots
are endless: slot g is piece permutation(g // (n m))[g % (n m)], and stream s reads slots s, s + S, s + 2 S, ... Nothing
has to be waited for or equalised at the end of an epoch. A slot is read in blocks, and the samples of a block are drawn
in the order of a permutation of their own. A sample with a weight below 1 is left out of some of the passes over its
shard, also as a function of the seed.

B samples in a batch.
"""

import multiprocessing
import os
import signal
import threading
import time
from bisect import bisect
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import c_int
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, islice
from multiprocessing.connection import wait
from operator import itemgetter
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from openblip.data.batch import Batch, Example, SampleProcessor
from openblip.data.config import Augmentation, Preprocessing
from openblip.data.reader import read_source
from openblip.data.sample import Located, Reject, Sample, Source, unused_line
from openblip.data.sources.opening import Mixture
from openblip.data.tokenizer import Tokenizer
from openblip.errors import ConfigError, ImageError, OpenBlipError, SourceError
from openblip.files import hash_bytes, hash_int

MAX_BLOCK_SAMPLES = 256
MAX_BLOCK_BYTES = 16 << 20  # 64 streams, each with a block in use and one read ahead: at most 2 GiB
SMALL_POOL_SAMPLES = 8  # per stream: beyond it no piece has only a few samples
SMALL_POOL_BYTES = 64 << 20
_SLOTS, _SAMPLES = 1, 2  # kinds of permutations, so that no two have the same seed
_SAMPLES_LEFT = 128  # the next block is read when so many samples of a block are left
_READ_THREADS = 8  # per worker: a remote read mostly waits
_RETRY_PAUSES = (1.0, 4.0, 16.0)  # seconds between tries to read a block from a failing disk or network
_NO_PIXELS = np.empty(0, np.uint8)
RUNNING, STOPPING, CLOSED = range(3)  # what workers are told of the training process


@dataclass(frozen=True, slots=True)
class LoadedBatch:
    """A batch, and what goes with it."""

    batch: Batch
    cursor: dict[str, Any]  # JSON-able: a new `Loader` goes on from here
    rejects: list[Reject]  # the samples that were skipped while the batch was filled


class Loader:
    """Iterating gives `LoadedBatch`es for ever, always of `batch_size` samples.

    W processes with batches of B samples together see, step by step, the samples of one process with a batch of W * B,
    wherever W divides the number of streams. A sample that cannot be used is skipped, named in `rejects`, and replaced
    by the next one of its stream. What is random about a sample (its caption, its view) depends on the seed, on how
    often its shard was read before, on shard and key, and on nothing else.

    Args:
        processor: what is taken of a sample, and how examples become a batch.
        tokenizer: may be None for a processor that makes no tokens.
        preprocessing: gives the size of the images, and their view without an augmentation.
        batch_size: samples per batch of this process, which is `rank` of `world_size`.
        seed: decides the order and everything random.
        num_workers: processes that read and decode, rounded down to a divisor of the number of this process's streams;
            with 0 the calling process does it.
        cursor: goes on exactly where the batch that carried it ended. Each process has its own; with another number of
            processes, those of all are joined (`join_cursors`).

    Raises:
        SourceError: a source holds no usable sample or cannot be read; mostly when iterated.
        ConfigError: impossible settings, or a cursor of other data.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        processor: SampleProcessor,
        tokenizer: Tokenizer | None,
        preprocessing: Preprocessing,
        augmentation: Augmentation | None = None,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        cursor: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1 or num_workers < 0:
            raise ConfigError(f"batch_size {batch_size} must be at least 1 and num_workers {num_workers} at least 0")
        order = Order(mixture, seed=seed, rank=rank, world_size=world_size, cursor=cursor)
        self.num_workers = max(n for n in range(num_workers + 1) if n == 0 or len(order.streams) % n == 0)
        self.worker = _Worker(order, batch_size, processor, preprocessing, augmentation)
        self.tokenizer = tokenizer
        self.sources = mixture.sources
        self._unused: dict[tuple[str, str], Counter[str]] = {}  # of source and shard, from the workers
        self.state: Any = multiprocessing.RawValue(c_int, RUNNING)

    def __iter__(self) -> Generator[LoadedBatch]:
        self.state.value = RUNNING
        workers = DataLoader(
            self.worker,
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=2 if self.num_workers else None,
            collate_fn=unchanged,
            worker_init_fn=partial(start_worker, self.state),
            # Its own generator: the default would advance torch's global one and break exact resume.
            generator=torch.Generator().manual_seed(self.worker.order.seed),
        )
        messages = iter(workers)  # they take turns: one message of each makes a batch
        order = self.worker.order
        positions = {stream: tuple(pools) for stream, pools in order.positions.items()}
        next_draw = order.first_draw
        try:
            while True:
                parts: list[_Part] = []
                for message in islice(messages, max(1, self.num_workers)):
                    if isinstance(message, OpenBlipError):
                        raise message
                    parts.append(message)
                    self._unused |= message.unused
                    positions |= message.positions
                next_draw += self.worker.batch_size * order.world_size
                # In the order of the rows that replaced them, whichever worker met them.
                rejects = sorted((pair for part in parts for pair in part.rejects), key=itemgetter(0))
                named = [reject for _, reject in rejects]
                yield LoadedBatch(self._collate(parts), order.cursor(next_draw, positions), named)
        finally:
            self.state.value = CLOSED
            del messages  # ends the workers, also while the traceback of an error keeps this frame alive

    def count_unused(self) -> Counter[str]:
        """Files of the shards that were read to their end, and of folders, that are no part of a sample, by ending."""
        known = {(source.name, shard): count for source in self.sources for shard, count in source.unused.items()}
        return sum((known | self._unused).values(), Counter[str]())

    def _collate(self, parts: "list[_Part]") -> Batch:
        rows: dict[int, Example] = {}
        for part in parts:
            arrays = [example.pixels for example in part.examples] if part.pixels is None else part.pixels.numpy()
            for row, example, pixels in zip(part.rows, part.examples, arrays, strict=True):
                rows[row] = example._replace(pixels=pixels)
        examples = [rows[row] for row in range(self.worker.batch_size)]
        # A processor that makes no tokens does not look at the tokenizer.
        batch = self.worker.processor.collate(examples, cast(Tokenizer, self.tokenizer))
        # Copying pinned memory to the device does not make the host wait.
        return batch.pin_memory() if torch.cuda.is_available() else batch


class Position(NamedTuple):
    """Where a stream stands in a pool."""

    slot: int
    number: int  # the number in its shard of the first sample of the block in use
    taken: int  # how many samples of the block were drawn already


class Piece(NamedTuple):
    """What a slot holds: piece j of m of a shard, or one sample of a small pool."""

    source: Source
    shard: str
    pieces: tuple[int, int]
    epoch: int  # how often every piece was read before this one
    item: Sample | Reject | None = None


@dataclass(frozen=True)
class Pool:
    """Shards that are drawn from together."""

    number: int
    shards: list[tuple[Source, str]]
    num_streams: int
    seed: int
    items: list[tuple[Source, Sample | Reject]] | None = None  # everything that a small pool holds

    @property
    def pieces_per_shard(self) -> int:
        """m: as many that every stream can read another piece."""
        return -(-self.num_streams // len(self.shards))

    def piece(self, slot: int) -> Piece:
        """What a slot holds."""
        m = self.pieces_per_shard
        num_pieces = len(self.shards) * m if self.items is None else len(self.items)
        epoch, place = divmod(slot, num_pieces)
        piece = int(_permutation((self.seed, _SLOTS, self.number, epoch), num_pieces)[place])
        if self.items is not None:
            source, item = self.items[piece]
            return Piece(source, item.shard, (0, 1), epoch, item)
        return Piece(*self.shards[piece // m], (piece % m, m), epoch)

    def sample_order(self, slot: int, number: int, num_samples: int) -> list[int]:
        """The order in which the samples of a block are drawn."""
        rng = np.random.default_rng([self.seed, _SAMPLES, self.number, slot, number])
        return list(map(int, rng.permutation(num_samples)))


@lru_cache(maxsize=8)  # streams are not all in the same epoch; a permutation of 100,000 pieces is 0.8 MB
def _permutation(seed: tuple[int, ...], size: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)


def block_size(stream: int, position: Position, pieces_per_shard: int, num_pools: int) -> int:
    """How many samples the block that begins at a position holds at most. The first blocks of a stream are small, so
    that the first batch comes at once. They grow from a size that differs between streams, so that later not all
    streams need their next block in the same row.
    """
    most = max(1, MAX_BLOCK_SAMPLES // num_pools)
    if position.slot != stream:  # not the stream's first slot
        return most
    return min(most, position.number // pieces_per_shard + 4 * (stream % 8 + 1))


class Order:
    """The draws of one process of a job, from the beginning or from a cursor: a function of the seed. Raises
    `SourceError` when a source has no shards or a pool no samples, and `ConfigError` for impossible settings or a
    cursor of other data or of another seed.
    """

    def __init__(
        self, mixture: Mixture, *, seed: int, rank: int, world_size: int, cursor: Mapping[str, Any] | None
    ) -> None:
        if seed < 0 or not 0 <= rank < world_size:
            range_of_rank = f"rank {rank} must be within world_size {world_size}"
            raise ConfigError(f"seed {seed} must not be negative, and {range_of_rank}")
        self.seed, self.rank, self.world_size = seed, rank, world_size
        default = 64 if world_size <= 8 and 64 % world_size == 0 else 8 * world_size
        self.num_streams = default if cursor is None else int(cursor.get("streams", 0))
        if self.num_streams < 1 or self.num_streams % world_size:
            raise ConfigError(
                f"a run with {self.num_streams} streams of samples cannot go on with {world_size} processes; "
                "their number must divide that of the streams"
            )
        self.streams = range(rank, self.num_streams, world_size)
        shard_names = [source.shards() for source in mixture.sources]
        for source, names in zip(mixture.sources, shard_names, strict=True):
            if not names:
                raise SourceError(f"{source.name}: no shards")
        shards = [[(s, name) for name in names] for s, names in zip(mixture.sources, shard_names, strict=True)]
        if mixture.weights is None:
            shards = [[pair for pairs in shards for pair in pairs]]
        self.pools = [
            Pool(i, pairs, self.num_streams, seed, _read_small_pool(pairs, self.num_streams))
            for i, pairs in enumerate(shards)
        ]
        self._cumulative_weights = list(accumulate(mixture.weights or (1.0,)))
        self._identity = {
            "seed": seed,
            "shards": [f"{len(names)} ({hash_bytes(chr(0).join(names), 6).hex()})" for names in shard_names],
            "samples": [None if pool.items is None else len(pool.items) for pool in self.pools],
            "weights": None if mixture.weights is None else [round(weight, 9) for weight in mixture.weights],
        }
        self.first_draw = 0
        self.positions = {stream: [Position(stream, 0, 0) for _ in self.pools] for stream in self.streams}
        if cursor is None:
            return
        _check_same(cursor, self._identity)
        self.first_draw = int(cursor["draw"])
        for stream in self.streams:
            if str(stream) not in cursor["positions"]:
                raise ConfigError(
                    "the cursor is that of one process of several; join those of all processes to go on with "
                    "another number of them"
                )
            self.positions[stream] = [Position(*position) for position in cursor["positions"][str(stream)]]

    def choose_pool(self, stream: int, row: int) -> int:
        """Which pool a draw is from: a function of the seed, stream and row, with the mixture's weights."""
        if len(self.pools) == 1:
            return 0
        chance = hash_int(f"{self.seed}/{stream}/{row}", 53) / 2**53 * self._cumulative_weights[-1]
        return min(bisect(self._cumulative_weights, chance), len(self.pools) - 1)

    def cursor(self, next_draw: int, positions: Mapping[int, Sequence[Position]]) -> dict[str, Any]:
        """The JSON-able state of this process before a draw of the job."""
        return {
            **self._identity,
            "streams": self.num_streams,
            "draw": next_draw,
            "positions": {str(stream): [list(position) for position in pools] for stream, pools in positions.items()},
        }


def join_cursors(cursors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One cursor of those of all processes of a job after the same step; it serves any process of a new one. Raises
    `ConfigError` when they are not of one job and step.
    """
    first = {name: value for name, value in cursors[0].items() if name != "positions"}
    for cursor in cursors:
        _check_same(cursor, first)
    return {**first, "positions": {s: p for cursor in cursors for s, p in cursor["positions"].items()}}


def _check_same(cursor: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if cursor.get(name) != value:
            raise ConfigError(
                f"the data changed since the run was stopped: {name} was {cursor.get(name)}, is {value}; "
                "resume with the same data and seed, or start a new run"
            )


def _read_small_pool(
    shards: Sequence[tuple[Source, str]], num_streams: int
) -> list[tuple[Source, Sample | Reject]] | None:
    """All items of a pool, or None for one of more than a few samples: then only the texts of so many are read.

    In a pool of few samples most pieces would be empty, and streams would draw some samples again before others were
    drawn at all. So its samples are kept in memory, and each is a piece of its own: every epoch has each of them once.
    Raises `SourceError` for a pool without samples.
    """
    if len(shards) >= num_streams:
        return None
    most = SMALL_POOL_SAMPLES * num_streams
    for images in (False, True):
        items: list[tuple[Source, Sample | Reject]] = []
        num_bytes = 0
        for source, shard in shards:
            located: list[Located] = []
            try:
                # In two pieces: of a remote shard, so read, a copy is made, which the streams need in any case.
                for entry in (entry for j in (0, 1) for entry in source.read(shard, images=images, pieces=(j, 2))):
                    located.append(entry)
                    num_bytes += len(entry.item.image) if isinstance(entry.item, Sample) else 0
                    if len(items) + len(located) > most or num_bytes > SMALL_POOL_BYTES:
                        return None
            except SourceError as error:  # of this shard: the others may be fine
                number = located[-1].number if located else 0
                located.append(Located(number, Reject(shard, "", str(error))))
            except OSError as error:
                raise SourceError(f"{source.name}: shard {shard} cannot be read: {error}") from error
            items += [(source, entry.item) for entry in sorted(located, key=itemgetter(0))]
            if len(items) > most:
                return None
    if not items:
        unused = unused_line(source.count_unused() for source in {source.name: source for source, _ in shards}.values())
        raise SourceError(
            f"{shards[0][0].name}: no sample can be used, because it holds none{unused and f'; {unused}'}"
        )
    return items


class _Part(NamedTuple):
    """A worker's rows of a batch."""

    rows: range
    examples: list[Example]
    rejects: list[tuple[int, Reject]]  # with the row that the next sample of the stream took
    positions: dict[int, tuple[Position, ...]]  # of the streams that were drawn from, after their last draw
    unused: dict[tuple[str, str], Counter[str]]  # of shards that were read to their end, after source and shard
    pixels: torch.Tensor | None = None  # (rows, ...): of all examples, which then have none; for shared memory

    def packed(self) -> "_Part":
        """The same with the pixels of all examples in one tensor."""
        if not self.examples:
            return self
        pixels = torch.from_numpy(np.stack([example.pixels for example in self.examples]))
        try:
            pixels.share_memory_()  # here: in the thread that sends, an error would be lost
        except RuntimeError as error:
            raise OpenBlipError(
                f"a worker cannot share images with the training process: {error}; give shared memory more room "
                "(docker run --shm-size), or lower --data.num-workers, down to 0"
            ) from error
        return self._replace(pixels=pixels, examples=[e._replace(pixels=_NO_PIXELS) for e in self.examples])


@dataclass(frozen=True)
class _Worker(IterableDataset[_Part | OpenBlipError]):
    """What one worker process gives to every batch; without workers, the whole batch."""

    order: Order
    batch_size: int
    processor: SampleProcessor
    preprocessing: Preprocessing
    augmentation: Augmentation | None

    def decode(self, sample: Sample, epoch: int = 0) -> Example:
        """Raises `SourceError` or `ImageError` for a sample that cannot be used."""
        rng = np.random.default_rng(hash_int(f"{self.order.seed}/{epoch}/{sample.shard}/{sample.key}", 128))
        return self.processor(sample, self._view, rng)

    def _view(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        if self.augmentation is None:
            return self.preprocessing(image)
        return self.augmentation(image, rng, self.preprocessing.image_size)

    def __iter__(self) -> Iterator[_Part | OpenBlipError]:
        info = get_worker_info()
        streams = _Streams(self)
        try:
            if info is None:
                yield from self._parts(streams, 0, 1)
            else:
                yield from (part.packed() for part in self._parts(streams, info.id, info.num_workers))
        except (OpenBlipError, OSError) as error:
            # The training process raises it again, without the DataLoader's traceback in its text.
            yield error if isinstance(error, OpenBlipError) else SourceError(f"samples cannot be read: {error}")
        finally:
            streams.closing.set()
            streams.threads.shutdown(cancel_futures=True)

    def _parts(self, streams: "_Streams", worker: int, num_workers: int) -> Iterator[_Part]:
        world_size, rank = self.order.world_size, self.order.rank
        # The process's k-th draw is draw k * W + rank of the job.
        k = -(-(self.order.first_draw - rank) // world_size)
        # All streams begin to read at once, in the order in which they are needed.
        for i in range(k, k + len(self.order.streams)):
            if i % num_workers == worker:
                streams.of_draw(i * world_size + rank)
        while True:
            part = _Part(range((worker - k) % num_workers, self.batch_size, num_workers), [], [], {}, {})
            for row in part.rows:
                stream = streams.of_draw((k + row) * world_size + rank)
                example, rejects = stream.draw()
                part.examples.append(example)
                part.rejects.extend((row, reject) for reject in rejects)
                part.positions[stream.number] = streams.positions(stream.number)
            k += self.batch_size
            part.unused.update(streams.unused)
            streams.unused.clear()
            yield part


class _Streams:
    """The streams of a worker, with the threads that read them."""

    def __init__(self, worker: _Worker) -> None:
        self.order, self.decode = worker.order, worker.decode
        self.threads = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="openblip-read")
        self.closing = threading.Event()
        self._streams: dict[tuple[int, int], _Stream] = {}  # by number and pool
        self.unused: dict[tuple[str, str], Counter[str]] = {}
        # By source, until one of its samples could be used: a source without any would be skipped through for ever.
        self.slots_left: dict[str, int] = {}
        for pool in self.order.pools:
            rounds = 2 if pool.items is not None else 2 * pool.pieces_per_shard
            for source, _ in pool.items or pool.shards:
                self.slots_left[source.name] = self.slots_left.get(source.name, 0) + rounds

    def of_draw(self, draw: int) -> "_Stream":
        """The stream of a draw of the job, in the pool that the draw is from; it begins to read when it is made."""
        row, number = divmod(draw, self.order.num_streams)
        key = number, self.order.choose_pool(number, row)
        if key not in self._streams:
            self._streams[key] = _Stream(self, *key)
        return self._streams[key]

    def positions(self, number: int) -> tuple[Position, ...]:
        """Where a stream stands in each pool."""
        first = enumerate(self.order.positions[number])
        streams = self._streams
        return tuple(streams[number, p].position if (number, p) in streams else position for p, position in first)

    def note_slot(self, source: Source, shard: str) -> None:
        """A slot with a piece of the shard is over. After two rounds of slots without a usable sample the whole source
        is searched; raises `SourceError` when it has none.
        """
        if unused := source.unused.get(shard):
            self.unused[source.name, shard] = unused
        if source.name in self.slots_left:
            self.slots_left[source.name] -= 1
        if self.slots_left.get(source.name) != 0:
            return
        last = ""
        for shard in source.shards():
            try:
                for entry in read_source(source, self.decode, shards=[shard]):
                    if not isinstance(entry, Reject):
                        self.slots_left.pop(source.name)
                        return
                    last = f"; the last, {entry.shard}/{entry.key}: {entry.reason}"
            except SourceError as error:
                last = f"; the last, {shard}: {error}"
        raise SourceError(f"{source.name}: no sample can be used{last}")


class _Block(NamedTuple):
    """Samples of a slot that are drawn in an order of their own."""

    piece: Piece
    start: Position
    end: Position
    samples: list[Sample | None]  # in the order of their drawing; None once drawn
    rejects: list[Reject]  # what the source could not read among them


class _Stream:
    """The endless samples of one stream in one pool. A thread reads their blocks, one ahead."""

    def __init__(self, streams: _Streams, number: int, pool: int) -> None:
        self.streams, self.number, self.pool = streams, number, streams.order.pools[pool]
        position = streams.order.positions[number][pool]
        self._block: _Block | None = None
        self._taken = position.taken
        self._blocks = self._read_blocks(position._replace(taken=0))  # of the reading thread
        self._next_block: Future[_Block] | None = streams.threads.submit(next, self._blocks)

    @property
    def position(self) -> Position:
        """After the last draw."""
        assert self._block is not None  # asked for only after a draw
        if self._taken == len(self._block.samples):
            return self._block.end
        return self._block.start._replace(taken=self._taken)

    def draw(self) -> tuple[Example, list[Reject]]:
        """The next sample that can be used, decoded, and what could not be used before it."""
        rejects: list[Reject] = []
        while True:
            while self._block is None or self._taken >= len(self._block.samples):
                if self._block is not None:
                    if self._block.end.slot != self._block.start.slot:
                        self.streams.note_slot(self._block.piece.source, self._block.piece.shard)
                    self._taken = 0
                future = self._next_block or self.streams.threads.submit(next, self._blocks)
                self._block, self._next_block = future.result(), None
                if self._taken == 0:  # a run that stopped inside the block has named its rejects
                    rejects += self._block.rejects
            sample = cast(Sample, self._block.samples[self._taken])
            self._block.samples[self._taken] = None  # its memory is free
            self._taken += 1
            if self._next_block is None and len(self._block.samples) - self._taken <= _SAMPLES_LEFT:
                self._next_block = self.streams.threads.submit(next, self._blocks)
            try:
                example = self.streams.decode(sample, self._block.piece.epoch)
            except (SourceError, ImageError) as error:
                rejects.append(Reject(sample.shard, sample.key, str(error)))
                continue
            self.streams.slots_left.pop(self._block.piece.source.name, None)
            return example, rejects

    def _read_blocks(self, start: Position) -> Iterator[_Block]:
        """Blocks without end, which may be empty where a slot ends. Raises `SourceError` when the disk or the network
        goes on failing.
        """
        closing, order, num_pools = self.streams.closing, self.streams.order, len(self.streams.order.pools)
        items: Iterator[Located] | None = None
        ahead: Located | None = None  # the first item after the last block
        pauses = iter(_RETRY_PAUSES)
        while True:
            piece = self.pool.piece(start.slot)
            most = block_size(self.number, start, piece.pieces[1], num_pools)
            end = Position(start.slot + self.pool.num_streams, 0, 0)
            samples: list[Sample | None] = []
            rejects: list[Reject] = []
            num_bytes, last_number = 0, -1
            try:
                if items is None:
                    is_left_out = partial(is_not_drawn, order.seed, piece.epoch)
                    if piece.item is None:
                        items = piece.source.read(
                            piece.shard, start=start.number, pieces=piece.pieces, skip=is_left_out
                        )
                    elif isinstance(piece.item, Sample) and is_left_out(piece.item):
                        items = iter([])
                    else:
                        items = iter([Located(0, piece.item)])
                    ahead = next(items, None)
                while ahead is not None and not closing.is_set():
                    number, item = ahead
                    is_full = len(samples) + len(rejects) >= most or num_bytes >= MAX_BLOCK_BYTES // num_pools
                    if is_full and number != last_number:  # what has one number stays together
                        end = Position(start.slot, number, 0)
                        break
                    if isinstance(item, Sample):
                        samples.append(item)
                        num_bytes += len(item.image) + len(item.second_image or b"")
                    else:
                        rejects.append(item)
                    last_number = number
                    ahead = next(items, None)
            except SourceError as error:  # of the whole shard: the others may be fine
                rejects.append(Reject(piece.shard, "", str(error)))
                ahead = None
            except OSError as error:
                pause = next(pauses, None)
                if pause is None:
                    raise SourceError(f"{piece.source.name}: shard {piece.shard} cannot be read: {error}") from error
                items = None
                closing.wait(pause)
                continue
            if ahead is None:
                items = None
            drawn = self.pool.sample_order(start.slot, start.number, len(samples))
            yield _Block(piece, start, end, [samples[i] for i in drawn], rejects)
            start, pauses = end, iter(_RETRY_PAUSES)


def is_not_drawn(seed: int, epoch: int, sample: Sample) -> bool:
    """Whether a pass over the data leaves out a sample, by its weight. Whether others are drawn does not matter."""
    if sample.weight >= 1.0:
        return False
    chance = hash_int(f"weight/{seed}/{epoch}/{sample.shard}/{sample.key}", 53) / 2**53
    return chance >= sample.weight


def unchanged(message: Any) -> Any:
    """A message of a worker as it is: the DataLoader's own function would make tensors of numbers."""
    return message


def start_worker(state: Any, worker: int) -> None:
    """Prepare a worker process to end with the training process, however that ends.

    A signal to the whole group is the training process's: it says that it is `STOPPING`, finishes its step and closes
    the loader. One to the worker alone ends the worker.
    """
    terminated = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: terminated.set())
    torch.set_num_threads(1)
    threading.Thread(target=_watch_parent, args=(state, terminated), daemon=True).start()


def _watch_parent(state: Any, terminated: threading.Event) -> None:
    """End this process soon after its parent has died or closed the loader, even in the middle of a read."""
    parent = cast(Any, multiprocessing.parent_process())
    while not wait([parent.sentinel], timeout=0.5):
        if state.value == CLOSED or (terminated.is_set() and state.value == RUNNING):
            time.sleep(1)  # meanwhile a parent that closes ends an idle worker, and one that got the signal says so
            if state.value != STOPPING:
                break
    os._exit(0 if state.value == CLOSED else 1)
