"""CapFilt on a cluster that is too large to try, event by event: shards, machines, storage and failures.

It knows nothing of the formula, with which benchmarks/capfilt_cost.py and the tests compare it. A machine reads the
next shard while it works on one. All that read share the storage evenly, and none gets more than its network carries.
Shards and machines differ in speed. A machine that fails loses both of its shards, which go back to the queue, and
comes back after a restart. No torch here.
"""

import heapq
import math
import random
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from openblip.cost.formula import HOUR, CapFiltWork, Cluster, working_seconds


class Simulated(NamedTuple):
    """How a simulated run went."""

    hours: float
    num_failures: int
    shards_lost: int
    """Those that were worked on, or read, when their machine failed."""


class _Event(Enum):
    STARTED = 0
    WORKED = 1
    FAILED = 2


@dataclass
class _Worker:
    """A machine. `life` counts its starts, so that events of earlier ones are known."""

    speed: float
    life: int = 0
    is_up: bool = False
    reading: int | None = None
    waiting: int | None = None
    """The shard that has been read and not begun."""
    working: int | None = None


@dataclass
class _Storage:
    """Readers of equal shares: each has received as many bytes as `sent` has grown since it began."""

    bytes_per_second: float
    most_per_reader: float
    sent: float = 0.0
    now: float = 0.0
    num_readers: int = 0
    finishing: list[tuple[float, int, int]] = field(default_factory=list)
    """A heap: what `sent` is when a reader has its shard, the reader's number, and its life."""

    def rate(self) -> float:
        return min(self.most_per_reader, self.bytes_per_second / max(1, self.num_readers))

    def advance(self, now: float) -> None:
        self.sent += (now - self.now) * self.rate()
        self.now = now

    def next_end(self) -> float:
        return self.now + max(0.0, self.finishing[0][0] - self.sent) / self.rate() if self.finishing else math.inf


def simulate_capfilt(work: CapFiltWork, cluster: Cluster, *, seed: int = 0, spread: float = 0.05) -> Simulated:
    """One run of CapFilt on a cluster."""
    machine = cluster.machine
    times = work.pair_seconds(machine)
    del times["network"]  # the storage sends no faster
    return simulate_shards(
        work.pairs / work.pairs_per_shard,
        cluster.num_machines,
        shard_seconds=working_seconds(times, machine) * work.pairs_per_shard,
        shard_bytes=work.data.image_bytes * work.pairs_per_shard,
        network_bytes=machine.network_bytes,
        storage_bytes=cluster.storage_bytes,
        start_seconds=machine.start_seconds,
        hours_between_failures=machine.hours_between_failures,
        seed=seed,
        spread=spread,
    )


def simulate_shards(
    num_shards: float,
    num_machines: int,
    *,
    shard_seconds: float,
    shard_bytes: float,
    network_bytes: float,
    storage_bytes: float,
    start_seconds: float,
    hours_between_failures: float,
    seed: int = 0,
    spread: float = 0.05,
) -> Simulated:
    """One run. num_shards: the last one may be a part. shard_seconds: to work on a shard that is read; its standard
    deviation is the share `spread`, and that of a machine's speed half of it. The rest as in `Machine` and `Cluster`.
    """
    draw, count = random.Random(seed), math.ceil(num_shards)
    queue, num_done, num_failures, num_lost = deque(range(count)), 0, 0, 0
    workers = [_Worker(max(0.5, draw.gauss(1, spread / 2))) for _ in range(min(num_machines, count))]
    storage = _Storage(storage_bytes, network_bytes)
    events: list[tuple[float, int, int, _Event]] = []  # a heap: when, which worker, in which life, what
    for number in range(len(workers)):
        heapq.heappush(events, (start_seconds, number, 0, _Event.STARTED))

    def size(shard: int) -> float:
        """As a share of a whole one."""
        return min(1.0, num_shards - shard)

    def go_on(number: int, now: float) -> None:
        """Begin what a worker can begin: work on a shard that is read, and read another."""
        worker = workers[number]
        if worker.working is None and worker.waiting is not None:
            worker.working, worker.waiting = worker.waiting, None
            needed = shard_seconds * size(worker.working) * max(0.1, draw.gauss(1, spread)) / worker.speed
            heapq.heappush(events, (now + needed, number, worker.life, _Event.WORKED))
        if worker.reading is None and worker.waiting is None and queue:
            worker.reading = queue.popleft()
            storage.num_readers += 1
            end = storage.sent + shard_bytes * size(worker.reading)
            heapq.heappush(storage.finishing, (end, number, worker.life))

    now = 0.0
    while num_done < count:
        end = storage.next_end()
        if end <= (events[0][0] if events else math.inf):
            now = end
            storage.advance(now)
            _, number, life = heapq.heappop(storage.finishing)
            worker = workers[number]
            if life == worker.life:  # else it has failed while it read
                storage.num_readers -= 1
                worker.waiting, worker.reading = worker.reading, None
                go_on(number, now)
            continue
        now, number, life, event = heapq.heappop(events)
        worker = workers[number]
        if life != worker.life:
            continue
        storage.advance(now)
        if event is _Event.STARTED:
            worker.is_up = True
            failure = now + draw.expovariate(1 / (hours_between_failures * HOUR))
            heapq.heappush(events, (failure, number, life, _Event.FAILED))
            go_on(number, now)
        elif event is _Event.WORKED:
            num_done += 1
            worker.working = None
            go_on(number, now)
        else:
            num_failures += 1
            held = [shard for shard in (worker.working, worker.waiting, worker.reading) if shard is not None]
            storage.num_readers -= worker.reading is not None
            num_lost += len(held)
            queue.extendleft(reversed(held))
            workers[number] = _Worker(worker.speed, life=life + 1)
            heapq.heappush(events, (now + start_seconds, number, life + 1, _Event.STARTED))
            for other, idle in enumerate(workers if held else ()):
                if idle.is_up and idle.reading is None and idle.waiting is None:
                    go_on(other, now)
    return Simulated(now / HOUR, num_failures, num_lost)
