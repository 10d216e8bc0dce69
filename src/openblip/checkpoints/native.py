"""OpenBLIP's own folders, which hold all of a model under the names of its parameters.

config.json, model.safetensors and tokenizer.json. Of a BLIP-2, model.safetensors has the Q-Former, the heads, and our
own ViT where that is the image encoder; tokenizer.json is there when the Q-Former has a text branch; and
`language_model/` and `vision_model/` are folders of transformers.
"""

import os
from pathlib import Path

from openblip.checkpoints.backbones import (
    load_language_model,
    load_vision_tower,
    save_language_model,
    save_vision_tower,
)
from openblip.checkpoints.checkpoint import (
    CONFIG_FILE,
    Blip2Checkpoint,
    BlipCheckpoint,
    PathOrName,
    check_parts_fit,
    empty_blip,
    empty_blip2,
    read_blip2_settings,
    read_blip_settings,
    settings_to_dict,
)
from openblip.checkpoints.state_dict import (
    WEIGHTS,
    assign_weights,
    load_weights,
    read_json_object,
    read_safetensors,
    write_safetensors,
)
from openblip.data.tokenizer import Tokenizer
from openblip.files import write_json
from openblip.models.config import Blip2Config, TowerConfig
from openblip.models.vision_tower import VisionTower

_LANGUAGE_FOLDER, _VISION_FOLDER = "language_model", "vision_model"


def save_blip(folder: Path, checkpoint: BlipCheckpoint) -> None:
    """Write a folder that `load_blip` reads, weights in their own precision. config.json comes last."""
    write_safetensors(folder / WEIGHTS, checkpoint.model.state_dict())
    checkpoint.tokenizer.save(folder)
    write_json(folder / CONFIG_FILE, settings_to_dict(checkpoint))


def load_blip(folder: Path, tokenizer: PathOrName | None = None) -> BlipCheckpoint:
    """Read a folder of `save_blip`.

    tokenizer: folder or hub name of the vocabulary; None is the checkpoint's own.
    """
    settings = read_blip_settings(read_json_object(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    model = empty_blip(settings.model)
    load_weights(model, read_safetensors(folder / WEIGHTS), origin=str(folder / WEIGHTS))
    words = Tokenizer.load(folder if tokenizer is None else os.fspath(tokenizer))
    checkpoint = BlipCheckpoint(model.eval(), words, *settings[1:])
    check_parts_fit(folder, checkpoint)
    return checkpoint


def save_blip2(folder: Path, checkpoint: Blip2Checkpoint) -> None:
    """Write a folder that `load_blip2` reads, every part in its own precision. config.json comes last."""
    model = checkpoint.model
    folder.mkdir(parents=True, exist_ok=True)
    if model.language is not None:
        save_language_model(folder / _LANGUAGE_FOLDER, model.language)
    if isinstance(model.vision, VisionTower):
        save_vision_tower(folder / _VISION_FOLDER, model.vision)
    in_folders = _prefixes_in_folders(model.config)
    write_safetensors(folder / WEIGHTS, {n: t for n, t in model.state_dict().items() if not n.startswith(in_folders)})
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save(folder)
    write_json(folder / CONFIG_FILE, settings_to_dict(checkpoint))


def load_blip2(folder: Path, tokenizer: PathOrName | None = None) -> Blip2Checkpoint:
    """Read a folder of `save_blip2`.

    tokenizer: folder or hub name of the Q-Former's vocabulary; None is the checkpoint's own.
    """
    settings = read_blip2_settings(read_json_object(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    config = settings.model
    language = vision = None
    if config.language is not None:
        language = load_language_model(folder / _LANGUAGE_FOLDER, end_of_text=config.language.end_of_text)
    if isinstance(config.vision, TowerConfig):
        vision = load_vision_tower(folder / _VISION_FOLDER, layer=config.vision.layer)
    model = empty_blip2(config, vision, language)
    weights = read_safetensors(folder / WEIGHTS)
    assign_weights(model, weights, str(folder / WEIGHTS), loaded=_prefixes_in_folders(config))
    words = None
    if tokenizer is not None or config.has_text_branch:
        words = Tokenizer.load(folder if tokenizer is None else os.fspath(tokenizer))
    return Blip2Checkpoint(model.eval(), words, *settings[1:])


def _prefixes_in_folders(config: Blip2Config) -> tuple[str, ...]:
    """Prefixes of the names whose weights are in folders of transformers."""
    return ("language.", "vision.") if isinstance(config.vision, TowerConfig) else ("language.",)
