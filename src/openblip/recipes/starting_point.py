"""What a run trains: a checkpoint made ready for its task, or a model from random weights."""

import re
from dataclasses import replace
from typing import Any

from torch import Tensor

from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.checkpoints.loading import load_checkpoint
from openblip.data.prompts import normalize_caption
from openblip.data.reader import read_texts
from openblip.data.sources import Mixture
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.errors import ConfigError
from openblip.models.blip import Blip
from openblip.models.config import Head
from openblip.nn.vit import interpolate_positions
from openblip.recipes.run import Run

MAX_VOCABULARY_CAPTIONS = 200_000  # enough for every word that matters; more only costs time

# What a head may bring along that no earlier training has, or not in that width: it keeps its random start.
_FRESH: dict[Head, tuple[str, ...]] = {
    "nlvr": ("nlvr_head.", ".merge."),
    "visdial": ("caption_proj.", "itm_head."),
    "vqa": (".cross_attention.variants.decode.branch.key_value.weight",),  # questions, not images, are read
}


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


def starting_point(run: Run, heads: tuple[Head, ...], mixture: Mixture) -> BlipCheckpoint:
    """The checkpoint `run.init` names, with the heads its task trains; or a random model with them."""
    if run.init is not None:
        loaded = load_checkpoint(run.init)
        if not isinstance(loaded, BlipCheckpoint):
            raise ConfigError(f"{run.init} is a checkpoint of BLIP-2; the recipe {run.recipe} trains BLIP.")
        checkpoint = loaded._replace(model=with_heads(loaded.model, heads, run.drop_path))
        return checkpoint if run.image_size is None else at_image_size(checkpoint, run.image_size)
    assert run.model is not None  # `check_start` has seen to it
    tokenizer = make_tokenizer(run.tokenizer, run.vocab_size, mixture)
    config = replace(run.model, text=replace(run.model.text, vocab_size=tokenizer.vocab_size), heads=heads)
    model = Blip(config)
    start_from_backbones(model, run.vision_init, run.text_init)
    return BlipCheckpoint(model, tokenizer, Preprocessing(image_size=config.vision.image_size))


def with_heads(model: Blip, heads: tuple[Head, ...], drop_path: float | None = None) -> Blip:
    """The same weights under other heads (BLIP section 5: a task takes the parts it needs).

    Both branches over two images start as the one there was. Questions and answers get weights of their own,
    as in the released VQA fine-tuning. drop_path: of the image encoder; None keeps its own. ConfigError when
    the model lacks something that is no fresh part of a head.
    """
    vision = model.config.vision if drop_path is None else replace(model.config.vision, drop_path=drop_path)
    text = model.config.text
    if "vqa" in heads:
        text = replace(text, sharing="none")
    target = Blip(replace(model.config, heads=heads, vision=vision, text=text))
    fresh = tuple(part for head in heads for part in _FRESH.get(head, ()))
    theirs = model.state_dict()
    weights: dict[str, Any] = target.state_dict()
    missing = []
    for name, start in weights.items():
        found = _origin(name, theirs)
        if found is not None and found.shape == start.shape:
            weights[name] = found
        elif not any(part in name for part in fresh):
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"The checkpoint has the heads {', '.join(model.config.heads)}, from which a model with "
            f"{', '.join(heads)} cannot start: there is no {missing[0]}{more}. Start from a pre-trained one."
        )
    target.load_state_dict(weights)
    return target


def _origin(name: str, theirs: dict[str, Tensor]) -> Tensor | None:
    """The weights that a parameter starts from; None when the model has nothing for it."""
    of_one_image = re.sub(r"\.branch\.(first|second)\.", ".branch.", name)
    shared = re.sub(r"\.variants\.(encode|decode)\.", ".variants.shared.", of_one_image)
    return next((theirs[other] for other in (name, of_one_image, shared) if other in theirs), None)


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


def at_image_size(checkpoint: BlipCheckpoint, image_size: int) -> BlipCheckpoint:
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


def make_tokenizer(named: str | None, vocab_size: int, mixture: Mixture) -> Tokenizer:
    """The tokenizer `named`, or a WordPiece vocabulary of the run's own captions."""
    if named is not None:
        return Tokenizer.load(named)
    texts = read_texts(mixture, lambda sample: sample.captions, MAX_VOCABULARY_CAPTIONS)
    return Tokenizer.train(map(normalize_caption, texts), vocab_size)
