"""Work on a Ray cluster: its settings, the connection, and a pool of workers that outlives their deaths.

A worker is two actors with resources that Ray reserves together (a placement group). The *decoder* reads and decodes on
CPUs; the *model actor* computes, on a GPU or a part of one where the cluster has any. Decoded batches go from one to
the other through Ray's object store, which spills to the disk when it is full; a decoder waits while
`BATCHES_IN_STORE` of its batches have not been taken. Ray places, starts and kills actors, moves batches, and reports
what died. What is left to do here is to hand the next unit of work to a worker that is free, and a unit whose worker
died to another one.
"""

import contextlib
import logging
import math
import os
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

from openblip.errors import Condition, ConfigError, MissingExtraError, OpenBlipError

Unit = TypeVar("Unit")
Batch = TypeVar("Batch")
Result = TypeVar("Result")

BATCHES_IN_STORE = 2
"""Decoded batches of a unit that wait for the models, at most."""
UNITS_AT_ONCE = 2
"""Units of a worker: while the models work on one, the next one is read and decoded."""
MOST_DEATHS = 3
"""After so many deaths of workers at the same unit it is given up: it may be what kills them."""
MOST_DECODER_CPUS = 16
SECONDS_BETWEEN_LOOKS = 1.0  # at the progress of workers, and at nodes that joined
SECONDS_TO_ANSWER = 10.0  # for a cluster that is named by its address
SECONDS_UNTIL_NOTE = 20.0  # that a worker has waited for room in the cluster


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Where the work is done: on this machine, or by the workers of a Ray cluster."""

    conditions: ClassVar = (
        Condition(
            "address gpus-per-worker cpus-per-worker max-workers object-store-memory",
            lambda o: o.engine == "ray",
            "it is for --engine ray",
        ),
        Condition(
            "object-store-memory", lambda o: o.address is None, "the cluster of --address has its own; leave one out"
        ),
    )

    engine: Literal["local", "ray"] = "local"
    """Where the work is done: local, on this machine, or ray, by the workers of a Ray cluster."""
    address: str | None = None
    """Ray: the cluster, as auto, HOST:PORT or ray://HOST:PORT; one on this machine is started when not given."""
    gpus_per_worker: float | None = None
    """Ray: GPUs of a worker, 0.5 for two workers on each; when not given 1 where the cluster has any, else 0."""
    cpus_per_worker: int | None = None
    """Ray: CPUs for the models of a worker; when not given 1 beside a GPU, else all of a node but the decoder's."""
    max_workers: int | None = None
    """Ray: the most workers, which an autoscaling cluster makes room for; as many as its nodes hold when not given."""
    object_store_memory: float | None = None
    """Ray: gigabytes for decoded images in the memory of a cluster that is started; more is spilled to the disk."""

    def __post_init__(self) -> None:
        for name, least in (("cpus_per_worker", 1), ("max_workers", 1), ("object_store_memory", 0.08)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}")
        gpus = self.gpus_per_worker
        if gpus is not None and not (0 <= gpus <= 1 or gpus == int(gpus) > 0):
            raise ConfigError(f"--gpus-per-worker is {gpus}: a part of one GPU, 0 to 1, or a whole number of them")


class LoadedJob(ABC, Generic[Unit, Batch, Result]):
    """A job on a worker, with its models loaded."""

    @abstractmethod
    def facts(self) -> Any:
        """What the driver wants to know of the models before the work begins; it is pickled."""

    @abstractmethod
    def check(self) -> None:
        """Raise `OpenBlipError` where this worker cannot take part in the work, which is about to begin."""

    @abstractmethod
    def decoding(self, num_workers: int) -> Callable[[Unit], Generator[Batch]]:
        """What the decoder does with so many threads: it reads a unit, and yields its batches. It is pickled and holds
        no model.
        """

    @abstractmethod
    def work(self, unit: Unit, batches: Generator[Batch], on_images: Callable[[int], None]) -> Result:
        """Do a unit, of which `batches` were decoded; an error that is raised ends the whole work."""


class Job(ABC, Generic[Unit, Batch, Result]):
    """What the workers of a cluster do with each unit of work. A job is pickled to them."""

    @abstractmethod
    def load(self) -> LoadedJob[Unit, Batch, Result]:
        """Load the models, on the worker. What is raised as `OpenBlipError` refuses this worker, by its name."""


@dataclass(frozen=True)
class Died:
    """In place of a result: so many workers died at a unit that it is given up."""

    reason: str


