"""In which order samples are drawn: a pure function of the seed and of a position of three numbers.

A job has S streams. Draw d of the job is of stream d % S and row d // S. Process r of W owns the streams
s % W == r, so the processes together draw what one process would, wherever W divides S.

A pool is a set of shards that are drawn from together: all of a mixture without weights, one source of a
mixture with weights. Of n shards each is read in m = max(1, ceil(S / n)) pieces, so that every stream has a
piece of its own. Slots are endless: slot g is piece permutation(g // (n m))[g % (n m)], and stream s reads
slots s, s + S, s + 2 S, ... There is no end of an epoch, and nothing to wait for or to equalise.

A slot is read in blocks, and the samples of a block are drawn in the order of a permutation of their own.

In a pool of few samples most pieces would be empty, and streams would draw some samples again before others were
drawn at all. Its samples are kept in memory, and each is a piece of its own, so every epoch has each of them once.
"""

from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from openblip.data.sample import Located, Reject, Sample, Source
from openblip.data.sources.opening import Mixture
from openblip.errors import ConfigError, SourceError
from openblip.files import hash_bytes, hash_int

MAX_BLOCK_SAMPLES = 256
MAX_BLOCK_BYTES = 16 << 20  # 64 streams, each with a block in use and one read ahead: at most 2 GiB
SMALL_POOL_SAMPLES = 8  # per stream: beyond it no piece has only a few samples
SMALL_POOL_BYTES = 64 << 20
_SLOTS, _SAMPLES = 1, 2  # kinds of permutations, so that no two have the same seed


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
