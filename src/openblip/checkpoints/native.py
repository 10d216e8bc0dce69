"""OpenBLIP's own folders, which hold all of a model under the names of its parameters.

A folder has config.json, model.safetensors and tokenizer.json. In that of a BLIP-2, model.safetensors has the Q-Former,
the heads, and our own ViT where that is the image encoder; tokenizer.json is there when the Q-Former has a text branch;
and `language_model/` and `vision_model/` are folders of transformers.
"""

import os
from pathlib import Path

from openblip.checkpoints import backbones, hub, state_dict
from openblip.checkpoints import checkpoint as base
from openblip.checkpoints.checkpoint import (
    BLIP2_TYPE,
    CONFIG_FILE,
    Blip2Checkpoint,
    BlipCheckpoint,
    Checkpoint,
    PathOrName,
)
from openblip.checkpoints.state_dict import WEIGHTS
from openblip.data.tokenizer import Tokenizer
from openblip.files import write_json
from openblip.models.config import Blip2Config, BlipConfig, TowerConfig
from openblip.models.vision_tower import VisionTower

_LANGUAGE_FOLDER, _VISION_FOLDER = "language_model", "vision_model"


def save_native(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a folder that `load_native` reads, every part in its own precision. config.json comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(checkpoint, Blip2Checkpoint):
        language, vision = checkpoint.model.language, checkpoint.model.vision
        if language is not None:
            backbones.save_language_model(folder / _LANGUAGE_FOLDER, language)
        if isinstance(vision, VisionTower):
            with hub.quietly():
                vision.model.save_pretrained(folder / _VISION_FOLDER)
    weights = state_dict.without(_prefixes_in_folders(checkpoint.model.config), checkpoint.model.state_dict())
    state_dict.write_safetensors(folder / WEIGHTS, weights)
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save(folder)
    write_json(folder / CONFIG_FILE, base.settings_to_dict(checkpoint))


def load_native(folder: Path, tokenizer: PathOrName | None = None) -> Checkpoint:
    """Read a folder of `save_native`.

    tokenizer: folder or hub name of the vocabulary, in a BLIP-2 of its Q-Former; None is the checkpoint's own.
    """
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS
    tokenizer_source = folder if tokenizer is None else os.fspath(tokenizer)
    written = state_dict.read_json_object(config_file)
    if written.get("model_type") != BLIP2_TYPE:
        config, others = base.read_settings(BlipConfig, written, config_file)
        model = base.empty_blip(config)
        state_dict.load_weights(model, state_dict.read_safetensors(weights_file), weights_file)
        blip = BlipCheckpoint(model.eval(), Tokenizer.load(tokenizer_source), **others)
        base.check_parts_fit(folder, blip)
        return blip
    blip2_config, others = base.read_settings(Blip2Config, written, config_file)
    language = vision = None
    if blip2_config.language is not None:
        end_of_text = blip2_config.language.end_of_text
        language = backbones.load_language_model(folder / _LANGUAGE_FOLDER, end_of_text=end_of_text)
    if isinstance(blip2_config.vision, TowerConfig):
        vision = backbones.load_vision_tower(folder / _VISION_FOLDER, layer=blip2_config.vision.layer)
    blip2 = base.empty_blip2(folder, blip2_config, vision, language)
    weights = state_dict.read_safetensors(weights_file)
    state_dict.assign_weights(blip2, weights, weights_file, loaded=_prefixes_in_folders(blip2_config))
    has_tokenizer = tokenizer is not None or blip2_config.has_text_branch
    return Blip2Checkpoint(blip2.eval(), Tokenizer.load(tokenizer_source) if has_tokenizer else None, **others)


def _prefixes_in_folders(config: BlipConfig | Blip2Config) -> tuple[str, ...]:
    """Prefixes of the names whose weights are in folders of transformers; a BLIP has no such names."""
    return ("language.", "vision.") if isinstance(config.vision, TowerConfig) else ("language.",)