def require_ray() -> None:
    """Raises `MissingExtraError` without the package."""
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise MissingExtraError('--engine ray needs the package ray: pip install "openblip[ray]"') from error


def start_ray(object_store_memory: float | None = None) -> None:
    """Start Ray on this machine. It gives its own processes 30 s, too few where much else runs, so a second and a third
    try follow.

    object_store_memory: in GB; None lets Ray choose. Raises `ConfigError` when it does not start.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what is started here sends no statistics
    memory: dict[str, Any] = (
        {} if object_store_memory is None else {"object_store_memory": int(object_store_memory * 1e9)}
    )
    for tries_left in (2, 1, 0):
        try:
            ray.init(
                address="local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, **memory
            )
            return
        except Exception as error:  # a start that timed out has no class of its own
            ray.shutdown()
            if not tries_left or "timed out during startup" not in str(error):
                raise ConfigError(f"Ray could not be started on this machine: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


@contextlib.contextmanager
def connected(options: EngineOptions) -> Iterator[None]:
    """Be connected to the cluster of the options, or start one on this machine and end it afterwards.

    A connection that the process has already is used and kept. Raises `ConfigError` for a cluster that does not answer.
    """
    require_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    if options.address is None:
        start_ray(options.object_store_memory)
    else:
        try:
            host, separator, port = options.address.rpartition("://")[2].rpartition(":")
            if separator and port.isdigit():  # Ray itself would try for minutes
                socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_ANSWER).close()
            ray.init(address=options.address, logging_level=logging.ERROR, log_to_driver=False)
        except (OSError, RuntimeError, ValueError) as error:  # of which there are many, and all mean the same
            raise ConfigError(
                f"there is no Ray cluster at --address {options.address}: {_reason(error)}; "
                "start one with `ray start --head`, or leave --address out to use this machine",
                page="capfilt.md#on-a-ray-cluster",
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


class _Decoder:
    """The actor that reads and decodes for a model actor."""

    def __init__(self, decode: Callable[[Any], Generator[Any]]) -> None:
        self.decode = decode

    def batches(self, unit: Any) -> Iterator[Any]:
        with contextlib.closing(self.decode(unit)) as batches:
            yield from batches


class _ModelActor:
    """The actor that holds the models. It starts its decoder, which ends with it."""

    def __init__(self, decoder_cpus: int, group: Any) -> None:
        self.decoder_cpus, self.group = decoder_cpus, group
        self.job: LoadedJob[Any, Any, Any] | None = None
        self.images = 0
        self.computing = threading.Lock()  # of two units one is computed and the other decoded

    def load(self, job: Job[Any, Any, Any], versions: Mapping[str, str]) -> Any:
        """Load the models and return the facts of them; `OpenBlipError` where this worker cannot do that."""
        present = {name: version(name) for name in versions}
        if different := [
            f"{name} {present[name]}, not {needed}" for name, needed in versions.items() if present[name] != needed
        ]:
            raise ConfigError(f"it has {'; '.join(different)}: install the same versions on all nodes")
        self.job = job.load()
        return self.job.facts()

    def begin(self) -> None:
        """Check that this worker can take part, and start its decoder. Raises `OpenBlipError`."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        assert self.job is not None
        self.job.check()
        options: dict[str, Any] = {
            "num_cpus": self.decoder_cpus,
            "max_concurrency": UNITS_AT_ONCE,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=1),
        }
        self.decoder: Any = ray.remote(**options)(_Decoder).remote(self.job.decoding(self.decoder_cpus))

    def work(self, unit: Any) -> tuple[Any, int]:
        """Do a unit; with its result, the number of images since the start. While another unit is computed, this one is
        decoded as far as `BATCHES_IN_STORE` allows.
        """
        stream = self.decoder.batches.options(
            num_returns="streaming", _generator_backpressure_num_objects=BATCHES_IN_STORE
        ).remote(unit)
        assert self.job is not None
        with self.computing, contextlib.closing(self._arriving(stream)) as batches:
            return self.job.work(unit, batches, self._count), self.images

    def _arriving(self, stream: Any) -> Generator[Any]:
        """The batches of a decoder; raises what it raised. When it died, this worker dies too, as when it was killed:
        then the driver gives the unit to another one.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            for batch in stream:
                yield ray.get(batch)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error  # noqa: B904 (the same error)
        except RayError:
            os._exit(1)
        except GeneratorExit:  # the unit failed: a decoder that waits to be rid of a batch would wait for ever
            for _ in stream:
                pass
            raise

    def images_done(self) -> int:
        """The number of images since the start."""
        return self.images

    def _count(self, images: int) -> None:
        self.images += images


@dataclass(frozen=True)
class WorkerSize:
    """The resources of a worker, and how many the nodes of a cluster hold."""

    gpus: float
    cpus: int
    decoder_cpus: int
    capacity: int

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What Ray reserves for the model actor and for the decoder."""
        model = {"CPU": float(self.cpus)} | ({"GPU": self.gpus} if self.gpus else {})
        return [model, {"CPU": float(self.decoder_cpus)}]

    def __str__(self) -> str:
        return f"{self.cpus + self.decoder_cpus} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")


