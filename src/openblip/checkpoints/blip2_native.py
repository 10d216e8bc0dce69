"""OpenBLIP's own checkpoint of a BLIP-2 model: a folder that holds all of it.

config.json, model.safetensors (Q-Former, heads, and our own ViT where that is the encoder), tokenizer.json
(of the Q-Former, where it reads text), and as Hugging Face folders `language_model/` and `vision_model/`.

Key table: the keys of model.safetensors are the names of `Blip2`'s parameters, unchanged.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from openblip.checkpoints.language_models import load_language_model, save_language_model
from openblip.checkpoints.native import (
    CONFIG,
    FORMAT,
    WEIGHTS,
    check_weights,
    read_json,
    read_preprocessing,
    read_weights,
    write_config,
    write_weights,
)
from openblip.checkpoints.vision_towers import load_vision_tower, save_vision_tower
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.errors import CheckpointError, ConfigError, OpenBlipError
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, TowerConfig
from openblip.models.language_model import LanguageModel
from openblip.models.vision_tower import VisionTower
from openblip.nn.vit import VisionTransformer

MODEL_TYPE = "blip2"
LANGUAGE, VISION = "language_model", "vision_model"


class Blip2Checkpoint(NamedTuple):
    """A BLIP-2 model with what turns pictures and texts into its input."""

    model: Blip2
    tokenizer: Tokenizer | None
    """Of the Q-Former; None where it reads no text."""
    preprocessing: Preprocessing
    prompt: str = ""
    """What its captions go on from, unless the caller says otherwise: "a photo of"."""
    question_prompt: str = "Question: {} Answer:"
    """How a question is put to the language model."""


class Blip2Settings(NamedTuple):
    """What a checkpoint says about itself, without its weights and words."""

    model: Blip2Config
    preprocessing: Preprocessing
    prompt: str
    question_prompt: str


def is_blip2(folder: str | Path) -> bool:
    """Whether the folder is one of `save_blip2`."""
    path = Path(folder) / CONFIG
    return path.is_file() and read_json(path).get("model_type") == MODEL_TYPE


def save_blip2(folder: str | Path, checkpoint: Blip2Checkpoint) -> None:
    """Write a folder that `load_blip2` reads, every part in its own precision. config.json comes last."""
    folder, model = Path(folder), checkpoint.model
    folder.mkdir(parents=True, exist_ok=True)
    if model.language is not None:
        save_language_model(folder / LANGUAGE, model.language)
    if isinstance(model.vision, VisionTower):
        save_vision_tower(folder / VISION, model.vision)
    weights = {
        name: tensor.detach().to("cpu").contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith(_elsewhere(model.config))
    }
    write_weights(folder, weights)
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save(folder)
    write_config(folder, write_blip2_settings(checkpoint))


def load_blip2(folder: str | Path, tokenizer: str | os.PathLike[str] | None = None) -> Blip2Checkpoint:
    """Read a folder of `save_blip2`, in float32 on the CPU, in eval mode.

    Raises CheckpointError when a file is missing or unreadable, or when weights are missing, left over or
    wrongly shaped (it lists them).
    """
    folder = Path(folder)
    settings = read_blip2_settings(read_json(folder / CONFIG), str(folder / CONFIG))
    config = settings.model
    model = _empty_model(folder, config)
    weights = read_weights(folder / WEIGHTS)
    own = {name: t for name, t in model.state_dict().items() if not name.startswith(_elsewhere(config))}
    check_weights(own, weights, origin=str(folder / WEIGHTS))
    fill(model, weights)
    words = None
    if tokenizer is not None or config.has_text_branch:
        words = Tokenizer.load(folder if tokenizer is None else os.fspath(tokenizer))
    return Blip2Checkpoint(
        model.eval(), words, settings.preprocessing, settings.prompt, settings.question_prompt
    )


def write_blip2_settings(checkpoint: Blip2Checkpoint) -> dict[str, Any]:
    """All of a checkpoint but its weights and words: numbers, strings, lists and dicts."""
    return {
        "format": FORMAT,
        "model_type": MODEL_TYPE,
        "model": checkpoint.model.config.to_dict(),
        "preprocessing": asdict(checkpoint.preprocessing),
        "prompt": checkpoint.prompt,
        "question_prompt": checkpoint.question_prompt,
    }


def read_blip2_settings(written: Mapping[str, Any], source: str) -> Blip2Settings:
    """The inverse of `write_blip2_settings`; CheckpointError where something is missing or impossible."""
    try:
        return Blip2Settings(
            Blip2Config.from_dict(written["model"]),
            read_preprocessing(written["preprocessing"]),
            str(written["prompt"]),
            str(written["question_prompt"]),
        )
    except (KeyError, TypeError, AttributeError, OpenBlipError) as error:
        raise CheckpointError(f"{source}: {error}. Was it written by another version?") from error


def _empty_model(folder: Path, config: Blip2Config) -> Blip2:
    """A model whose Hugging Face parts have their weights, and whose own are still to be filled in."""
    language = vision = None
    if config.language is not None:
        language = load_language_model(folder / LANGUAGE, end_of_text=config.language.end_of_text)
    if isinstance(config.vision, TowerConfig):
        vision = load_vision_tower(folder / VISION, layer=config.vision.layer)
    return empty_blip2(config, vision, language)


def empty_blip2(
    config: Blip2Config,
    vision: VisionTransformer | VisionTower | None = None,
    language: LanguageModel | None = None,
) -> Blip2:
    """A model around parts that have their weights; the others are on no device until `fill` brings them.

    Raises CheckpointError when a part is not of the width that the config says.
    """
    try:
        with torch.device("meta"):
            return Blip2(config, vision, language)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def fill(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put weights in their places, whatever was there, also on another device or in another precision."""
    for name, tensor in weights.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def _elsewhere(config: Blip2Config) -> tuple[str, ...]:
    """Beginnings of the names whose weights are in Hugging Face folders."""
    return ("language.", "vision.") if isinstance(config.vision, TowerConfig) else ("language.",)
