"""Turns a `Run` into a trained model: builds everything it names and hands it to the trainer."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from openblip.checkpoints.native import Checkpoint, is_checkpoint, save_checkpoint
from openblip.data.loader import Loader
from openblip.data.sources import Mixture, open_mixture
from openblip.data.tokenizer import Tokenizer, normalize_caption
from openblip.data.transforms import Preprocessing
from openblip.errors import ConfigError, OpenBlipError
from openblip.models.blip import Blip
from openblip.models.config import Head
from openblip.nn.vit import interpolate_positions
from openblip.predictor import load
from openblip.recipes.run import Run
from openblip.tasks.captioning import Captioning
from openblip.tasks.config import CaptioningConfig, FilterConfig, PretrainingConfig, TaskConfig
from openblip.tasks.filtering import Filtering
from openblip.tasks.pretraining import Pretraining
from openblip.training.distributed import Process, process_group, wait_for_all
from openblip.training.run_folder import RunFolder
from openblip.training.trainer import Trainer

MAX_VOCABULARY_CAPTIONS = 200_000  # enough for every word that matters; more only costs time


def start(run: Run, resume: bool = False) -> bool:
    """Train a run, or go on with it, and write its model/. False when a signal stopped it on the way.

    Raises ConfigError for settings that contradict each other or an earlier run in the same folder.
    """
    if not run.data.source:
        raise ConfigError("No training pairs: name the source with --data.source.")
    check_start(run)
    folder = RunFolder(run.out)
    with process_group() as process:
        if run.training.num_threads is not None:
            torch.set_num_threads(run.training.num_threads)
        if process.is_main:
            folder.start(run.to_dict(), resume)
        wait_for_all(process)
        if resume and is_checkpoint(folder.model):
            return True
        mixture = open_mixture(run.data.source, images=run.data.images)
        torch.manual_seed(run.training.seed)
        checkpoint = starting_point(run, mixture)
        check_text_fits(run, checkpoint)
        task = make_task(run.task, checkpoint).to(process.device)
        trainer = Trainer(
            task, _LoaderFactory(run, mixture, checkpoint, process), run.training, folder, process
        )
        finished = trainer.run()
        if finished and process.is_main:
            prompt = run.task.prompt if isinstance(run.task, CaptioningConfig) else checkpoint.prompt
            save_checkpoint(folder.model, checkpoint._replace(prompt=prompt))
        wait_for_all(process)
        return finished


def starting_point(run: Run, mixture: Mixture) -> Checkpoint:
    """The checkpoint `run.init` names, cut down to the heads the task trains; or a random model."""
    heads = _HEADS[type(run.task)]
    if run.init is not None:
        predictor = load(run.init, device="cpu")
        model = with_heads(predictor.model, heads)
        checkpoint = Checkpoint(model, predictor.tokenizer, predictor.preprocessing, predictor.prompt)
        return checkpoint if run.image_size is None else at_image_size(checkpoint, run.image_size)
    assert run.model is not None  # check_start has seen to it
    tokenizer = make_tokenizer(run, mixture)
    config = replace(run.model, text=replace(run.model.text, vocab_size=tokenizer.vocab_size), heads=heads)
    model = Blip(config)
    start_from_backbones(model, run.vision_init, run.text_init)
    return Checkpoint(model, tokenizer, Preprocessing(image_size=config.vision.image_size))


def check_start(run: Run) -> None:
    """ConfigError when the run does not say what it starts from, or says it twice."""
    if run.init == "" or (run.init is None and run.model is None):
        raise ConfigError(f"The recipe {run.recipe} starts from a checkpoint: name one with --init.")
    if run.init is not None and (run.vision_init is not None or run.text_init is not None):
        raise ConfigError("--init brings all weights: leave out --vision-init and --text-init, or --init.")
    if run.init is None and run.image_size is not None:
        raise ConfigError("--image-size is for fine-tuning; a new model's is --model.vision.image-size.")
    if run.text_init is not None and run.tokenizer is None:
        raise ConfigError(
            f"--text-init {run.text_init} knows the words of its own tokenizer: name that with --tokenizer."
        )


def check_text_fits(run: Run, checkpoint: Checkpoint) -> None:
    """ConfigError when the longest text of the run has more tokens than the model has positions."""
    longest = run.data.max_text_length
    if isinstance(run.task, CaptioningConfig):  # the prompt stands in for [CLS], and [SEP] is never fed
        longest += len(checkpoint.tokenizer.prompt(run.task.prompt)) - 2
    positions = checkpoint.model.config.text.max_positions
    if longest > positions:
        raise ConfigError(
            f"Texts of up to {longest} tokens, prompt included: the model has {positions} positions; lower "
            "--data.max-text-length."
        )


def start_from_backbones(model: Blip, vision_init: str | None, text_init: str | None) -> None:
    """Put the weights of Hugging Face backbones into a new model; CheckpointError when they do not fit."""
    if vision_init is None and text_init is None:
        return
    # Here, since transformers takes seconds to import and most runs need none of it.
    from openblip.checkpoints.backbones import init_text, init_vision

    if vision_init is not None:
        init_vision(model.vision, vision_init)
    if text_init is not None:
        init_text(model.text, text_init)


def at_image_size(checkpoint: Checkpoint, image_size: int) -> Checkpoint:
    """The same model for pictures of another size, its position embeddings interpolated once and for all."""
    config = checkpoint.model.config
    vision = replace(config.vision, image_size=image_size)
    weights: dict[str, Any] = checkpoint.model.state_dict()
    name = "vision.position_embedding"
    weights[name] = interpolate_positions(weights[name], image_size // vision.patch_size)
    resized = Blip(replace(config, vision=vision))
    resized.load_state_dict(weights)
    preprocessing = replace(checkpoint.preprocessing, image_size=image_size)
    return checkpoint._replace(model=resized, preprocessing=preprocessing)


def make_tokenizer(run: Run, mixture: Mixture) -> Tokenizer:
    """The tokenizer that `run.tokenizer` names, or a WordPiece vocabulary of the run's own captions."""
    if run.tokenizer is not None:
        return Tokenizer.load(run.tokenizer)
    return Tokenizer.train(_some_captions(mixture), run.vocab_size)


