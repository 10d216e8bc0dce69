"""Runs CapFilt over all shards of a source on this machine, one after another."""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import openblip
from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.folder import CapFiltFolder, write_json
from openblip.capfilt.manifest import build_manifest, describe_model, start_or_resume
from openblip.capfilt.process import Models, process
from openblip.capfilt.report import write_report
from openblip.capfilt.scores import RunScores
from openblip.data.sources import Source, open_source
from openblip.errors import OpenBlipError, SourceError, UnsupportedTaskError
from openblip.progress import Progress

SHARDS_INDEXED_AHEAD = 8


@dataclass(kw_only=True)
class RunSummary:
    """What a call of `run_capfilt` did.

    done and skipped: shards finished now and before. failed: (shard, error). scores: of all finished shards,
    at the run's threshold. report: the page.
    """

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    scores: RunScores = field(default_factory=RunScores)
    report: Path

    @property
    def exit_code(self) -> int:
        """0 when every shard has its report, 1 when one could not be finished."""
        return 1 if self.failed else 0


def run_capfilt(config: CapFiltConfig, out: str | Path, *, device: str | None = None) -> RunSummary:
    """Captions and filters every shard of `config.source` into `out`; the same call again resumes.

    Finished shards are skipped. A shard that fails is recorded in its `failure.json` and the others go on;
    the next call tries it again. Killed at any moment, the folder holds only whole files.

    Args:
        device: where the models run; None takes what `openblip.load` takes.

    Raises:
        SourceError: the source is missing, empty or in an unknown format.
        CheckpointError, UnsupportedTaskError: a checkpoint is missing or cannot do its part.
        ConfigError: `out` holds a run with other settings; the message shows the difference.
    """
    source = open_source(config.source, images=config.images)
    shards = list(source.shards())
    if not shards:
        raise SourceError(f"{config.source} holds no shards; there is nothing to do")
    models = _load_models(config, device)
    manifest = build_manifest(
        config,
        describe_model(config.captioner, models.captioner),
        describe_model(config.filter, models.filter),
        num_shards=len(shards),
    )
    folder = CapFiltFolder(Path(out))
    start_or_resume(folder, manifest)
    folder.remove_leftovers()
    skipped = [shard for shard in shards if folder.is_done(shard)]
    finished = set(skipped)
    waiting = [shard for shard in shards if shard not in finished]
    summary = RunSummary(skipped=skipped, report=folder.report_page)
    with Progress("capfilt", total=_estimate_images(source, waiting), unit="images") as bar:
        if summary.skipped:
            bar.note(f"resuming: {len(summary.skipped):,} of {len(shards):,} shards are done")
        for shard in waiting:
            try:
                process(
                    shard,
                    source=source,
                    folder=folder,
                    models=models,
                    config=config,
                    manifest=manifest,
                    on_images=bar.advance,
                )
                summary.done.append(shard)
            except Exception as error:  # whatever it was, the other shards go on and this one is named
                message = _record_failure(folder, shard, error)
                summary.failed.append((shard, message))
                bar.note(f"{shard} could not be finished: {message}")
    summary.scores = write_report(folder.root)
    return summary


def _estimate_images(source: Source, shards: Sequence[str]) -> int | None:
    """The number of images, from the first shards when there are many: indexing thousands only for a bar's
    total would keep the models waiting. None when no shard can be indexed."""
    counts = []
    for shard in shards[:SHARDS_INDEXED_AHEAD]:
        try:
            counts.append(len(source.index(shard).records))
        except (OpenBlipError, OSError):
            continue  # its turn comes, and then the failure is recorded
    return round(sum(counts) / len(counts) * len(shards)) if counts else None


def _record_failure(folder: CapFiltFolder, shard: str, error: Exception) -> str:
    """Writes the shard's failure.json and returns the error as one line."""
    message = f"{type(error).__name__}: {error}" if not isinstance(error, OpenBlipError) else str(error)
    if isinstance(error, torch.OutOfMemoryError):
        message = f"out of GPU memory; run again with a smaller --batch-size ({error})"
    message = " ".join(message.split())
    details = "".join(traceback.format_exception(error))
    write_json(folder.failure(shard), {"shard": shard, "error": message, "traceback": details})
    return message


def _load_models(config: CapFiltConfig, device: str | None) -> Models:
    captioner = openblip.load(config.captioner, device=device)
    filter_ = captioner if config.filter == config.captioner else openblip.load(config.filter, device=device)
    for role, checkpoint, model, needed in (
        ("captioner", config.captioner, captioner, {"caption"}),
        ("filter", config.filter, filter_, {"match", "similarity"}),
    ):
        if missing := needed - model.tasks:
            raise UnsupportedTaskError(
                f"{checkpoint} cannot be the {role}: it has no {', '.join(sorted(missing))}, "
                f"only {', '.join(sorted(model.tasks))}"
            )
    return Models(captioner, filter_)
