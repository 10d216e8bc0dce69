"""Endless training batches: streamed, shuffled, decoded in worker processes, exactly resumable.

Every worker process owns some of the job's streams (`Order`): it reads their shards front to back, one
block ahead, decodes and augments. The training process puts the rows of a batch together, in the order of
their draws, and makes tokens. Before the first batch only the names of shards are known, and no random choice
depends on the number of workers or processes.

Shapes: B batch, S image size.
"""

import signal
import threading
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import itemgetter
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from openblip.data.batch import Batch, Example, SampleProcessor
from openblip.data.config import Augmentation, Preprocessing
from openblip.data.sample import Located, Reject, Sample, Source
from openblip.data.sources.opening import Mixture
from openblip.data.tokenizer import Tokenizer
from openblip.errors import ConfigError, ImageError, OpenBlipError, SourceError
from openblip.files import hash_bytes, hash_int

MAX_BLOCK_SAMPLES = 256
MAX_BLOCK_BYTES = 16 << 20  # 64 streams, each with a block in use and one read ahead: at most 2 GiB
SMALL_POOL_SAMPLES = 8  # per stream: beyond it no piece has only a few samples
SMALL_POOL_BYTES = 64 << 20
_SLOTS, _SAMPLES = 1, 2  # kinds of permutations, so that no two have the same seed
_READ_THREADS = 8  # per worker: a remote read mostly waits
_NO_PIXELS = np.empty(0, np.uint8)
_RETRY_PAUSES = (1.0, 4.0, 16.0)  # seconds between tries to read a block from a failing disk or network


@dataclass(frozen=True, slots=True)
class LoadedBatch:
    """A batch, and what goes with it."""

    batch: Batch
    cursor: dict[str, Any]
    """JSON-able: a new `Loader` goes on from here."""
    rejects: list[Reject]
    """The samples that were skipped while the batch was filled."""


