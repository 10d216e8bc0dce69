"""What a run of BLIP-2 trains: a Q-Former, new or of a checkpoint, between the models that the run names."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from openblip.checkpoints.blip2_native import Blip2Checkpoint
from openblip.checkpoints.image_encoders import ImageEncoder, load_image_encoder
from openblip.checkpoints.language_models import load_language_model
from openblip.checkpoints.loading import load_any
from openblip.data.sources import Mixture
from openblip.errors import ConfigError
from openblip.models.blip2 import Blip2
from openblip.models.blip2_config import Blip2Config, Blip2Head, LanguageConfig
from openblip.models.language_model import LanguageModel
from openblip.recipes.blip2_run import Blip2Run, LanguageModelSource
from openblip.recipes.starting_point import make_tokenizer

# What no earlier training may have, or not in that width: it keeps its random start.
_FRESH = ("language_proj.",)


class _Language(NamedTuple):
    config: LanguageConfig
    model: LanguageModel


def blip2_starting_point(run: Blip2Run, heads: tuple[Blip2Head, ...], mixture: Mixture) -> Blip2Checkpoint:
    """The model of a run with the heads its task trains, around its frozen parts.

    Raises ConfigError when the checkpoint it starts from lacks something that is no fresh part of a head.
    """
    start = None if run.init is None else _load_blip2(run.init)
    encoder = _image_encoder(run, start)
    language = _language_model(run, start) if "llm" in heads else None
    config = Blip2Config(
        vision=encoder.config,
        qformer=_qformer_config(run, start),
        language=None if language is None else language.config,
        embed_dim=run.embed_dim if start is None else start.model.config.embed_dim,
        heads=heads,
    )
    tokenizer = None if start is None else start.tokenizer
    if config.reads_text and tokenizer is None:
        tokenizer = make_tokenizer(run.tokenizer, run.vocab_size, mixture)
    if start is None and tokenizer is not None:
        # [ENC], the last word of our vocabularies, does not exist in BLIP-2.
        config = replace(config, qformer=replace(config.qformer, vocab_size=tokenizer.vocab_size - 1))
    model = Blip2(config, encoder.model, None if language is None else language.model)
    if start is not None:
        take_weights(model, start.model)
    frozen = [name for name in ("vision", "language") if name != "vision" or not run.train_vision]
    model.freeze(*frozen)
    return Blip2Checkpoint(model, tokenizer, encoder.preprocessing, run.prompt, run.question_prompt)


def take_weights(model: Blip2, start: Blip2) -> None:
    """Put the weights of `start` into a model with other heads; ConfigError for what neither has."""
    theirs = start.state_dict()
    missing = []
    for name, parameter in model.named_parameters():
        if name.startswith(("vision.", "language.")):
            continue
        found = theirs.get(name)
        if found is not None and found.shape == parameter.shape:
            parameter.data.copy_(found)
        elif not name.startswith(_FRESH):
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"The checkpoint has the heads {', '.join(start.config.heads)}, from which a model with "
            f"{', '.join(model.config.heads)} cannot start: there is no {missing[0]}{more} of that shape."
        )


def check_blip2_start(run: Blip2Run) -> None:
    """ConfigError when the run does not say what it starts from, or says it twice."""
    if run.init == "":
        raise ConfigError(f"The recipe {run.recipe} starts from a BLIP-2 checkpoint: name one with --init.")
    if run.init is None and (run.qformer is None or run.vision is None):
        raise ConfigError(
            "A new Q-Former needs its shape and an image encoder: --qformer and --vision.source."
        )
    if run.vision is not None and not run.vision.source:
        raise ConfigError("Name the image encoder with --vision.source.")
    if run.language is not None and not run.language.source:
        raise ConfigError("Name the language model with --language.source.")


def _load_blip2(source: str) -> Blip2Checkpoint:
    checkpoint = load_any(source)
    if not isinstance(checkpoint, Blip2Checkpoint):
        raise ConfigError(f"{source} is no checkpoint of BLIP-2; name one with --init.")
    return checkpoint


def _image_encoder(run: Blip2Run, start: Blip2Checkpoint | None) -> ImageEncoder:
    if run.vision is not None:
        dtype = getattr(torch, run.vision.dtype)
        return load_image_encoder(run.vision.source, layer=run.vision.layer, dtype=dtype)
    assert start is not None  # `check_blip2_start` has seen to it
    return ImageEncoder(start.model.vision, start.model.config.vision, start.preprocessing)


def _language_model(run: Blip2Run, start: Blip2Checkpoint | None) -> _Language:
    if run.language is not None:
        return _named_language_model(run.language)
    if start is None or start.model.language is None or start.model.config.language is None:
        raise ConfigError(f"The recipe {run.recipe} needs a language model: name it with --language.source.")
    return _Language(start.model.config.language, start.model.language)


def _named_language_model(named: LanguageModelSource) -> _Language:
    model = load_language_model(
        named.source,
        end_of_text=named.end_of_text,
        dtype=getattr(torch, named.dtype),
        quantization=named.quantization,
    )
    config = LanguageConfig(
        name=named.source,
        hidden_dim=model.hidden_dim,
        end_of_text=named.end_of_text,
        max_text_tokens=named.max_text_tokens,
    )
    return _Language(config, model)


def _qformer_config(run: Blip2Run, start: Blip2Checkpoint | None) -> Any:
    if start is not None:
        return start.model.config.qformer
    return run.qformer
