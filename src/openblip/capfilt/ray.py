"""The engines for a Ray cluster: a `ShardWorker` or `ScoreWorker` on its nodes, with a decoder on CPUs of its own.

B images of a batch, S image size.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from openblip.capfilt.config import CapFiltConfig, ScoreConfig
from openblip.capfilt.folder import CapFiltFolder
from openblip.capfilt.local import Engine
from openblip.capfilt.process import (
    OpenedShard,
    PreparedImage,
    ShardDecoder,
    ShardOutcome,
    ShardWorker,
    WorkerFacts,
    write_failure,
)
from openblip.capfilt.scores import ScoreEngine, ScoreRun, ScoreSummary, ScoreWorker, ShardScores, plan_scores
from openblip.cluster import Died, EngineOptions, Job, LoadedJob, WorkerPool, connected
from openblip.data.reader import ReadBatch
from openblip.errors import ConfigError
from openblip.files import changed_settings, remove_partials


class RayEngine(Engine):
    """The workers of a Ray cluster work on the shards. They read the source and write the output themselves, so both
    are on storage that all nodes share.

    `load` starts the first worker, whose device decides what "auto" is. All others must make the same of it.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.resources = contextlib.ExitStack()

    def load(self, config: CapFiltConfig, out: str | Path, device: str | None) -> WorkerFacts:
        self.out, self.device = out, device
        self.resources.enter_context(connected(self.options))
        pool: WorkerPool[str, Any, ShardOutcome] = WorkerPool(
            self.options, num_workers=config.num_workers, device=device
        )
        self.pool = self.resources.enter_context(pool)
        facts: WorkerFacts = self.pool.first_facts(_CapFiltJob(config, out, device))
        self.config = facts.config
        return facts

    def work(self, shards: Sequence[str], on_images: Callable[[int], None]) -> Iterator[ShardOutcome]:
        job = _CapFiltJob(self.config, self.out, self.device)
        folder = CapFiltFolder(self.out)
        for position, outcome in self.pool.run(job, shards, on_images=on_images):
            shard = shards[position]
            if isinstance(outcome, Died):
                outcome = write_failure(folder, shard, outcome.reason)
            yield outcome
        remove_partials(folder.root / "captions")  # of workers that were killed

    def close(self) -> None:
        self.resources.close()


@dataclass(frozen=True)
class _CapFiltJob(Job[str, Any, ShardOutcome]):
    """CapFilt, a shard at a time."""

    config: CapFiltConfig
    out: str | Path
    device: str | None

    def load(self) -> "_LoadedCapFilt":
        return _LoadedCapFilt(ShardWorker.load(self.config, self.out, self.device))


class _LoadedCapFilt(LoadedJob[str, Any, ShardOutcome]):
    def __init__(self, worker: ShardWorker) -> None:
        self.worker = worker

    def facts(self) -> WorkerFacts:
        return self.worker.facts

    def check(self) -> None:
        if not self.worker.folder.manifest.is_file():
            out = self.worker.folder.root
            raise ConfigError(f"it sees no manifest in {out}: the output must be on storage that all nodes share")
        self.worker.manifest  # noqa: B018 (raises ConfigError where this worker would compute other rows)

    def decoding(self, num_workers: int) -> Callable[[str], Generator[Any]]:
        decoder = self.worker.decoder
        return _ShardReading(replace(decoder, config=replace(decoder.config, num_workers=num_workers)))

    def work(self, unit: str, batches: Generator[Any], on_images: Callable[[int], None]) -> ShardOutcome:
        unused: Counter[str] = Counter()

        def only_batches() -> Generator[ReadBatch[PreparedImage]]:
            for item in batches:
                if isinstance(item, ReadBatch):
                    yield item
                else:
                    unused.update(item)

        def opened() -> OpenedShard:
            return OpenedShard(next(batches), [], self.worker.stack_ahead(only_batches()))

        if (num_threads := self.worker.manifest["config"].get("num_threads")) is not None:
            torch.set_num_threads(num_threads)  # of this thread, which may be another one than that of the check
        return replace(self.worker.finish(unit, opened, on_images), unused=unused)


