"""OpenBLIP's own folder of a BLIP: config.json, model.safetensors and tokenizer.json.

The names in model.safetensors are those of `Blip`'s parameters.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openblip.checkpoints.checkpoint import (
    CONFIG,
    BlipCheckpoint,
    BlipSettings,
    check_parts_fit,
    checked_encoder_token,
)
from openblip.checkpoints.state_dict import (
    WEIGHTS,
    check_weights,
    read_json_object,
    read_safetensors,
    write_safetensors,
)
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.errors import CheckpointError, OpenBlipError
from openblip.files import write_json
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig

OPENBLIP_FORMAT = "openblip"
"""`format` in config.json of every folder that OpenBLIP writes."""


def save_blip(folder: str | Path, checkpoint: BlipCheckpoint) -> None:
    """Write a folder that `load_blip` reads, weights in their own precision. config.json comes last."""
    folder = Path(folder)
    write_safetensors(folder / WEIGHTS, checkpoint.model.state_dict())
    checkpoint.tokenizer.save(folder)
    write_json(folder / CONFIG, blip_settings_to_dict(checkpoint))


def load_blip(folder: str | Path, tokenizer: str | os.PathLike[str] | None = None) -> BlipCheckpoint:
    """Read a folder of `save_blip`, in float32 on the CPU, in eval mode.

    tokenizer: folder or hub name of the vocabulary; None is the checkpoint's own.

    Raises CheckpointError when a file is missing or unreadable, when weights are missing, left over or of a
    wrong shape (they are listed), or when tokenizer or preprocessing are another model's.
    """
    folder = Path(folder)
    config = read_json_object(folder / CONFIG)
    if config.get("format") != OPENBLIP_FORMAT:
        raise CheckpointError(
            f"{folder / CONFIG} is not an OpenBLIP checkpoint (no format: {OPENBLIP_FORMAT})."
        )
    settings = read_blip_settings(config, str(folder / CONFIG))
    model = empty_blip(settings.model)
    load_weights(model, read_safetensors(folder / WEIGHTS), origin=str(folder / WEIGHTS))
    words = Tokenizer.load(folder if tokenizer is None else os.fspath(tokenizer))
    checkpoint = BlipCheckpoint(model.eval(), words, *settings[1:])
    check_parts_fit(folder, checkpoint)
    return checkpoint


def blip_settings_to_dict(checkpoint: BlipCheckpoint) -> dict[str, Any]:
    """A checkpoint without weights and vocabulary, as numbers, strings, lists and dicts."""
    return {
        "format": OPENBLIP_FORMAT,
        "model_type": "blip",
        "model": checkpoint.model.config.to_dict(),
        "preprocessing": asdict(checkpoint.preprocessing),
        "prompt": checkpoint.prompt,
        "encoder_token": checkpoint.encoder_token,
    }


def read_blip_settings(written: Mapping[str, Any], source: str) -> BlipSettings:
    """The inverse of `blip_settings_to_dict`; CheckpointError for what is missing, unknown or impossible."""
    try:
        return BlipSettings(
            BlipConfig.from_dict(written["model"]),
            preprocessing_from_dict(written["preprocessing"]),
            str(written["prompt"]),
            checked_encoder_token(written.get("encoder_token", "[ENC]")),
        )
    except (KeyError, TypeError, AttributeError, OpenBlipError) as error:
        raise CheckpointError(f"{source}: {error}. Was it written by another version?") from error


def preprocessing_from_dict(written: Mapping[str, Any]) -> Preprocessing:
    """The inverse of `asdict` after a way through JSON, which turns tuples into lists."""
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in dict(written).items()}
    return Preprocessing(**values)


def empty_blip(config: BlipConfig) -> Blip:
    """A model on the CPU without initial weights, to be filled: drawing random ones would take time."""
    with torch.device("meta"):
        model = Blip(config)
    model.to_empty(device="cpu")
    return model


def load_weights(model: Blip, weights: Mapping[str, Tensor], origin: str) -> None:
    """Copy `weights` into the model; CheckpointError unless names and shapes are exactly the model's."""
    check_weights(model.state_dict(), weights, origin)
    model.load_state_dict(weights)