def worker_size(
    nodes: Sequence[Mapping[str, float]], options: EngineOptions, num_workers: int | None, device: str | None
) -> WorkerSize:
    """The size of each worker, from the resources of each node.

    num_workers: threads that decode, which are the decoder's CPUs; by default what the models leave of a node.
    """
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) and device != "cpu" else 0.0
    with_room = [node for node in nodes if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= min(gpus, 1)] or [{}]
    cpus_of_node = int(min(node.get("CPU", 1) for node in with_room))
    if gpus:
        of_node = max(1, int(max(node.get("GPU", 0) for node in with_room) / gpus))
        cpus = options.cpus_per_worker or 1
        decoder_cpus = num_workers or min(MOST_DECODER_CPUS, max(1, cpus_of_node // of_node - cpus))
        capacity: float = sum(int(node.get("GPU", 0) / gpus) for node in nodes)
    else:
        decoder_cpus = num_workers or 1
        cpus = options.cpus_per_worker or max(1, cpus_of_node - decoder_cpus)
        capacity = math.inf
    all_cpus = sum(node.get("CPU", 0) for node in nodes)
    return WorkerSize(gpus, cpus, decoder_cpus, int(min(capacity, all_cpus // (cpus + decoder_cpus))))


class _Worker:
    """A worker as the driver sees it: starting, ready with its units, or refused."""

    def __init__(self, size: WorkerSize) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.group = placement_group(size.bundles, strategy="PACK")
        options: dict[str, Any] = {
            "num_cpus": size.cpus,
            "num_gpus": size.gpus,
            "max_concurrency": UNITS_AT_ONCE + 1,  # and `images_done`; a Ray client knows no concurrency groups
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=0),
        }
        self.actor: Any = ray.remote(**options)(_ModelActor).remote(size.decoder_cpus, self.group)
        self.units: dict[Any, Any] = {}  # by the reference of their results
        self.images = 0  # that are done, as far as is known
        self.images_of_units = 0  # that are done, of the units that are

    def node(self) -> str:
        """The name of the node that it is on."""
        import ray
        from ray.util.placement_group import placement_group_table

        table = placement_group_table(self.group)
        node = next(iter(table.get("bundles_to_node_id", {}).values()), "")
        names = {entry["NodeID"]: entry["NodeName"] for entry in ray.nodes()}
        return f"{names.get(node) or 'a node that is gone'} ({node[:8]})" if node else "a node that is gone"

    def stop(self, *, keeps_room: bool = False) -> None:
        """End its processes. keeps_room: so that no other worker is placed there."""
        import ray
        from ray.util.placement_group import remove_placement_group

        with contextlib.suppress(Exception):  # what is dead already
            ray.kill(self.actor)
        if not keeps_room:
            with contextlib.suppress(Exception):
                remove_placement_group(self.group)


class WorkerPool(Generic[Unit, Batch, Result]):
    """The workers of a job on the connected cluster; a context manager that ends them.

    When a worker or its node dies, others do its units, and a new worker is started where there is room. A worker that
    cannot do the job is refused: `note` names its node and the reason.

    options, num_workers, device: see `worker_size`. on_images: is given the number of images just done, about once a
    second.
    """

    def __init__(self, options: EngineOptions, *, num_workers: int | None, device: str | None) -> None:
        self.options, self.num_workers, self.device = options, num_workers, device
        self.loading: dict[Any, _Worker] = {}  # by the reference of `load`
        self.beginning: dict[Any, _Worker] = {}  # by the reference of `begin`
        self.looks: dict[Any, _Worker] = {}  # by the reference of `images_done`
        self.loaded: list[_Worker] = []  # that wait for the work to begin
        self.workers: list[_Worker] = []  # that are ready
        self.refused: list[_Worker] = []
        self.reasons: dict[str, str] = {}  # for refusals, and deaths before a worker was ready, by node
        self.num_failed_starts = 0
        self.versions = {name: version(name) for name in ("openblip", "torch", "transformers")}
        self.looked = self.began = time.monotonic()
        self.has_noted_waiting = False
        self.undone: dict[int, Unit] = {}
        self.waiting: deque[int] = deque()
        self.deaths: Counter[int] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End all workers; what they were doing is lost, as it is when they are killed."""
        for worker in [*self.workers, *self.loaded, *self.loading.values(), *self.beginning.values(), *self.refused]:
            worker.stop()

    def first_facts(self, job: Job[Unit, Batch, Result]) -> Any:
        """Start one worker and return the facts of its models. Raises `ConfigError` when none can be started."""
        import ray

        self.job = ray.put(job)
        self._start_workers(1)
        while True:
            for ref in ray.wait(list(self.loading), num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)[0]:
                if (facts := self._welcome(ref)) is not None:
                    return facts
                self._start_workers(1)
            self._note_waiting()

    def run(
        self,
        job: Job[Unit, Batch, Result],
        units: Sequence[Unit],
        *,
        on_images: Callable[[int], None],
        ahead: int | None = None,
    ) -> Generator[tuple[int, Result | Died]]:
        """Do the units, and yield the position of each with its result, as they are done.

        Raises `ConfigError` when all workers are refused; what the job raises on a unit is raised here.

        Args:
            job: for the workers that are started from now on.
            units: in the order in which they are begun.
            on_images: is given the number of images just done, about once a second.
            ahead: a unit is begun when at most so many that come before it, from the first that is not done, are begun;
                None begins any.
        """
        import ray
        from ray.exceptions import RayError

        self.job, self.on_images = ray.put(job), on_images
        self.undone = dict(enumerate(units))  # in order, so that the first is the one that others may have to wait for
        self.waiting.extend(self.undone)
        self.ahead = len(units) if ahead is None else ahead
        for worker in self.loaded:
            self.beginning[worker.actor.begin.remote()] = worker
        self.loaded.clear()
        self._start_workers(len(units))
        while self.undone:
            self._hand_out()
            results = {ref: worker for worker in self.workers for ref in worker.units}
            pending = [*results, *self.loading, *self.beginning, *self.looks]
            ready = ray.wait(pending, num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)[0] if pending else []
            for ref in ready:
                if ref in self.loading:
                    if self._welcome(ref) is not None:
                        worker = self.loaded.pop()
                        self.beginning[worker.actor.begin.remote()] = worker
                elif ref in self.beginning:
                    self._begin(ref)
                elif ref in self.looks:
                    worker = self.looks.pop(ref)
                    with contextlib.suppress(RayError):  # it is dead, which shows in its units
                        self._count(worker, ray.get(ref))
                else:
                    yield from self._finish(ref, results[ref])
            if not pending:
                time.sleep(SECONDS_BETWEEN_LOOKS)
            if time.monotonic() - self.looked >= SECONDS_BETWEEN_LOOKS:
                self._look()

    def _start_workers(self, num_units: int) -> None:
        """Start as many workers as there is room and work for; those without work end, and leave their room."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.size = worker_size(nodes, self.options, self.num_workers, self.device)
        if not self.size.capacity and self.options.address is None:
            raise ConfigError(f"a worker needs {self.size}, which this machine's Ray cluster does not have")
        most = self.options.max_workers or max(1, self.size.capacity)
        num_present = len([*self.workers, *self.loading, *self.beginning, *self.refused])
        wanted = min(most, num_units + len(self.refused)) - num_present
        for _ in range(wanted):
            worker = _Worker(self.size)
            self.loading[worker.actor.load.remote(self.job, self.versions)] = worker
        for worker in [worker for worker in self.workers if not worker.units][: max(0, -wanted)]:
            self.workers.remove(worker)
            worker.stop()

    def _hand_out(self) -> None:
        """Give units to workers: a first one to each, then a second one, which is decoded meanwhile. A unit at which a
        worker has died is alone with its next worker, so that no other unit is blamed for what it may do again.
        """
        for load in range(UNITS_AT_ONCE):
            for worker in self.workers:
                if not self.waiting or self.waiting[0] > next(iter(self.undone)) + self.ahead:
                    return
                suspects = [each for each in (self.waiting[0], *worker.units.values()) if self.deaths[each]]
                if len(worker.units) == load and not (load and suspects):
                    number = self.waiting.popleft()
                    worker.units[worker.actor.work.remote(self.undone[number])] = number

    def _welcome(self, ref: Any) -> Any:
        """The facts of a worker that has loaded its models, which joins `loaded`; None where it was refused or died."""
        import ray

        worker = self.loading.pop(ref)
        with self._refusal(worker):
            facts = ray.get(ref)
            self.loaded.append(worker)
            return facts

    def _begin(self, ref: Any) -> None:
        """A worker can take part; or it cannot."""
        import ray

        worker = self.beginning.pop(ref)
        with self._refusal(worker):
            ray.get(ref)
            self.workers.append(worker)
            self.looks[self._look_at(worker)] = worker

    @contextlib.contextmanager
    def _refusal(self, worker: _Worker) -> Iterator[None]:
        """Refuse a worker whose answer is an error that says what it cannot do, and count one that died."""
        from ray.exceptions import RayError, RayTaskError

        try:
            yield
        except RayTaskError as error:
            if not isinstance(error.cause, OpenBlipError):
                raise
            node = worker.node()
            self.reasons[node] = str(error.cause)
            _note(f"the worker on {node} is refused: {error.cause}")
            self.refused.append(worker)
            worker.stop(keeps_room=True)
            self._check_hope()
        except RayError as error:
            self.num_failed_starts += 1
            self.reasons[worker.node()] = reason = _first_line(error)
            _note(f"a worker died while it loaded the models ({reason})")
            worker.stop()
            self._check_hope()

    def _check_hope(self) -> None:
        """Raise `ConfigError` when all workers were refused or died at their start."""
        num_hopeful = len([*self.workers, *self.loading, *self.beginning])
        if not self.workers and (self.num_failed_starts >= MOST_DEATHS or (self.refused and not num_hopeful)):
            reasons = "; ".join(f"{node}: {reason}" for node, reason in self.reasons.items())
            raise ConfigError(f"no worker of the cluster can do this: {reasons}", page="capfilt.md#on-a-ray-cluster")

    def _finish(self, ref: Any, worker: _Worker) -> Iterator[tuple[int, Result | Died]]:
        """A unit of a worker is done, or the worker is dead."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        number = worker.units.pop(ref)
        try:
            result, images = ray.get(ref)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error  # noqa: B904 (the same error)
        except RayError as error:
            yield from self._bury(worker, number, _first_line(error))
            return
        self._count(worker, images)
        worker.images_of_units = images
        del self.undone[number]
        yield number, result

    def _bury(self, worker: _Worker, number: int, reason: str) -> Iterator[tuple[int, Died]]:
        """Hand the units of a dead worker to others, first of all; give up one at which too many have died."""
        numbers = sorted([number, *worker.units.values()], reverse=True)
        _note(f"a worker died ({reason}); its work is done again")
        self._count(worker, worker.images_of_units)  # the others are done again
        self.looks = {ref: other for ref, other in self.looks.items() if other is not worker}
        self.workers.remove(worker)
        worker.units.clear()
        worker.stop()
        for each in numbers:
            self.deaths[each] += 1
            if self.deaths[each] >= MOST_DEATHS:
                died = Died(f"{MOST_DEATHS} workers died while they worked on it, the last one so: {reason}")
                del self.undone[each]
                yield each, died
            else:
                self.waiting.appendleft(each)

    def _look_at(self, worker: _Worker) -> Any:
        return worker.actor.images_done.remote()

    def _count(self, worker: _Worker, images: int) -> None:
        """A worker has done so many images since its start."""
        self.on_images(images - worker.images)
        worker.images = images

    def _look(self) -> None:
        """See what has changed: progress, nodes that joined or left, room for a worker."""
        self.looked = time.monotonic()
        being_looked_at = set(map(id, self.looks.values()))
        for worker in self.workers:
            if id(worker) not in being_looked_at:
                self.looks[self._look_at(worker)] = worker
        self._start_workers(len(self.undone))
        self._note_waiting()

    def _note_waiting(self) -> None:
        """Say once that no worker has started yet; raise `ConfigError` where none ever can."""
        seconds = time.monotonic() - self.began
        if self.workers or self.has_noted_waiting or seconds < SECONDS_UNTIL_NOTE:
            return
        self.has_noted_waiting = True
        _note(f"waiting for a worker to start; it needs {self.size} that are free in the cluster")


def _note(text: str) -> None:
    """Print a line on standard error, above the progress display if there is one."""
    print(text, file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    """What an error of Ray says, without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
