"""One entry for every checkpoint: recognises what a source is, and calls the reader or writer of its format.

Parts that a checkpoint leaves out are checkpoints themselves. They are loaded here, and readers receive them loaded.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from openblip.checkpoints import backbones, hub
from openblip.checkpoints import checkpoint as base
from openblip.checkpoints.checkpoint import CONFIG_FILE, BlipCheckpoint, Checkpoint, ImageEncoder, PathOrName
from openblip.checkpoints.huggingface.blip import load_huggingface_blip, save_huggingface_blip
from openblip.checkpoints.huggingface.blip2 import HF_BLIP2_TYPES, load_huggingface_blip2, save_huggingface_blip2
from openblip.checkpoints.native import load_native, save_native
from openblip.checkpoints.original.blip import load_original_blip, read_pth, save_original_blip
from openblip.checkpoints.original.blip2 import frozen_sources, load_original_blip2, save_original_blip2
from openblip.checkpoints.original.image_encoder import holds_encoder, is_blip2_file, read_encoder
from openblip.checkpoints.state_dict import read_json_object
from openblip.errors import CheckpointError, ConfigError
from openblip.models.config import TowerConfig
from openblip.models.vision_tower import VisionTower

Format = Literal["openblip", "huggingface", "original"]
PRETRAINED = Path(__file__).parents[1] / "pretrained"


def load_checkpoint(
    source: PathOrName,
    *,
    tokenizer: PathOrName | None = None,
    vision: PathOrName | None = None,
    language_model: PathOrName | None = None,
) -> Checkpoint:
    """Read a checkpoint, in float32 on the CPU, in eval mode.

    source: a folder of OpenBLIP or of transformers' BLIP or BLIP-2, the run folder of a finished training, an original
    .pth file, the name of a shipped model, or owner/model on the Hugging Face hub. tokenizer: folder or hub name of a
    vocabulary, which goes before the checkpoint's own. vision, language_model: the parts that an original BLIP-2 file
    leaves out: whatever `load_image_encoder` takes, and a folder or a name on the hub.

    Raises CheckpointError when there is no such checkpoint or it is not whole, ConfigError when a part is named that
    the checkpoint does not leave out.
    """
    path = Path(source)
    if not path.is_dir() and (PRETRAINED / str(source)).is_dir():
        path = PRETRAINED / str(source)
    if not path.exists() and hub.is_hub_name(str(source)):
        path = hub.hub_folder(str(source))
    path = _model_folder(path)
    file = read_pth(path) if path.is_file() else None
    if file is not None and is_blip2_file(file):
        sources = frozen_sources(file, vision, language_model)
        encoder = language = None
        if sources.vision is not None:
            encoder = load_image_encoder(sources.vision)
        if sources.language_model is not None:
            language = backbones.load_language_model(
                sources.language_model, end_of_text=sources.end_of_text, changes=sources.changes
            )
        return load_original_blip2(file, sources, encoder, language, tokenizer)
    for part in (vision, language_model):
        if part is not None:
            raise ConfigError(f"{source} is a whole model: leave {part} out. Only original BLIP-2 files lack parts.")
    if file is not None:
        return load_original_blip(file, tokenizer)
    if not (path / CONFIG_FILE).is_file():
        shipped = ", ".join(sorted(folder.name for folder in PRETRAINED.glob("*") if folder.is_dir()))
        raise CheckpointError(
            f"There is no checkpoint {source}: name a folder of OpenBLIP or of transformers' BLIP or BLIP-2, a run "
            "folder, an original .pth file, a model on the hub (owner/model), or a shipped one "
            f"({shipped or 'none is installed'})."
        )
    config = read_json_object(path / CONFIG_FILE)
    if config.get("model_type") == base.BLIP2_TYPE or config.get("format") == base.OPENBLIP_FORMAT:
        return load_native(path, tokenizer)
    if config.get("model_type") in HF_BLIP2_TYPES:
        return load_huggingface_blip2(path, tokenizer)
    return load_huggingface_blip(path, tokenizer)


def _model_folder(folder: Path) -> Path:
    """`model/` of a run folder of a training, and any other path as it is.

    Raises CheckpointError for a run that has not finished.
    """
    if not (folder / CONFIG_FILE).is_file() or "recipe" not in read_json_object(folder / CONFIG_FILE):
        return folder
    if (folder / "model" / CONFIG_FILE).is_file():
        return folder / "model"
    problem = f"{folder} is the run folder of a training that has not finished, so it has no model/ yet."
    if (folder / "best" / CONFIG_FILE).is_file():
        problem += f" Name {folder / 'best'}, the best model so far."
    if (folder / "checkpoints").is_dir():
        problem += f" Its checkpoints/ hold the state from which `openblip train --resume {folder}` goes on."
    raise CheckpointError(problem)


def save_checkpoint(checkpoint: Checkpoint, path: PathOrName, format: Format = "openblip") -> None:
    """Write a checkpoint that `load_checkpoint` reads.

    path: a folder; for "original" a file whose name ends with .pth.

    Raises CheckpointError when the format has no place for the model's heads, ConfigError when there is no such format.
    """
    writers: dict[str, tuple[Callable[[Path, Any], None], Callable[[Path, Any], None]]] = {
        "openblip": (save_native, save_native),
        "huggingface": (save_huggingface_blip, save_huggingface_blip2),
        "original": (save_original_blip, save_original_blip2),
    }
    if format not in writers:
        raise ConfigError(f'Format "{format}" cannot be written; choose one of {", ".join(get_args(Format))}.')
    save_as_blip, save_as_blip2 = writers[format]
    save = save_as_blip if isinstance(checkpoint, BlipCheckpoint) else save_as_blip2
    save(Path(path), checkpoint)


def load_image_encoder(
    source: PathOrName, *, layer: int | None = None, image_size: int | None = None, dtype: torch.dtype = torch.float32
) -> ImageEncoder:
    """An image encoder for BLIP-2 to freeze, on the CPU, in eval mode: read at one of its layers, without last norm.

    Images are squashed to a square, bicubic, whatever the encoder's own processor does (most crop), so that nothing at
    the sides is lost; size, mean and standard deviation are its own.

    Args:
        source: any checkpoint that `load_checkpoint` takes; a .pth file of LAVIS (eva_vit_g.pth, clip_vit_L.pth, or of
            a BLIP-2 that holds its encoder, whatever else it leaves out); or a folder or hub name of a vision model of
            transformers, or of a model of images and texts, whose image side is taken.
        layer: the layer whose output is taken, as an index into the hidden states: 0 is the embeddings, -1 the last
            layer. None is BLIP-2's choice, the second last; an encoder that was cut there already is taken whole.
        image_size: side in pixels, where it is not to be the checkpoint's own; position embeddings are interpolated.
        dtype: of the weights, in which the encoder computes.

    Raises CheckpointError when there is no such checkpoint, or it is not whole, does not have the layer, gives no
    tokens of an image, or does not take images of this size.
    """
    import transformers

    name = os.fspath(source)
    if Path(name).is_dir():
        name = str(_model_folder(Path(name)))
    # Shipped models and .pth files have no settings that transformers could read.
    has_none = Path(name).is_file() or (not Path(name).is_dir() and (PRETRAINED / name).is_dir())
    settings = {} if has_none else hub.load_from_hub(transformers.PreTrainedConfig.get_config_dict, name)[0]
    model_type = settings.get("model_type")
    if has_none or settings.get("format") == base.OPENBLIP_FORMAT or model_type == "blip":
        encoder = _cut_encoder(name, layer)
    else:
        encoder = backbones.read_transformers_encoder(
            name, str(model_type), layer=layer, image_size=image_size, dtype=dtype
        )
    if image_size is not None:
        encoder = backbones.resize_encoder(encoder, image_size)
    encoder.model.to(dtype).eval()
    return encoder


def _cut_encoder(name: str, layer: int | None) -> ImageEncoder:
    """The image encoder of a BLIP, of a BLIP-2 or of a .pth file of its own, up to a layer.

    None is the layer that BLIP-2 uses: the second last of a whole encoder.
    """
    file = read_pth(Path(name)) if Path(name).is_file() else None
    if file is not None and holds_encoder(file):
        model, config, preprocessing = read_encoder(file)
    else:
        checkpoint = load_checkpoint(name)
        model, config = checkpoint.model.vision, checkpoint.model.config.vision
        preprocessing = checkpoint.preprocessing
    if isinstance(config, TowerConfig):
        assert isinstance(model, VisionTower)  # the model was built by this config
        layer = config.layer if layer is None else layer
        return ImageEncoder(VisionTower(model.model, layer), replace(config, layer=layer), preprocessing)
    if layer is None:
        layer = -2 if config.output_norm else -1
    cut = backbones.cut_vit(config, layer)
    return ImageEncoder(backbones.build_vit(cut, model.state_dict(), name), cut, preprocessing)
