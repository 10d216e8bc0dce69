"""The original .pth files, of the released code and of LAVIS: one file with {"model": state dict, ...}.

The tables of names are in `original_keys.py`, what shapes tell in `original_config.py`. A file of ours has
what the format has no place for (settings, prompt, words) beside "model", under "openblip".
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openblip.checkpoints.key_table import Layout, translate, translate_back
from openblip.checkpoints.native import (
    Checkpoint,
    Settings,
    as_float32,
    check_parts_fit,
    empty_blip,
    load_weights,
    read_settings,
    write_settings,
)
from openblip.checkpoints.original_config import find_layout, infer_config
from openblip.checkpoints.original_keys import LAYOUTS, TRAINING_ONLY
from openblip.checkpoints.pickled import OriginalFile, write_original
from openblip.checkpoints.text_weights import check_tied, infer_sharing, tied_copies
from openblip.checkpoints.vocabulary import tokenizer_of_file
from openblip.data.transforms import Preprocessing
from openblip.errors import CheckpointError
from openblip.models.blip import INITIAL_TEMPERATURE
from openblip.models.config import BlipConfig

CAPTION_PROMPT = "a picture of "  # of every released captioner
TEMPERATURE, THEIR_TEMPERATURE = "log_temperature", "temp"


def load_original(file: OriginalFile, tokenizer: str | os.PathLike[str] | None = None) -> Checkpoint:
    """A model of a .pth file, in float32 on the CPU, in eval mode.

    Besides weights it may hold the state of a training, which is left out: momentum copies and queues
    (`original_keys.TRAINING_ONLY`). The tokenizer is the one that `tokenizer`
    names, else the file's own (if OpenBLIP wrote it), else that of a tokenizer.json or vocab.txt beside it,
    else BERT's from the hub.

    Raises CheckpointError when the file is no BLIP or not whole (missing and left-over weights are listed),
    or when no vocabulary is there.
    """
    path, weights, entry = file
    theirs = as_float32({name: t for name, t in weights.items() if not name.startswith(TRAINING_ONLY)})
    settings = _released(theirs, str(path)) if entry is None else _own(entry, str(path))
    layout = _layout_for(settings.model)
    check_tied(theirs, str(path))
    model = empty_blip(settings.model)
    ours = model.state_dict().keys()
    if TEMPERATURE in ours and THEIR_TEMPERATURE not in theirs:  # a model saved without its losses
        theirs[THEIR_TEMPERATURE] = torch.tensor(INITIAL_TEMPERATURE)
    found = translate(layout.table, theirs, set(ours), layout.derived, str(path), layout.homes)
    if TEMPERATURE in found:
        found[TEMPERATURE] = log_of(found[TEMPERATURE], path)
    load_weights(model, found, origin=str(path))
    words = tokenizer_of_file(path, entry, tokenizer)
    checkpoint = Checkpoint(
        model.eval(), words, settings.preprocessing, settings.prompt, settings.encoder_token
    )
    check_parts_fit(path, checkpoint)
    return checkpoint


def save_original(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write one .pth file that the released code and `load_original` read.

    It has no momentum copies and queues.

    Raises CheckpointError when the released code has no model with these heads, ConfigError for another name.
    """
    config = checkpoint.model.config
    layout = _layout_for(config)
    ours = {name: tensor.detach().cpu() for name, tensor in checkpoint.model.state_dict().items()}
    if TEMPERATURE in ours:
        ours[TEMPERATURE] = ours[TEMPERATURE].exp()
    theirs = translate_back(layout.table, ours, layout.homes)
    theirs |= tied_copies(theirs)
    for home in layout.homes.values():  # a buffer that the released code asks for
        theirs[f"{home}.embeddings.position_ids"] = torch.arange(config.text.max_positions)[None]
    entry = {**write_settings(checkpoint), "tokenizer": checkpoint.tokenizer.to_json()}
    write_original(Path(path), theirs, entry)


def _layout_for(config: BlipConfig) -> Layout:
    for layout in LAYOUTS.values():
        if set(layout.heads) == set(config.heads) and layout.pooled == config.pooled:
            return layout
    kinds = ", ".join(f"{name} ({', '.join(layout.heads)})" for name, layout in LAYOUTS.items())
    pooled = " and a pooler" if config.pooled else ""
    raise CheckpointError(
        f"The released code has no model with the heads {', '.join(config.heads)}{pooled}; it has {kinds}. "
        "Save as openblip."
    )


def _released(theirs: Mapping[str, Tensor], source: str) -> Settings:
    """The settings of a file that does not say them."""
    layout = find_layout(theirs, source)
    config = infer_config(theirs, layout, infer_sharing(theirs, layout.homes), source)
    prompt = CAPTION_PROMPT if layout.heads == ("lm",) else ""
    return Settings(config, Preprocessing(image_size=config.vision.image_size), prompt, "[ENC]")


def _own(entry: Any, source: str) -> Settings:
    """The settings that `save_original` wrote."""
    if not isinstance(entry, dict):
        raise CheckpointError(f"{source}: its openblip entry is damaged, a {type(entry).__name__}.")
    return read_settings(entry, f"{source}, its openblip entry")


def log_of(temperature: Tensor, path: Path) -> Tensor:
    """The logarithm of a file's temperature, a scalar; CheckpointError where it has none."""
    if temperature.numel() != 1 or not 0 < temperature.item() < math.inf:
        raise CheckpointError(f"{path}: temp is {temperature.tolist()}; ITC divides by one number above 0.")
    return temperature.log()
