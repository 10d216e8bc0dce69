"""In which order samples are drawn: a pure function of the seed and of how far it has been walked.

Each epoch of a source permutes its shards; `window_shards` shards at a time form a window whose records are
permuted together. A mixture picks the source of draw n from (seed, n) alone. The position is a handful of
numbers, so resuming neither replays nor decodes anything: only the shards of the open windows are indexed
again.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from openblip.data.sample import Record, Reject, Source
from openblip.data.sources.opening import Mixture
from openblip.errors import ConfigError, SourceError

_SHARDS, _RECORDS, _CHOICES = 1, 2, 3  # streams of random numbers that never meet
_CHOICE_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Draw:
    """One record to read, with the position after it and what indexing its window rejected."""

    record: Record
    source: int
    epoch: int
    next_draw: int
    positions: tuple[tuple[int, int, int], ...]
    rejects: tuple[Reject, ...]


class _SourceOrder:
    """The endless order of one source. Its position is (epoch, window, offset into the window)."""

    def __init__(self, source: Source, number: int, seed: int, window_shards: int) -> None:
        self.source, self.number, self.seed, self.window_shards = source, number, seed, window_shards
        self.shards = list(source.shards())
        self.num_windows = -(-len(self.shards) // window_shards)
        self.epoch, self.window, self.offset = 0, 0, 0
        self.new_rejects: list[Reject] = []
        self._records: list[Record] | None = None
        self._empty_windows = 0

    @property
    def position(self) -> tuple[int, int, int]:
        return self.epoch, self.window, self.offset

    def seek(self, position: tuple[int, int, int]) -> None:
        self.epoch, self.window, self.offset = position
        self._records = None

    def __next__(self) -> tuple[Record, int]:
        while True:
            if self._records is None:
                self._records = self._open_window()
            if self.offset < len(self._records):
                record = self._records[self.offset]
                self.offset += 1
                self._empty_windows = 0
                return record, self.epoch
            self._empty_windows += self.offset == 0
            if self._empty_windows >= self.num_windows:
                raise SourceError(f"{self.source.name}: no usable sample{_first_reasons(self.new_rejects)}")
            self._next_window()

    def _next_window(self) -> None:
        self._records, self.offset = None, 0
        self.window += 1
        if self.window >= self.num_windows:
            self.epoch, self.window = self.epoch + 1, 0

    def _open_window(self) -> list[Record]:
        order = np.random.default_rng([self.seed, _SHARDS, self.number, self.epoch]).permutation(
            len(self.shards)
        )
        chosen = order[self.window * self.window_shards : (self.window + 1) * self.window_shards]
        indexes = [self.source.index(self.shards[i]) for i in chosen]
        records = [record for index in indexes for record in index.records]
        if self.offset == 0:  # resumed inside a window, its rejects are known already
            self.new_rejects += [reject for index in indexes for reject in index.rejects]
        rng = np.random.default_rng([self.seed, _RECORDS, self.number, self.epoch, self.window])
        return [records[i] for i in rng.permutation(len(records))]


class DrawOrder:
    """Draws rank, rank + W, rank + 2W, ... of the global order of a mixture, for world size W.

    Every rank walks the whole order (which costs no payload), so the ranks together see what one rank would.
    Raises `SourceError` for a source without any sample, `ConfigError` for a cursor of other data or another
    seed.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        seed: int,
        rank: int,
        world_size: int,
        window_shards: int,
        cursor: Mapping[str, Any] | None,
    ) -> None:
        if seed < 0 or window_shards < 1 or not 0 <= rank < world_size:
            raise ConfigError(
                f"seed {seed} must not be negative, shuffle_window_shards {window_shards} at least 1, "
                f"and rank {rank} within world_size {world_size}"
            )
        self.mixture, self.seed, self.rank, self.world_size = mixture, seed, rank, world_size
        self.window_shards = window_shards
        self.sources = [_SourceOrder(s, i, seed, window_shards) for i, s in enumerate(mixture.sources)]
        for order in self.sources:
            if not order.shards:
                raise SourceError(f"{order.source.name}: no shards")
        self.next_draw = 0
        self._block = -1
        self._choices = np.zeros(_CHOICE_BLOCK, dtype=np.int64)
        if cursor is not None:
            self._resume(cursor)

    def cursor(self, next_draw: int, positions: tuple[tuple[int, int, int], ...]) -> dict[str, Any]:
        """The JSON-able state before global draw `next_draw`."""
        return {
            **self._identity(),
            "draw": next_draw,
            "positions": [list(position) for position in positions],
        }

    def _identity(self) -> dict[str, Any]:
        """What a cursor is only valid for."""
        return {
            "seed": self.seed,
            "shuffle_window_shards": self.window_shards,
            "num_shards": [len(order.shards) for order in self.sources],
            "weights": [round(weight, 9) for weight in self.mixture.weights],
        }

    def _resume(self, cursor: Mapping[str, Any]) -> None:
        for name, value in self._identity().items():
            if cursor.get(name) != value:
                raise ConfigError(
                    f"the data changed since the run was stopped: {name} was {cursor.get(name)}, is {value}; "
                    "resume with the same data and seed, or start a new run"
                )
        self.next_draw = int(cursor["draw"])
        for order, position in zip(self.sources, cursor["positions"], strict=True):
            epoch, window, offset = position
            order.seek((int(epoch), int(window), int(offset)))

    def __iter__(self) -> Iterator[Draw]:
        return self

    def __next__(self) -> Draw:
        # The W draws of one step, of which one is ours: positions are only ever taken at a multiple of W.
        taken: tuple[Record, int, int] | None = None
        for rank in range(self.world_size):
            source = self._choose(self.next_draw + rank)
            record, epoch = next(self.sources[source])
            if rank == self.rank:
                taken = record, source, epoch
        assert taken is not None
        self.next_draw += self.world_size
        rejects = [reject for order in self.sources for reject in order.new_rejects]
        for order in self.sources:
            order.new_rejects.clear()
        positions = tuple(order.position for order in self.sources)
        # Every rank indexes every shard; one of them reports.
        return Draw(*taken, self.next_draw, positions, tuple(rejects) if self.rank == 0 else ())

    def _choose(self, draw: int) -> int:
        if len(self.sources) == 1:
            return 0
        block, offset = divmod(draw, _CHOICE_BLOCK)
        if block != self._block:
            rng = np.random.default_rng([self.seed, _CHOICES, block])
            self._choices = rng.choice(len(self.sources), size=_CHOICE_BLOCK, p=self.mixture.weights)
            self._block = block
        return int(self._choices[offset])


def _first_reasons(rejects: list[Reject]) -> str:
    return "".join(f"; {reject.shard}/{reject.key}: {reject.reason}" for reject in rejects[:3])