def with_heads(model: Blip, heads: tuple[Head, ...]) -> Blip:
    """The same weights with fewer heads. ConfigError when the model lacks one."""
    missing = sorted(set(heads) - set(model.config.heads))
    if missing:
        raise ConfigError(f"The checkpoint has no {', '.join(missing)} head to tune; start from another.")
    smaller = Blip(replace(model.config, heads=heads))
    weights: dict[str, Any] = model.state_dict()
    smaller.load_state_dict({name: weights[name] for name in smaller.state_dict()})
    return smaller


def make_task(config: TaskConfig, checkpoint: Checkpoint) -> nn.Module:
    """The training task that a config describes."""
    model, tokenizer, preprocessing = checkpoint.model, checkpoint.tokenizer, checkpoint.preprocessing
    match config:
        case PretrainingConfig():
            return Pretraining(model, tokenizer, preprocessing, config)
        case FilterConfig():
            return Filtering(model, tokenizer, preprocessing, config)
        case CaptioningConfig():
            return Captioning(model, tokenizer, preprocessing, config)


_HEADS: dict[type[TaskConfig], tuple[Head, ...]] = {
    PretrainingConfig: ("itc", "itm", "lm"),
    FilterConfig: ("itc", "itm"),
    CaptioningConfig: ("lm",),
}


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
            max_text_length=data.max_text_length,
            rank=self.process.rank,
            world_size=self.process.world_size,
            num_workers=data.num_workers,
            shuffle_window_shards=data.shuffle_window_shards,
            cursor=cursor,
        )


def _some_captions(mixture: Mixture) -> Iterator[str]:
    """Captions of all sources, an equal share of each, at most MAX_VOCABULARY_CAPTIONS."""
    share = MAX_VOCABULARY_CAPTIONS // len(mixture.sources)
    for source in mixture.sources:
        left = share
        for shard in source.shards():
            if left <= 0:
                break
            for record in source.index(shard).records:
                try:
                    captions = record.read().captions
                except (OpenBlipError, OSError):  # the loader names and counts it
                    continue
                yield from (normalize_caption(caption) for caption in captions)
                left -= len(captions)