class Loader:
    """Iterating gives `LoadedBatch`es for ever, always of `batch_size` samples.

    The order of samples is a function of `seed` (see `Order`). W processes with batches of B samples
    together see, step by step, the samples of one process with a batch of W * B, wherever W divides the
    number of streams. A sample that cannot be used is skipped, named in `rejects`, and replaced by the next
    one of its stream. What is random about a sample (its caption, its view) depends on the seed, on how often
    its shard was read before, on shard and key, and on nothing else.

    Args:
        mixture: the sources, and the weights with which they are drawn.
        processor: what is taken of a sample, and how examples become a batch.
        tokenizer: may be None for a processor that makes no tokens.
        preprocessing: gives the size of the images, and their view without an augmentation.
        augmentation: random views.
        batch_size: samples per batch of this process.
        seed: decides the order and everything random.
        rank: this process, of `world_size`.
        num_workers: processes that read and decode, rounded down to a divisor of the number of this process's
            streams; with 0 the calling process does it.
        cursor: goes on exactly where the batch that carried it ended. Each process has its own; with another
            number of processes, those of all are joined (`order.join_cursors`).

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
        self.tokenizer, self.processor, self.batch_size, self.seed = tokenizer, processor, batch_size, seed
        self.order = Order(mixture, seed=seed, rank=rank, world_size=world_size, cursor=cursor)
        num_streams = len(self.order.streams)
        self.num_workers = max(n for n in range(num_workers + 1) if n == 0 or num_streams % n == 0)
        self.decoder = _Decoder(processor, preprocessing, augmentation, seed)

    def __iter__(self) -> Iterator[LoadedBatch]:
        messages = iter(self._workers())  # they take turns: one message of each makes a batch
        positions = {stream: tuple(pools) for stream, pools in self.order.positions.items()}
        next_draw = self.order.first_draw
        try:
            while True:
                parts: list[_Part] = []
                for _ in range(max(1, self.num_workers)):
                    message = next(messages)
                    if isinstance(message, OpenBlipError):
                        raise message
                    parts.append(message)
                    positions |= message.positions
                next_draw += self.batch_size * self.order.world_size
                cursor = self.order.cursor(next_draw, positions)
                # In the order of the rows that replaced them, whichever worker met them.
                rejects = sorted((pair for part in parts for pair in part.rejects), key=itemgetter(0))
                yield LoadedBatch(self._collate(parts), cursor, [reject for _, reject in rejects])
        finally:
            del messages  # ends the workers, also while the traceback of an error keeps this frame alive

    def _workers(self) -> "DataLoader[_Part | OpenBlipError]":
        return DataLoader(
            _Worker(self.order, self.decoder, self.batch_size),
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=2 if self.num_workers else None,
            collate_fn=unchanged,
            worker_init_fn=start_worker,
            # Its own generator: the default would advance torch's global one and break exact resume.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _collate(self, parts: "list[_Part]") -> Batch:
        examples: dict[int, Example] = {}
        for part in parts:
            for row, example, pixels in zip(part.rows, part.examples, part.pixels.numpy(), strict=True):
                examples[row] = Example(example.key, example.shard, pixels, example.content)
        in_order = [examples[row] for row in range(self.batch_size)]
        # A processor that makes no tokens does not look at the tokenizer.
        batch = self.processor.collate(in_order, cast(Tokenizer, self.tokenizer))
        # Copying pinned memory to the device does not make the host wait.
        return batch.pin_memory() if torch.cuda.is_available() else batch


@dataclass(frozen=True)
class _Decoder:
    """Makes an example of a sample."""

    processor: SampleProcessor
    preprocessing: Preprocessing
    augmentation: Augmentation | None
    seed: int

    def __call__(self, sample: Sample, epoch: int) -> Example:
        """Raises `SourceError` or `ImageError` for a sample that cannot be used."""
        rng = np.random.default_rng(hash_int(f"{self.seed}/{epoch}/{sample.shard}/{sample.key}", 128))
        return self.processor(sample, self._view, rng)

    def _view(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        if self.augmentation is None:
            return self.preprocessing(image)
        return self.augmentation(image, rng, self.preprocessing.image_size)


class Position(NamedTuple):
    """Where a stream stands in a pool."""

    slot: int
    number: int
    """The number in its shard of the first sample of the block in use."""
    taken: int
    """How many samples of the block were drawn already."""


class Piece(NamedTuple):
    """What a slot holds: piece j of m of a shard, or one sample of a small pool."""

    source: Source
    shard: str
    pieces: tuple[int, int]
    epoch: int
    """How often every piece was read before this one."""
    item: Sample | Reject | None = None

    def read(self, start: int) -> Iterator[Located]:
        """Its samples and rejects from a number on, as `Source.read` gives them."""
        if self.item is not None:
            return iter([Located(0, self.item)])
        return self.source.read(self.shard, start=start, pieces=self.pieces)


@dataclass(frozen=True)
class Pool:
    """Shards that are drawn from together."""

    number: int
    shards: list[tuple[Source, str]]
    num_streams: int
    seed: int
    items: list[tuple[Source, Sample | Reject]] | None = None
    """Everything that a small pool holds."""

    @property
    def pieces_per_shard(self) -> int:
        """m: as many that every stream can read another piece."""
        return -(-self.num_streams // len(self.shards))

    def piece(self, slot: int) -> Piece:
        """What a slot holds."""
        if self.items is not None:
            epoch, place = divmod(slot, len(self.items))
            order = _permutation((self.seed, _SLOTS, self.number, epoch), len(self.items))
            source, item = self.items[order[place]]
            return Piece(source, item.shard, (0, 1), epoch, item)
        m = self.pieces_per_shard
        epoch, place = divmod(slot, len(self.shards) * m)
        order = _permutation((self.seed, _SLOTS, self.number, epoch), len(self.shards) * m)
        shard, j = divmod(int(order[place]), m)
        return Piece(*self.shards[shard], (j, m), epoch)

    def sample_order(self, slot: int, number: int, num_samples: int) -> list[int]:
        """The order in which the samples of a block are drawn."""
        rng = np.random.default_rng([self.seed, _SAMPLES, self.number, slot, number])
        order: list[int] = rng.permutation(num_samples).tolist()
        return order


@lru_cache(maxsize=8)  # streams are not all in the same epoch; a permutation of 100,000 pieces is 0.8 MB
def _permutation(seed: tuple[int, ...], size: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)


def block_size(stream: int, position: Position, pieces_per_shard: int, num_pools: int) -> int:
    """How many samples the block that begins at a position holds at most.

    The first blocks of a stream are small, so that the first batch comes at once. They grow from a size that
    differs between streams, so that later not all streams need their next block in the same row.
    """
    most = max(1, MAX_BLOCK_SAMPLES // num_pools)
    if position.slot != stream:  # not the stream's first slot
        return most
    return min(most, position.number // pieces_per_shard + 4 * (stream % 8 + 1))


class Order:
    """The draws of one process of a job, from the beginning or from a cursor.

    Args:
        mixture: what is drawn from.
        seed: decides the order; not negative.
        rank: this process, of `world_size`.
        cursor: where an earlier job stopped, of any number of processes that divides its streams.

    Raises:
        SourceError: a source has no shards, or a pool no samples.
        ConfigError: impossible settings, or a cursor of other data or of another seed.
    """

    def __init__(
        self, mixture: Mixture, *, seed: int, rank: int, world_size: int, cursor: Mapping[str, Any] | None
    ) -> None:
        if seed < 0 or not 0 <= rank < world_size:
            raise ConfigError(
                f"seed {seed} must not be negative, and rank {rank} must be within world_size {world_size}"
            )
        self.seed, self.rank, self.world_size, self.weights = seed, rank, world_size, mixture.weights
        default = 64 if world_size <= 8 and 64 % world_size == 0 else 8 * world_size
        self.num_streams = default if cursor is None else int(cursor.get("streams", 0))
        if self.num_streams < 1 or self.num_streams % world_size:
            raise ConfigError(
                f"a run with {self.num_streams} streams of samples cannot go on with {world_size} processes; "
                "their number must divide that of the streams"
            )
        self.streams = range(rank, self.num_streams, world_size)
        shard_names = [source.shards() for source in mixture.sources]
        shards = []
        for source, names in zip(mixture.sources, shard_names, strict=True):
            if not names:
                raise SourceError(f"{source.name}: no shards")
            shards.append([(source, name) for name in names])
        if mixture.weights is None:
            shards = [[pair for names in shards for pair in names]]
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
        if cursor is not None:
            self._resume(cursor)

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

    def _resume(self, cursor: Mapping[str, Any]) -> None:
        _check_same(cursor, self._identity)
        self.first_draw = int(cursor["draw"])
        for stream in self.streams:
            if str(stream) not in cursor["positions"]:
                raise ConfigError(
                    "the cursor is that of one process of several; join those of all processes to go on with "
                    "another number of them"
                )
            self.positions[stream] = [Position(*position) for position in cursor["positions"][str(stream)]]


def join_cursors(cursors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One cursor of those of all processes of a job after the same step; it serves any process of a new one.

    Raises `ConfigError` when they are not of one job and step.
    """
    first = {name: value for name, value in cursors[0].items() if name != "positions"}
    for cursor in cursors:
        _check_same(cursor, first)
    return {**first, "positions": {s: p for cursor in cursors for s, p in cursor["positions"].items()}}


