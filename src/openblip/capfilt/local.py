"""CapFilt over all shards of a source: what every engine shares, and the engine for one machine.

An engine says how shards reach workers; each worker is a `ShardWorker`, which does a shard and writes its files.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openblip.capfilt.check import check_filter, describe, require_pairs, require_passed
from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.folder import SOURCES, CapFiltFolder, RunScores, build_manifest, check_sources_unchanged
from openblip.capfilt.process import ShardOutcome, ShardWorker, WorkerFacts
from openblip.capfilt.report import write_report
from openblip.capfilt.selection import decide_again
from openblip.data.sample import Reject
from openblip.data.sources import check_options_used, open_mixture, open_source
from openblip.data.sources.opening import reading_of
from openblip.errors import SourceError
from openblip.files import write_json
from openblip.progress import Progress
from openblip.text_counts import count_texts


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

    def close(self) -> None:  # noqa: B027 (an engine may have nothing to end)
        """End what `load` and `work` have started; called at the end of the run, also of one that failed."""


class LocalEngine(Engine):
    """This process works on one shard after another."""

    def load(self, config: CapFiltConfig, out: str | Path, device: str | None) -> WorkerFacts:
        self.worker = ShardWorker.load(config, out, device)
        return self.worker.facts

    def work(self, shards: Sequence[str], on_images: Callable[[int], None]) -> Iterator[ShardOutcome]:
        return self.worker.work_through(shards, on_images)


def outcome_counts(outcome: ShardOutcome) -> Counter[str]:
    """How many texts a shard has, how many of them are kept, and how many rejects."""
    counts = Counter({f"{name} texts": outcome.counts.get(f"{name}_texts", 0) for name in SOURCES})
    counts.update({f"{name} kept": kept for name, kept in outcome.counts.get("kept", {}).items()})
    return counts + Counter(rejects=outcome.num_rejects)


def kept_so_far(counts: Counter[str]) -> str:
    """Keep rates and rejects of the shards that this command has finished, in a few words."""
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

    device: where the models run; None takes what `openblip.load` takes. engine: `LocalEngine` unless given.

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
    summary = RunSummary(skipped=[shard for shard in shards if shard in done], report=folder.report_page)
    waiting = [shard for shard in shards if shard not in done]
    check_sources_unchanged(folder, source, summary.skipped)
    so_far: Counter[str] = Counter()
    with Progress("capfilt", unit="images") as bar, count_texts(bar.note):
        if summary.skipped:
            bar.note(f"resuming: {len(summary.skipped):,} of {len(shards):,} shards are done")
        if check is not None:
            bar.note(f"the filter was checked: {describe(check)}")
        elif not config.no_check:
            bar.note("the filter was not checked; --check PAIRS, clean pairs, says how well it tells true texts")
        if source.lacks:
            bar.note(f"there are no web texts: {source.lacks}")
        for position, outcome in enumerate(engine.work(waiting, bar.advance), start=1):
            if outcome.error is not None:
                summary.failed.append((outcome.shard, outcome.error))
                bar.note(f"{outcome.shard} could not be finished: {outcome.error}")
                continue
            summary.num_rejects += outcome.num_rejects
            summary.first_reject = summary.first_reject or outcome.first_reject
            summary.done.append(outcome.shard)
            so_far += outcome_counts(outcome)
            bar.show(kept_so_far(so_far))
            bar.total = round(bar.done * len(waiting) / position)  # as large as those before
    if summary.done:
        decide_again(folder)
    summary.repeats = folder.note_repeats()
    summary.scores, summary.unused = write_report(folder.root), source.count_unused()
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
            device=device,
            dtype=config.dtype,
            batch_size=config.batch_size,
        ) | {"floor": config.check_floor}
        write_json(folder.manifest, {**manifest, "filter_check": report})
    if report is not None:
        require_passed(report, config)
    return report
