"""Turns a `Run` into a trained model: builds everything it names and hands it to the trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from openblip.checkpoints.native import Checkpoint, is_checkpoint, save_checkpoint
from openblip.data.loader import Loader
from openblip.data.sources import Mixture, open_mixture
from openblip.errors import ConfigError
from openblip.recipes.assembly import HEADS, check_text_fits, make_reading, make_task
from openblip.recipes.run import Run
from openblip.recipes.starting_point import starting_point
from openblip.tasks.config import CaptioningConfig
from openblip.training.distributed import Process, process_group, wait_for_all
from openblip.training.run_folder import RunFolder
from openblip.training.trainer import Trainer


def start(run: Run, resume: bool = False) -> bool:
    """Train a run, or go on with it, and write its model/. False when a signal stopped it on the way.

    Raises ConfigError for settings that contradict each other or an earlier run in the same folder.
    """
    if not run.data.source:
        raise ConfigError("No training pairs: name the source with --data.source.")
    check_start(run)
    folder = RunFolder(run.out)
    with process_group() as process, cpu_threads(run.training.num_threads):
        if process.is_main:
            folder.start(run.to_dict(), resume)
        wait_for_all(process)
        if resume and is_checkpoint(folder.model):
            return True
        mixture = open_mixture(run.data.source, images=run.data.images)
        torch.manual_seed(run.training.seed)
        checkpoint = starting_point(run, HEADS[type(run.task)], mixture)
        check_text_fits(run, checkpoint)
        task = make_task(run.task, checkpoint).to(process.device)
        trainer = Trainer(
            task, _LoaderFactory(run, mixture, checkpoint, process), run.training, folder, process
        )
        finished = trainer.run()
        if finished and process.is_main:
            prompt = run.task.prompt if isinstance(run.task, CaptioningConfig) else checkpoint.prompt
            # Every task that reads texts beside images begins them with [ENC], whatever the start did.
            save_checkpoint(folder.model, checkpoint._replace(prompt=prompt, encoder_token="[ENC]"))
        wait_for_all(process)
        return finished


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


def check_start(run: Run) -> None:
    """ConfigError when the run does not say what it starts from, or says it twice."""
    if run.init == "" or (run.init is None and run.model is None):
        raise ConfigError(f"The recipe {run.recipe} starts from a checkpoint: name one with --init.")
    if run.init is not None and (run.vision_init is not None or run.text_init is not None):
        raise ConfigError("--init brings all weights: leave out --vision-init and --text-init, or --init.")
    if run.init is None and run.drop_path is not None:
        raise ConfigError("--drop-path is for fine-tuning; a new model's is --model.vision.drop-path.")
    if run.init is None and run.image_size is not None:
        raise ConfigError("--image-size is for fine-tuning; a new model's is --model.vision.image-size.")
    if run.text_init is not None and run.tokenizer is None:
        raise ConfigError(
            f"--text-init {run.text_init} knows the words of its own tokenizer: name that with --tokenizer."
        )


@dataclass(frozen=True)
class _LoaderFactory:
    """Makes this process's loader from a cursor."""

    run: Run
    mixture: Mixture
    checkpoint: Checkpoint
    process: Process

    def __call__(self, cursor: dict[str, Any] | None) -> Loader:
        data, training = self.run.data, self.run.training
        return Loader(
            self.mixture,
            tokenizer=self.checkpoint.tokenizer,
            preprocessing=self.checkpoint.preprocessing,
            augmentation=data.augmentation,
            batch_size=training.batch_size,
            seed=training.seed,
            reading=make_reading(self.run.task, data),
            rank=self.process.rank,
            world_size=self.process.world_size,
            num_workers=data.num_workers,
            shuffle_window_shards=data.shuffle_window_shards,
            cursor=cursor,
        )