def _read_small_pool(
    shards: Sequence[tuple[Source, str]], num_streams: int
) -> list[tuple[Source, Sample | Reject]] | None:
    """All items of a pool, or None for one of more than a few samples: then only the texts of so many are read.

    Raises `SourceError` for a pool without samples.
    """
    if len(shards) >= num_streams:
        return None
    for images in (False, True):
        items: list[tuple[Source, Sample | Reject]] = []
        num_bytes = 0
        for source, shard in shards:
            located: list[Located] = []
            for entry in _read_halves(source, shard, images):
                located.append(entry)
                num_bytes += len(entry.item.image) if isinstance(entry.item, Sample) else 0
                if len(items) + len(located) > SMALL_POOL_SAMPLES * num_streams or num_bytes > SMALL_POOL_BYTES:
                    return None
            items += [(source, entry.item) for entry in sorted(located, key=lambda entry: entry.number)]
    if not items:
        raise SourceError(f"{shards[0][0].name}: no sample can be used, because it holds none")
    return items


def _read_halves(source: Source, shard: str, images: bool) -> Iterator[Located]:
    """A shard in two pieces: of a remote shard, so read, a copy is made, which the streams need in any case."""
    number = 0
    try:
        for piece in (0, 1):
            for number, item in source.read(shard, images=images, pieces=(piece, 2)):
                yield Located(number, item)
    except SourceError as error:  # of this shard: the others may be fine
        yield Located(number, Reject(shard, "", str(error)))
    except OSError as error:
        raise SourceError(f"{source.name}: shard {shard} cannot be read: {error}") from error


