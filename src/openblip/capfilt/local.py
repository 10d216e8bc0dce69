"""CapFilt over all shards of a source: what every engine shares, and the engine for one machine.

An engine says how shards reach workers; each worker is a `ShardWorker`, which does a shard and writes its files.
"""

import contextlib
import multiprocessing
import signal
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any, cast

import torch

from openblip.capfilt.check import check_filter, describe, require_pairs, require_passed
from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.folder import SOURCES, CapFiltFolder, RunScores, build_manifest, check_sources_unchanged
from openblip.capfilt.process import ShardOutcome, ShardWorker, WorkerFacts, write_failure
from openblip.capfilt.report import write_report
from openblip.capfilt.selection import decide_again
from openblip.data.reader import num_cores
from openblip.data.sample import Reject
from openblip.data.sources import check_options_used, open_mixture, open_source
from openblip.data.sources.opening import reading_of
from openblip.errors import OpenBlipError, OutputError, SourceError
from openblip.files import remove_partials, write_json
from openblip.progress import Progress
from openblip.text_counts import count_texts

SHARDS_AT_ONCE = 3  # that a worker has: one is written, one is worked on, one is opened


@dataclass(kw_only=True)
class RunSummary:
    """Shards finished now (`done`) and before (`skipped`), (shard, error) of those that `failed`, the scores of all
    finished shards at the run's threshold, the report page, and the files that were not used, by ending."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    scores: RunScores = field(default_factory=RunScores)
    report: Path
    unused: Counter[str] = field(default_factory=Counter)
    repeats: str = ""
    """What is worth saying about web texts that stand on many images."""
    num_rejects: int = 0
    """How many samples of the shards finished now could not be read; `first_reject` is one of them."""
    first_reject: Reject | None = None


class Engine(ABC):
    """Where the workers of a run are, and how shards reach them. One engine is for one run: `load`, then `work`."""

    @abstractmethod
    def load(self, config: CapFiltConfig, out: str | Path, device: str | None) -> WorkerFacts:
        """Load the models where they will run; what "auto" stands for is the same for all workers. Raises as
        `ShardWorker.load`.
        """

    @abstractmethod
    def work(self, shards: Sequence[str], on_images: Callable[[int], None]) -> Iterator[ShardOutcome]:
        """Do the shards, in any order; the manifest is written. A shard that fails does not end the others."""

    def in_flight(self) -> Iterable[Counter[str]]:
        """What is known of shards that are not finished, as their `ShardOutcome.totals` will say it."""
        return ()

    def close(self) -> None:  # noqa: B027 (an engine may have nothing to end)
        """End what `load` and `work` have started; called at the end of the run, also of one that failed."""


class LocalEngine(Engine):
    """A worker on each device: this process on one, and a process of its own on each of several.

    A process that dies is started again with the shards that it had; a shard that was lost twice is failed.
    """

    def __init__(self) -> None:
        self.worker: ShardWorker | None = None
        self.processes: list[WorkerProcess] = []

    def load(self, config: CapFiltConfig, out: str | Path, device: str | None) -> WorkerFacts:
        devices = find_devices(device)
        if len(devices) == 1:
            self.worker = ShardWorker.load(config, out, devices[0])
            return self.worker.facts
        self.out = out
        threads = max(1, torch.get_num_threads() // len(devices))
        first = WorkerProcess(config, out, devices[0], threads, share=len(devices))
        self.processes.append(first)
        facts = first.wait_for_facts()
        self.processes += (WorkerProcess(facts.config, out, each, threads, share=len(devices)) for each in devices[1:])
        for process in self.processes[1:]:
            process.wait_for_facts()
        return facts

    def in_flight(self) -> Iterable[Counter[str]]:
        return () if self.worker is None else self.worker.in_flight.values()

    def work(self, shards: Sequence[str], on_images: Callable[[int], None]) -> Iterator[ShardOutcome]:
        if self.worker is not None:
            yield from self.worker.work_through(shards, on_images)
            return
        waiting, losses = deque(shards), Counter[str]()
        for process in [*self.processes] * SHARDS_AT_ONCE:  # in turns, so that few shards are shared fairly
            process.give(waiting)
        while busy := {process.link: process for process in self.processes if process.shards}:
            for link in connection.wait(list(busy)):
                process = busy[cast(Any, link)]
                message = process.receive()
                if isinstance(message, int):
                    on_images(message)
                elif isinstance(message, ShardOutcome):
                    process.shards.remove(message.shard)
                    process.give(waiting)
                    yield message
                elif isinstance(message, Exception):
                    raise message
                elif message is None:
                    lost = process.shards
                    losses.update(lost)
                    for shard in (shard for shard in lost if losses[shard] > 1):
                        yield process.fail(shard)
                    waiting.extendleft(shard for shard in reversed(lost) if losses[shard] == 1)
                    process.restart()
                    for _ in range(SHARDS_AT_ONCE):
                        process.give(waiting)

    def close(self) -> None:
        for process in self.processes:
            process.stop()
        if self.processes:
            remove_partials(CapFiltFolder(self.out).root / "captions")  # of processes that were killed


class WorkerProcess:
    """A process with a `ShardWorker`, and the shards that it has."""

    def __init__(
        self, config: CapFiltConfig, out: str | Path, device: str | None, num_threads: int, *, share: int
    ) -> None:
        """share: how many processes share the cores of this machine, of which each takes as many to decode."""
        if config.num_workers is None:
            config = replace(config, num_workers=max(1, num_cores() // share))
        self.arguments = (config, out, device, num_threads)
        self.device = device
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.link, theirs = context.Pipe()
        self.shards: list[str] = []
        self._is_told_the_end = False
        self.process = context.Process(target=_serve, args=(theirs, *self.arguments), daemon=True)
        self.process.start()
        theirs.close()

    def restart(self) -> None:
        """Start a new process where one has died."""
        self.stop()
        self._start()
        self.wait_for_facts()

    def stop(self) -> None:
        self.process.kill()  # all that it wrote is whole
        self.process.join()
        self.link.close()

    def wait_for_facts(self) -> WorkerFacts:
        """Wait until the models are loaded; raises what the worker raised."""
        message = self.receive()
        if isinstance(message, Exception):
            raise message
        if not isinstance(message, WorkerFacts):
            raise OutputError(f"the process on {self.device} {self.ending} while it loaded the models")
        return message

    def receive(self) -> Any:
        """What the process sends; None when it has died."""
        try:
            return self.link.recv()
        except (EOFError, OSError):
            self.process.join()
            return None

    def give(self, waiting: deque[str]) -> None:
        """Give the next shard to the process, or tell it once that there is none."""
        if self._is_told_the_end:
            return
        shard = waiting.popleft() if waiting else None
        self._is_told_the_end = shard is None
        self.shards += [] if shard is None else [shard]
        with contextlib.suppress(OSError):  # of a process that has died, which `receive` finds out
            self.link.send(shard)

    @property
    def ending(self) -> str:
        code = self.process.exitcode
        return f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"

    def fail(self, shard: str) -> ShardOutcome:
        """Write that a shard was lost with its process."""
        message = f"the process on {self.device} that worked on it {self.ending}, twice; is there enough memory?"
        return write_failure(CapFiltFolder(self.arguments[1]), shard, message)


def _serve(link: Any, config: CapFiltConfig, out: str | Path, device: str | None, num_threads: int) -> None:
    """The process of a worker. It ends when the driver has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal: the driver decides
    torch.set_num_threads(num_threads)
    try:
        worker = ShardWorker.load(config, out, device)
        link.send(worker.facts)
        for outcome in worker.work_through(iter(link.recv, None), link.send):
            link.send(outcome)
        link.recv()  # until the driver has gone
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except OpenBlipError as error:
        link.send(error)
    except Exception as error:  # which may hold what cannot be sent
        link.send(RuntimeError("".join(traceback.format_exception(error))))


