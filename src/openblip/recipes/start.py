"""Turns a run into a trained model: builds everything it names and hands it to the trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from openblip.checkpoints.checkpoint import CONFIG
from openblip.data.loader import Loader
from openblip.data.sources import Mixture, open_mixture
from openblip.distributed import Process, barrier, process_group
from openblip.errors import ConfigError
from openblip.recipes.any_run import AnyRun
from openblip.recipes.assembled import Assembled
from openblip.recipes.assembly import assemble_blip
from openblip.recipes.blip2_assembly import assemble_blip2
from openblip.recipes.blip2_run import Blip2Run
from openblip.recipes.blip2_starting_point import check_blip2_start
from openblip.recipes.language_assembly import assemble_language_model
from openblip.recipes.language_run import LanguageRun
from openblip.recipes.run import Run
from openblip.recipes.starting_point import check_start
from openblip.training.run_folder import RunFolder
from openblip.training.trainer import Trainer


def start(run: AnyRun, resume: bool = False) -> bool:
    """Train a run, or go on with it, and write its model/. False when a signal stopped it on the way.

    Raises ConfigError for settings that contradict each other or an earlier run in the same folder.
    """
    if not run.data.source:
        raise ConfigError("No training samples: name the source with --data.source.")
    _check(run)
    folder = RunFolder(run.out)
    with process_group() as process, cpu_threads(run.training.num_threads):
        if process.is_main:
            folder.start(run.to_dict(), resume)
        barrier()
        if resume and (folder.model / CONFIG).is_file():
            return True
        mixture = open_mixture(run.data.source, images=run.data.images)
        torch.manual_seed(run.training.seed)
        assembled = assemble(run, mixture)
        loaders = LoaderFactory(run, mixture, assembled, process)
        trainer = Trainer(assembled.task, loaders, run.training, folder, process, assembled.save)
        finished = trainer.run()
        if finished and process.is_main:
            assembled.save(folder.model)
        barrier()
        return finished


def _check(run: AnyRun) -> None:
    match run:
        case Run():
            check_start(run)
        case Blip2Run():
            check_blip2_start(run)


def assemble(run: AnyRun, mixture: Mixture) -> Assembled:
    """Everything that a run names, built. ConfigError where it does not fit together."""
    match run:
        case Run():
            return assemble_blip(run, mixture)
        case Blip2Run():
            return assemble_blip2(run, mixture)
        case LanguageRun():
            return assemble_language_model(run, mixture)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """torch's number of threads within; None leaves it. Afterwards the caller has its own number again."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class LoaderFactory:
    """Makes this process's loader from a cursor."""

    run: AnyRun
    mixture: Mixture
    assembled: Assembled
    process: Process

    def __call__(self, cursor: dict[str, Any] | None) -> Loader:
        data, training = self.run.data, self.run.training
        return Loader(
            self.mixture,
            tokenizer=self.assembled.tokenizer,
            preprocessing=self.assembled.preprocessing,
            augmentation=data.augmentation,
            batch_size=training.batch_size,
            seed=training.seed,
            processor=self.assembled.processor,
            rank=self.process.rank,
            world_size=self.process.world_size,
            num_workers=data.num_workers,
            cursor=cursor,
        )