def _check_same(cursor: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if cursor.get(name) != value:
            raise ConfigError(
                f"the data changed since the run was stopped: {name} was {cursor.get(name)}, is {value}; "
                "resume with the same data and seed, or start a new run"
            )


class _Part(NamedTuple):
    """A worker's rows of a batch."""

    rows: range
    pixels: torch.Tensor
    """(rows, ...): the pixels of all examples, which cross processes in shared memory."""
    examples: list[Example]
    """Without their pixels."""
    rejects: list[tuple[int, Reject]]
    """With the row that the next sample of the stream took."""
    positions: dict[int, tuple[Position, ...]]
    """Of the streams that were drawn from, after their last draw."""


@dataclass(frozen=True)
class _Worker(IterableDataset[_Part | OpenBlipError]):
    """What one worker process gives to every batch; without workers, the whole batch."""

    order: Order
    decoder: _Decoder
    batch_size: int

    def __iter__(self) -> Iterator[_Part | OpenBlipError]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        threads = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="openblip-read")
        closing = threading.Event()
        try:
            yield from self._parts(worker, num_workers, threads, closing)
        except OpenBlipError as error:
            yield error  # the training process raises it again, without the DataLoader's traceback in its text
        finally:
            closing.set()
            threads.shutdown(cancel_futures=True)

    def _parts(
        self, worker: int, num_workers: int, threads: ThreadPoolExecutor, closing: threading.Event
    ) -> Iterator[_Part]:
        order = self.order
        streams: dict[tuple[int, int], _Stream] = {}  # by stream and pool
        unusable = _UnusableSources(order.pools, self.decoder)

        def stream_of(stream: int, row: int) -> _Stream:
            pool = order.choose_pool(stream, row)
            if (stream, pool) not in streams:
                streams[stream, pool] = _Stream(order, stream, pool, unusable, threads, closing)
            return streams[stream, pool]

        # The process's k-th draw is draw k * W + rank of the job.
        k = -(-(order.first_draw - order.rank) // order.world_size)
        # All streams begin to read at once, in the order in which they are needed.
        own = [i for i in range(k, k + len(order.streams)) if i % num_workers == worker]
        for i in own:
            draw = i * order.world_size + order.rank
            stream_of(draw % order.num_streams, draw // order.num_streams)
        while True:
            rows = range((worker - k) % num_workers, self.batch_size, num_workers)
            pixels: list[np.ndarray] = []
            drawn: set[int] = set()
            part = _Part(rows, torch.empty(0), [], [], {})
            for row in rows:
                draw = (k + row) * order.world_size + order.rank
                number = draw % order.num_streams
                stream = stream_of(number, draw // order.num_streams)
                rejects: list[Reject] = []
                example = stream.draw(self.decoder, rejects)
                pixels.append(example.pixels)
                part.examples.append(Example(example.key, example.shard, _NO_PIXELS, example.content))
                part.rejects.extend((row, reject) for reject in rejects)
                drawn.add(number)
            for number in drawn:
                part.positions[number] = tuple(
                    streams[number, pool].position if (number, pool) in streams else position
                    for pool, position in enumerate(order.positions[number])
                )
            k += self.batch_size
            yield part._replace(pixels=torch.from_numpy(np.stack(pixels))) if pixels else part


class _Block(NamedTuple):
    """Samples of a slot that are drawn in an order of their own."""

    piece: Piece
    start: Position
    end: Position
    samples: list[Sample | None]
    """In the order of their drawing; None once drawn."""
    rejects: list[Reject]
    """What the source could not read among them."""


class _Stream:
    """The endless samples of one stream in one pool. A thread reads their blocks, one ahead."""

    def __init__(
        self,
        order: Order,
        stream: int,
        pool: int,
        unusable: "_UnusableSources",
        threads: ThreadPoolExecutor,
        closing: threading.Event,
    ) -> None:
        self.pool, self.num_pools, self.stream = order.pools[pool], len(order.pools), stream
        self.unusable, self.threads, self.closing = unusable, threads, closing
        position = order.positions[stream][pool]
        self._block: _Block | None = None
        self._taken = position.taken
        # Of the reading thread:
        self._start = position._replace(taken=0)
        self._items: Iterator[Located] | None = None
        self._ahead: Located | None = None  # the first item after the last block
        self._next_block: Future[_Block] = threads.submit(self._read)

    @property
    def position(self) -> Position:
        """After the last draw."""
        assert self._block is not None  # asked for only after a draw
        if self._taken == len(self._block.samples):
            return self._block.end
        return self._block.start._replace(taken=self._taken)

    def draw(self, decoder: _Decoder, rejects: list[Reject]) -> Example:
        """The next sample that can be used, decoded; the samples before it are added to `rejects`."""
        while True:
            while self._block is None or self._taken >= len(self._block.samples):
                self._open_block(rejects)
            sample = cast(Sample, self._block.samples[self._taken])
            self._block.samples[self._taken] = None  # its memory is free
            self._taken += 1
            piece = self._block.piece
            try:
                example = decoder(sample, piece.epoch)
            except (SourceError, ImageError) as error:
                rejects.append(Reject(sample.shard, sample.key, str(error)))
                continue
            self.unusable.note_good(piece.source)
            return example

    def _open_block(self, rejects: list[Reject]) -> None:
        last = self._block
        if last is not None:
            if last.end.slot != last.start.slot:
                self.unusable.note_slot(last.piece.source)
            self._taken = 0
        self._block = self._next_block.result()
        self._next_block = self.threads.submit(self._read)
        if self._taken == 0:  # a run that stopped inside the block has named its rejects
            rejects += self._block.rejects

    def _read(self) -> _Block:
        """The next block, which may be empty where a slot ends. Raises `SourceError` when the disk or the network
        goes on failing.
        """
        for pause in _RETRY_PAUSES:
            try:
                return self._read_once()
            except OSError:
                self._items = self._ahead = None
                self.closing.wait(pause)
        try:
            return self._read_once()
        except OSError as error:
            piece = self.pool.piece(self._start.slot)
            raise SourceError(f"{piece.source.name}: shard {piece.shard} cannot be read: {error}") from error

    def _read_once(self) -> _Block:
        start = self._start
        piece = self.pool.piece(start.slot)
        most = block_size(self.stream, start, piece.pieces[1], self.num_pools)
        end = Position(start.slot + self.pool.num_streams, 0, 0)
        samples: list[Sample] = []
        rejects: list[Reject] = []
        num_bytes, last_number = 0, -1
        try:
            if self._items is None:
                self._items = piece.read(start.number)
                self._ahead = next(self._items, None)
            while self._ahead is not None and not self.closing.is_set():
                number, item = self._ahead
                is_full = len(samples) + len(rejects) >= most or num_bytes >= MAX_BLOCK_BYTES // self.num_pools
                if is_full and number != last_number:  # what has one number stays together
                    end = Position(start.slot, number, 0)
                    break
                if isinstance(item, Sample):
                    samples.append(item)
                    num_bytes += len(item.image) + len(item.second_image or b"")
                else:
                    rejects.append(item)
                last_number = number
                self._ahead = next(self._items, None)
        except SourceError as error:  # of the whole shard: the others may be fine
            rejects.append(Reject(piece.shard, "", str(error)))
            self._ahead = None
        if self._ahead is None:
            self._items = None
        self._start = end
        shuffled = [samples[i] for i in self.pool.sample_order(start.slot, start.number, len(samples))]
        return _Block(piece, start, end, [*shuffled], rejects)


class _UnusableSources:
    """Notices a source of which no sample can be used; the streams would skip through it for ever."""

    def __init__(self, pools: list[Pool], decoder: _Decoder) -> None:
        self.decoder = decoder
        self._slots_left: dict[str, int] = {}  # by source, until one of its samples could be used
        for pool in pools:
            rounds = 2 if pool.items is not None else 2 * pool.pieces_per_shard
            for source, _ in pool.items or pool.shards:
                self._slots_left[source.name] = self._slots_left.get(source.name, 0) + rounds

    def note_good(self, source: Source) -> None:
        """A sample of the source could be used."""
        self._slots_left.pop(source.name, None)

    def note_slot(self, source: Source) -> None:
        """A slot of the source is over. After two rounds of slots without a usable sample the whole source is
        looked through. Raises `SourceError` when it has none.
        """
        if source.name not in self._slots_left:
            return
        self._slots_left[source.name] -= 1
        if self._slots_left[source.name] > 0:
            return
        last = ""
        for shard in source.shards():
            try:
                for _, item in source.read(shard):
                    if isinstance(item, Sample):
                        try:
                            self.decoder(item, 0)
                            return self.note_good(source)
                        except (SourceError, ImageError) as error:
                            item = Reject(item.shard, item.key, str(error))
                    last = f"; the last, {item.shard}/{item.key}: {item.reason}"
            except SourceError as error:
                last = f"; the last, {shard}: {error}"
        raise SourceError(f"{source.name}: no sample can be used{last}")


def unchanged(message: Any) -> Any:
    """A message of a worker as it is: the DataLoader's own function would make tensors of numbers."""
    return message


def start_worker(worker: int) -> None:
    """Signals to the whole group are the main process's: it finishes its step and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