def find_devices(device: str | None) -> list[str | None]:
    """Those that a user names, separated by commas; all CUDA GPUs where none is named and there are several."""
    if device is None and torch.cuda.device_count() > 1:
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [device] if device is None else [name.strip() for name in device.split(",")]


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Within, SIGTERM ends the program as Ctrl-C does, cleaning up, where nobody else has a use for it."""
    is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not is_free or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def kept_so_far(counts: Counter[str]) -> str:
    """Keep rates and rejects of what this command has done, in a few words."""
    rates = [
        f"{name} {counts[f'{name} kept'] / counts[f'{name} texts']:.0%}" for name in SOURCES if counts[f"{name} texts"]
    ]
    kept = [f"kept: {', '.join(rates)}"] if rates else []
    return "; ".join([*kept, f"{counts['rejects']:,} reject{'' if counts['rejects'] == 1 else 's'}"])


def run_capfilt(
    config: CapFiltConfig, out: str | Path, *, device: str | None = None, engine: Engine | None = None
) -> RunSummary:
    """Caption and filter every shard of `config.source` into `out`; the same call again resumes.

    Finished shards are skipped. A shard that fails is recorded in its `failure.json` and the others go on; the next
    call tries it again. After a kill at any moment the folder holds only whole files.

    device: where the models run; several are separated by commas; None takes all GPUs, or what `openblip.load` takes.
    engine: `LocalEngine` unless given.

    Raises SourceError for a source that is missing, empty or in an unknown format; CheckpointError and
    UnsupportedTaskError for a checkpoint that is missing or cannot do its part; ConfigError, which shows the
    difference, when `out` holds a run with other settings, or for too few pairs to check the filter on;
    FilterCheckError for a filter that the check shows to be unable.
    """
    with closing(engine or LocalEngine()) as engine_of_run:
        return _run_on(engine_of_run, config, out, device)


def _run_on(engine: Engine, config: CapFiltConfig, out: str | Path, device: str | None) -> RunSummary:
    source = open_source(config.source, **config.reading)
    checked_on = open_mixture(config.check, **reading_of(config.check, config)).sources if config.check else ()
    check_options_used([source, *checked_on], config)
    if config.check is not None and not config.no_check:
        require_pairs(config.check, config)
    shards = list(source.shards())
    if not shards:
        raise SourceError(f"{config.source} holds no shards; there is nothing to do")
    config, models, execution = engine.load(config, out, device)
    folder = CapFiltFolder(out)
    folder.start_or_resume(build_manifest(config, models, len(shards), execution))
    check = _check_filter(config, folder, device)
    done = set(folder.done_shards())
    skipped = [shard for shard in shards if shard in done]
    summary = RunSummary(skipped=skipped, report=folder.report_page, unused=source.count_unused())
    waiting = [shard for shard in shards if shard not in done]
    check_sources_unchanged(folder, source, summary.skipped)
    so_far: Counter[str] = Counter()
    with Progress("capfilt", unit="images") as bar, count_texts(bar.note), _sigterm_raises():

        def show(num_images: int = 0) -> None:
            bar.show(kept_so_far(sum(engine.in_flight(), so_far)))
            bar.advance(num_images)

        if summary.skipped:
            bar.note(f"resuming: {len(summary.skipped):,} of {len(shards):,} shards are done")
        if check is not None:
            bar.note(f"the filter was checked: {describe(check)}")
        elif not config.no_check:
            bar.note("the filter was not checked; --check PAIRS, clean pairs, says how well it tells true texts")
        if source.lacks:
            bar.note(f"there are no web texts: {source.lacks}")
        for outcome in engine.work(waiting, show):
            if outcome.error is not None:
                summary.failed.append((outcome.shard, outcome.error))
                bar.note(f"{outcome.shard} could not be finished: {outcome.error}")
                continue
            summary.num_rejects += outcome.num_rejects
            summary.first_reject = summary.first_reject or outcome.first_reject
            summary.done.append(outcome.shard)
            so_far += outcome.totals
            show()
            summary.unused.update({} if outcome.shard in source.unused else outcome.unused)
            per_shard = (so_far["images"] + so_far["rejects"]) / len(summary.done)  # the others are as large
            bar.total = max(bar.done, round(per_shard * (len(waiting) - len(summary.failed))))
    if summary.done:
        decide_again(folder)
    summary.repeats = folder.note_repeats()
    summary.scores = write_report(folder.root)
    return summary


def _check_filter(config: CapFiltConfig, folder: CapFiltFolder, device: str | None) -> dict[str, Any] | None:
    """Check the filter where the run asks for it, and put what was found into the manifest, which is there.

    Without --check an earlier check of the same run holds. Raises `FilterCheckError` as `require_passed` does.
    """
    manifest = folder.read_manifest()
    report: dict[str, Any] | None = manifest.get("filter_check")
    if config.check is not None:
        report = check_filter(
            config.check,
            config.filter,
            folder.root,
            options=config,
            threshold=manifest["threshold"],
            filter_facts=manifest["models"]["filter"],
            device=find_devices(device)[0],
            dtype=config.dtype,
            batch_size=config.batch_size,
        ) | {"floor": config.check_floor}
        write_json(folder.manifest, {**manifest, "filter_check": report})
    if report is not None:
        require_passed(report, config)
    return report
