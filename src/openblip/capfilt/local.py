"""The local engine: CapFilt over all shards of a source on this machine, one after another.

While the models work on a shard, the next one is already read and decoded.
"""

import traceback
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

import torch

import openblip
from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.folder import CapFiltFolder, RunScores, build_manifest
from openblip.capfilt.process import DecodedBatch, ShardProcessor
from openblip.capfilt.report import write_report
from openblip.data.sample import Reject
from openblip.data.sources import check_options_used, open_source
from openblip.errors import OpenBlipError, OutputError, SourceError, UnsupportedTaskError
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
    num_rejects: int = 0
    """How many samples of the shards finished now could not be read; `first_reject` is one of them."""
    first_reject: Reject | None = None


def run_capfilt(config: CapFiltConfig, out: str | Path, *, device: str | None = None) -> RunSummary:
    """Caption and filter every shard of `config.source` into `out`; the same call again resumes.

    Finished shards are skipped. A shard that fails is recorded in its `failure.json` and the others go on; the next
    call tries it again. After a kill at any moment the folder holds only whole files.

    device: where the models run; None takes what `openblip.load` takes.

    Raises SourceError for a source that is missing, empty or in an unknown format; CheckpointError and
    UnsupportedTaskError for a checkpoint that is missing or cannot do its part; ConfigError, which shows the
    difference, when `out` holds a run with other settings.
    """
    source = open_source(config.source, **config.reading)
    check_options_used([source], config)
    shards = list(source.shards())
    if not shards:
        raise SourceError(f"{config.source} holds no shards; there is nothing to do")
    captioner = filter_ = openblip.load(
        config.captioner, device=device, dtype=config.dtype, quantization=config.quantization
    )
    if config.filter != config.captioner:
        filter_ = openblip.load(config.filter, device=device, dtype=config.dtype)
    for role, checkpoint, model, needed in (
        ("captioner", config.captioner, captioner, {"caption"}),
        ("filter", config.filter, filter_, {"match", "similarity"}),
    ):
        if missing := needed - model.tasks:
            raise UnsupportedTaskError(
                f"{checkpoint} cannot be the {role}: it has no {', '.join(sorted(missing))}, "
                f"only {', '.join(sorted(model.tasks))}"
            )
    config = replace(config, dtype=captioner.precision)  # what "auto" chose
    manifest = build_manifest(config, captioner, filter_, num_shards=len(shards))
    folder = CapFiltFolder(Path(out))
    folder.start_or_resume(manifest)
    processor = ShardProcessor(
        source=source, captioner=captioner, filter=filter_, config=config, folder=folder, manifest=manifest
    )

    def start(shard: str) -> tuple[list[DecodedBatch], Generator[DecodedBatch]]:
        """Begin to read a shard: its first batch, so that its threads decode the next ones, and the others."""
        batches = processor.decode(shard)
        return list(islice(batches, 1)), batches

    summary = RunSummary(skipped=[shard for shard in shards if folder.is_done(shard)], report=folder.report_page)
    waiting = [shard for shard in shards if not folder.is_done(shard)]
    with Progress("capfilt", unit="images") as bar, ThreadPoolExecutor(1) as reading, count_texts(bar.note):
        if summary.skipped:
            bar.note(f"resuming: {len(summary.skipped):,} of {len(shards):,} shards are done")
        if source.lacks:
            bar.note(f"there are no web texts: {source.lacks}")
        started = [reading.submit(start, shard) for shard in waiting[:1]]
        for position, shard in enumerate(waiting):
            current = started.pop()
            started += [reading.submit(start, name) for name in waiting[position + 1 : position + 2]]
            try:
                first, others = current.result()
                with closing(others):
                    rejects = processor.process(shard, chain(first, others), on_images=bar.advance)
                summary.num_rejects += len(rejects)
                summary.first_reject = summary.first_reject or next(iter(rejects), None)
                summary.done.append(shard)
                bar.total = round(bar.done * len(waiting) / (position + 1))  # as large as those before
            except OutputError:  # of a full disk: no other shard could be finished either
                raise
            except Exception as error:  # whatever it was, the other shards go on and this one is named
                message = str(error) if isinstance(error, OpenBlipError) else f"{type(error).__name__}: {error}"
                if isinstance(error, torch.OutOfMemoryError):
                    message = f"out of GPU memory; run again with a smaller --batch-size ({error})"
                message = " ".join(message.split())
                details = "".join(traceback.format_exception(error))
                write_json(folder.file(shard, "failure.json"), {"shard": shard, "error": message, "traceback": details})
                summary.failed.append((shard, message))
                bar.note(f"{shard} could not be finished: {message}")
    summary.scores, summary.unused = write_report(folder.root), source.count_unused()
    return summary
