"""The engine for a Ray cluster: `ShardWorker`s on its nodes, each with a decoder on CPUs of its own.

B images of a batch, S image size.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.folder import CapFiltFolder
from openblip.capfilt.local import Engine
from openblip.capfilt.process import OpenedShard, ShardDecoder, ShardOutcome, ShardWorker, WorkerFacts
from openblip.cluster import Died, EngineOptions, Job, LoadedJob, WorkerPool, connected
from openblip.data.reader import ReadBatch
from openblip.errors import ConfigError
from openblip.files import remove_partials, write_json


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
                write_json(folder.file(shard, "failure.json"), {"shard": shard, "error": outcome.reason})
                outcome = ShardOutcome(shard=shard, error=outcome.reason)
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

    def decoding(self) -> Callable[[str], Generator[Any]]:
        return _ShardReading(self.worker.decoder)

    def work(self, unit: str, batches: Generator[Any], on_images: Callable[[int], None]) -> ShardOutcome:
        def opened() -> OpenedShard:
            state = next(batches)
            return OpenedShard(state, [], self.worker.stack_ahead(batches))

        return self.worker.finish(unit, opened, on_images)


@dataclass(frozen=True)
class _ShardReading:
    """What a decoder does: it says in which state the file of a shard is, then reads it. Image files stay with it."""

    decoder: ShardDecoder

    def __call__(self, shard: str) -> Generator[Any]:
        yield self.decoder.source.file_state(shard)
        with contextlib.closing(self.decoder.batches(shard)) as batches:
            for batch in batches:
                samples = [(replace(sample, image=b""), prepared) for sample, prepared in batch.samples]
                yield ReadBatch(samples, batch.rejects)
