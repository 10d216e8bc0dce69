"""OpenBLIP's own folder of a BLIP-2, which holds all of the model.

config.json, model.safetensors (Q-Former, heads, and our own ViT where that is the image encoder),
tokenizer.json (when the Q-Former has a text branch), and as folders of transformers `language_model/` and
`vision_model/`.

The names in model.safetensors are those of `Blip2`'s parameters.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from openblip.checkpoints.backbones import (
    load_language_model,
    load_vision_tower,
    save_language_model,
    save_vision_tower,
)
from openblip.checkpoints.checkpoint import CONFIG, Blip2Checkpoint, Blip2Settings
from openblip.checkpoints.native.blip import OPENBLIP_FORMAT, preprocessing_from_dict
from openblip.checkpoints.state_dict import (
    WEIGHTS,
    assign_weights,
    check_weights,
    read_json_object,
    read_safetensors,
    write_safetensors,
)
from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError, ConfigError, OpenBlipError
from openblip.files import write_json
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, TowerConfig
from openblip.models.language_model import LanguageModel
from openblip.models.vision_tower import VisionTower
from openblip.nn.vit import VisionTransformer

BLIP2_TYPE = "blip2"
"""`model_type` in config.json; transformers calls its own "blip-2"."""
_LANGUAGE_FOLDER, _VISION_FOLDER = "language_model", "vision_model"


def save_blip2(folder: str | Path, checkpoint: Blip2Checkpoint) -> None:
    """Write a folder that `load_blip2` reads, every part in its own precision. config.json comes last."""
    folder, model = Path(folder), checkpoint.model
    folder.mkdir(parents=True, exist_ok=True)
    if model.language is not None:
        save_language_model(folder / _LANGUAGE_FOLDER, model.language)
    if isinstance(model.vision, VisionTower):
        save_vision_tower(folder / _VISION_FOLDER, model.vision)
    in_folders = _prefixes_in_folders(model.config)
    write_safetensors(
        folder / WEIGHTS, {n: t for n, t in model.state_dict().items() if not n.startswith(in_folders)}
    )
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save(folder)
    write_json(folder / CONFIG, blip2_settings_to_dict(checkpoint))


def load_blip2(folder: str | Path, tokenizer: str | os.PathLike[str] | None = None) -> Blip2Checkpoint:
    """Read a folder of `save_blip2`, in float32 on the CPU, in eval mode.

    tokenizer: folder or hub name of the Q-Former's vocabulary; None is the checkpoint's own.

    Raises CheckpointError when a file is missing or unreadable, or when weights are missing, left over or of
    a wrong shape (they are listed).
    """
    folder = Path(folder)
    settings = read_blip2_settings(read_json_object(folder / CONFIG), str(folder / CONFIG))
    config = settings.model
    language = vision = None
    if config.language is not None:
        language = load_language_model(folder / _LANGUAGE_FOLDER, end_of_text=config.language.end_of_text)
    if isinstance(config.vision, TowerConfig):
        vision = load_vision_tower(folder / _VISION_FOLDER, layer=config.vision.layer)
    model = empty_blip2(config, vision, language)
    weights = read_safetensors(folder / WEIGHTS)
    in_folders = _prefixes_in_folders(config)
    expected = {n: t for n, t in model.state_dict().items() if not n.startswith(in_folders)}
    check_weights(expected, weights, origin=str(folder / WEIGHTS))
    assign_weights(model, weights)
    words = None
    if tokenizer is not None or config.has_text_branch:
        words = Tokenizer.load(folder if tokenizer is None else os.fspath(tokenizer))
    return Blip2Checkpoint(model.eval(), words, *settings[1:])


def blip2_settings_to_dict(checkpoint: Blip2Checkpoint) -> dict[str, Any]:
    """A checkpoint without weights and vocabulary, as numbers, strings, lists and dicts."""
    return {
        "format": OPENBLIP_FORMAT,
        "model_type": BLIP2_TYPE,
        "model": checkpoint.model.config.to_dict(),
        "preprocessing": asdict(checkpoint.preprocessing),
        "prompt": checkpoint.prompt,
        "question_prompt": checkpoint.question_prompt,
    }


def read_blip2_settings(written: Mapping[str, Any], source: str) -> Blip2Settings:
    """The inverse of `blip2_settings_to_dict`; CheckpointError for what is missing, unknown or impossible."""
    try:
        return Blip2Settings(
            Blip2Config.from_dict(written["model"]),
            preprocessing_from_dict(written["preprocessing"]),
            str(written["prompt"]),
            str(written["question_prompt"]),
        )
    except (KeyError, TypeError, AttributeError, OpenBlipError) as error:
        raise CheckpointError(f"{source}: {error}. Was it written by another version?") from error


def empty_blip2(
    config: Blip2Config,
    vision: VisionTransformer | VisionTower | None = None,
    language: LanguageModel | None = None,
) -> Blip2:
    """A model around parts that have their weights; its other weights are on no device until they are
    assigned.

    Raises CheckpointError when a part is not of the width that the config says.
    """
    try:
        with torch.device("meta"):
            return Blip2(config, vision, language)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _prefixes_in_folders(config: Blip2Config) -> tuple[str, ...]:
    """Prefixes of the names whose weights are in folders of transformers."""
    return ("language.", "vision.") if isinstance(config.vision, TowerConfig) else ("language.",)
