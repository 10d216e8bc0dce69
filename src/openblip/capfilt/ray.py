"""The engine for a Ray cluster: `ShardWorker`s on its nodes, each with a decoder on CPUs of its own.

B images of a batch, S image size.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from openblip.capfilt.config import CapFiltConfig
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
from openblip.cluster import Died, EngineOptions, Job, LoadedJob, WorkerPool, connected
from openblip.data.reader import ReadBatch
from openblip.errors import ConfigError
from openblip.files import remove_partials


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