@dataclass(frozen=True)
class _ShardReading:
    """What a decoder sends: the state of a shard's file, its batches without the files of images, and which of its
    files are no part of a sample.
    """

    decoder: ShardDecoder

    def __call__(self, shard: str) -> Generator[Any]:
        yield self.decoder.source.file_state(shard)
        with contextlib.closing(self.decoder.batches(shard)) as batches:
            for batch in batches:
                samples = [(replace(sample, image=b""), prepared) for sample, prepared in batch.samples]
                yield ReadBatch(samples, batch.rejects)
        yield dict(self.decoder.source.unused.get(shard, {}))


class RayScoreEngine(ScoreEngine):
    """The workers of a Ray cluster compute scores: they read the run and its source, and write the columns themselves.
    What "auto" stands for is decided by the device of the first one.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.resources = contextlib.ExitStack()
        self._pool: WorkerPool[ShardScores, Any, ScoreSummary] | None = None

    def _pool_for(self, run: ScoreRun) -> "WorkerPool[ShardScores, Any, ScoreSummary]":
        if self._pool is None:
            self.resources.enter_context(connected(self.options))
            pool: WorkerPool[ShardScores, Any, ScoreSummary] = WorkerPool(
                self.options, num_workers=run.config.num_workers, device=run.device
            )
            self._pool = self.resources.enter_context(pool)
        return self._pool

    def clip_settings(self, run: ScoreRun) -> dict[str, str]:
        settings: dict[str, str] = self._pool_for(run).first_facts(_ScoreJob.of(run, {}))
        return settings

    def work(
        self, worker: ScoreWorker, units: Sequence[ShardScores], on_images: Callable[[int], None]
    ) -> Iterator[ScoreSummary]:
        pool, run = self._pool_for(worker.run), worker.run
        job = _ScoreJob.of(run, {name: planned.settings for name, planned in worker.plan.items()})
        for position, done in pool.run(job, units, on_images=on_images):
            unit = units[position]
            if isinstance(done, Died):
                done = ScoreSummary(failed=[(name, unit.shard, done.reason) for name in unit.names])
            yield done
        for name in worker.plan:  # of workers that were killed
            remove_partials(run.folder.root / "scores" / name)

    def close(self) -> None:
        self.resources.close()


@dataclass(frozen=True)
class _ScoreJob(Job[ShardScores, Any, ScoreSummary]):
    """Scores, a shard at a time."""

    directory: str
    config: ScoreConfig
    device: str | None
    dtype: str
    settings: Mapping[str, Mapping[str, Any]]
    """What decides the values of each column, so that no worker computes others; empty before it is known."""

    @classmethod
    def of(cls, run: ScoreRun, settings: Mapping[str, Mapping[str, Any]]) -> "_ScoreJob":
        return cls(str(run.folder.root), run.config, run.device, run.dtype, settings)

    def load(self) -> "_LoadedScores":
        run = ScoreRun(self.directory, self.config, self.device, self.dtype)
        plan = [planned for planned in plan_scores(run, ScoreEngine()) if not planned.kind.is_central]
        return _LoadedScores(ScoreWorker(run, plan), self.settings)


class _LoadedScores(LoadedJob[ShardScores, Any, ScoreSummary]):
    def __init__(self, worker: ScoreWorker, settings: Mapping[str, Mapping[str, Any]]) -> None:
        self.worker, self.settings = worker, settings

    def facts(self) -> dict[str, str]:
        clip = self.worker.run.config.clip
        return {} if clip is None else ScoreEngine().clip_settings(self.worker.run)

    def check(self) -> None:
        for name, planned in self.worker.plan.items():
            changed = changed_settings(self.settings.get(name, planned.settings), planned.settings)
            if changed:
                raise ConfigError(f"it would compute another score {name}: {'; '.join(changed.values())}")

    def decoding(self, num_workers: int) -> Callable[[ShardScores], Generator[Any]]:
        names = [name for name, planned in self.worker.plan.items() if not planned.stage]  # the others read no image
        return self.worker.decoder(names, num_workers).batches

    def work(self, unit: ShardScores, batches: Generator[Any], on_images: Callable[[int], None]) -> ScoreSummary:
        return self.worker.work(unit, batches, on_images)
