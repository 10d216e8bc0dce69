"""Image encoders for BLIP-2 to freeze, from any checkpoint: read at one of their layers, without final norm.

The ViT of a BLIP, CLIP's and the EVA-CLIP of a Hugging Face BLIP-2 become our own ViT, cut after that layer;
every other vision model of transformers stays as it is, behind `VisionTower`.

D width, N tokens of a picture, S its side in pixels.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from openblip.checkpoints.encoder_files import ImageEncoder as ImageEncoder
from openblip.checkpoints.encoder_files import holds_encoder, read_encoder
from openblip.checkpoints.from_transformers import (
    LOADING_ERRORS,
    check_is_a_name,
    not_loaded,
    quietly,
    read_config,
    read_model,
)
from openblip.checkpoints.huggingface_keys import VISION as BLIP_VISION
from openblip.checkpoints.huggingface_keys import VISION_SETTINGS
from openblip.checkpoints.key_table import Table, translate
from openblip.checkpoints.loading import PRETRAINED, load_any
from openblip.checkpoints.native import FORMAT, check_weights
from openblip.checkpoints.pickled import read_original
from openblip.checkpoints.vision_towers import load_vision_tower
from openblip.data.transforms import Preprocessing
from openblip.errors import CheckpointError
from openblip.models.config import TowerConfig, VisionConfig
from openblip.models.vision_tower import VisionTower, check_layer, run_without_graph
from openblip.nn.vit import VisionTransformer, interpolate_positions

EVA: Table = {name: row for name, row in BLIP_VISION.items() if name != "norm"}  # Blip2VisionModel
CLIP: Table = {  # CLIPVisionModel
    **EVA,
    "position_embedding": "embeddings.position_embedding.weight",
    "input_norm": "pre_layrnorm",
    "blocks.{i}.attention.qkv": (
        "encoder.layers.{i}.self_attn.q_proj",
        "encoder.layers.{i}.self_attn.k_proj",
        "encoder.layers.{i}.self_attn.v_proj",
    ),
    "blocks.{i}.attention.out": "encoder.layers.{i}.self_attn.out_proj",
}
_FINAL_NORM = "post_layernorm."


def load_image_encoder(
    source: str | os.PathLike[str],
    *,
    layer: int | None = None,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> ImageEncoder:
    """An image encoder on the CPU, in eval mode.

    Pictures are squashed to a square, bicubic, whatever the encoder's own processor does (most crop), so that
    nothing at the sides is lost; size, mean and standard deviation are its own.

    Args:
        source: any checkpoint that `openblip.load` takes; a .pth file of LAVIS (eva_vit_g.pth,
            clip_vit_L.pth, or of a BLIP-2 that holds its encoder, whatever else it leaves out); or a folder
            or hub name of a vision model of transformers, or of a model of images and texts, whose image side
            is taken.
        layer: whose output is taken: an index into the hidden states, 0 the embeddings, -1 the last layer.
            None is the second last, BLIP-2's choice; of a BLIP-2 checkpoint or a file of LAVIS, whose encoder
            is cut already, the one it uses.
        image_size: S, where it is not to be the checkpoint's own; position embeddings are interpolated.
        dtype: of the weights, in which the encoder computes.

    Raises:
        CheckpointError: there is no such checkpoint, it is not whole, does not have the layer, gives no
            tokens of a picture, or does not take pictures of this size.
    """
    name = os.fspath(source)
    settings = None if _is_local_checkpoint(name) else _settings(name)
    model_type = None if settings is None else settings.get("model_type")
    if settings is None or settings.get("format") == FORMAT or model_type == "blip":
        parts = _of_checkpoint(name, layer)
    elif model_type in ("blip-2", "instructblip"):
        parts = _eva(name, -1 if layer is None else layer)
    elif model_type in ("clip", "clip_vision_model") and _is_ours(read_config(name)):
        parts = _clip(name, -2 if layer is None else layer)
    else:
        parts = _tower(name, -2 if layer is None else layer, image_size, dtype)
    encoder = parts if image_size is None else at_image_size(parts, image_size)
    encoder.model.to(dtype).eval()
    return encoder


def _is_local_checkpoint(name: str) -> bool:
    """Whether it is a shipped model or an original file, which have no settings of transformers."""
    return Path(name).is_file() or (not Path(name).is_dir() and (PRETRAINED / name).is_dir())


def _settings(name: str) -> dict[str, Any]:
    """What config.json says, of a folder or on the hub."""
    check_is_a_name(name)
    with quietly():
        try:
            settings: dict[str, Any] = transformers.PreTrainedConfig.get_config_dict(name)[0]
        except LOADING_ERRORS as error:
            raise not_loaded(name, error) from error
    return settings


def _is_ours(config: Any) -> bool:
    """Whether our ViT computes with this CLIP's activation."""
    return getattr(config, "vision_config", config).hidden_act in ("gelu", "quick_gelu")


def _of_checkpoint(name: str, layer: int | None) -> ImageEncoder:
    """The image encoder of a checkpoint of BLIP or BLIP-2, or of a .pth file of its own."""
    model, config, preprocessing = _whole(name)
    if isinstance(config, TowerConfig):
        assert isinstance(model, VisionTower)  # the model was built by this config
        layer = config.layer if layer is None else layer
        return ImageEncoder(VisionTower(model.model, layer), replace(config, layer=layer), preprocessing)
    if layer is None:
        layer = -2 if config.output_norm else -1
    cut = _cut(config, layer)
    return ImageEncoder(_vit(cut, model.state_dict(), name), cut, preprocessing)


def _whole(name: str) -> ImageEncoder:
    if Path(name).is_file():
        file = read_original(Path(name))
        if holds_encoder(file):
            return read_encoder(file)
    checkpoint = load_any(name)
    return ImageEncoder(checkpoint.model.vision, checkpoint.model.config.vision, checkpoint.preprocessing)


def _eva(name: str, layer: int) -> ImageEncoder:
    """EVA-CLIP out of a BLIP-2 of transformers, whose other parts are not loaded."""
    config = read_config(name).vision_config
    model: Any = transformers.Blip2VisionModel
    if config.model_type == "instructblip_vision_model":
        model = transformers.InstructBlipVisionModel
    ours = VisionConfig(**_shape(config), activation=config.hidden_act, output_norm=False)
    inner = {"key_mapping": {r"^vision_model\.": ""}}
    return _converted(name, model, config, _cut(ours, layer), EVA, **inner)


def _clip(name: str, layer: int) -> ImageEncoder:
    """CLIP's ViT, out of the whole CLIP or alone."""
    config = read_config(name)
    config = getattr(config, "vision_config", config)
    ours = VisionConfig(**_shape(config), activation=config.hidden_act, input_norm=True, output_norm=False)
    return _converted(name, transformers.CLIPVisionModel, config, _cut(ours, layer), CLIP)


def _shape(config: Any) -> dict[str, Any]:
    return {ours: getattr(config, theirs) for ours, theirs in VISION_SETTINGS.items()}


def _converted(
    name: str, kind: Any, config: Any, ours: VisionConfig, table: Table, **settings: Any
) -> ImageEncoder:
    """A vision model of transformers as our ViT."""
    loaded = read_model(kind, name, config=config, dtype=torch.float32, **settings)
    weights = {
        weight.removeprefix("vision_model."): tensor  # which older releases of transformers put before CLIP's
        for weight, tensor in loaded.model.state_dict().items()
        if weight not in loaded.missing
    }
    dropped = tuple(f"encoder.layers.{i}." for i in range(ours.num_layers, config.num_hidden_layers))
    expected = _empty(ours).state_dict()
    found = translate(table, weights, set(expected), (_FINAL_NORM, *dropped), name)
    shaped = {  # theirs may be without the axis of pictures
        weight: tensor.view_as(expected[weight]) if tensor.numel() == expected[weight].numel() else tensor
        for weight, tensor in found.items()
    }
    preprocessing = read_preprocessing(name, Preprocessing(image_size=ours.image_size))
    parts = ImageEncoder(_vit(ours, shaped, name), ours, preprocessing)
    return at_image_size(parts, preprocessing.image_size)


def _tower(name: str, layer: int, image_size: int | None, dtype: torch.dtype) -> ImageEncoder:
    """A vision model as it is, found to work by encoding one picture: it is not known beforehand."""
    tower = load_vision_tower(name, layer=layer, dtype=dtype)
    preprocessing = read_preprocessing(name)
    size = preprocessing.image_size if image_size is None else image_size
    try:
        features = run_without_graph(tower, torch.zeros(1, 3, size, size, dtype=dtype))
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{name} cannot encode pictures of {size}x{size}: {reason} Choose its own image size."
        ) from error
    if features.dim() != 3 or features.shape[2] != tower.hidden_dim:
        raise CheckpointError(
            f"{name} turns a picture into features of shape {tuple(features.shape[1:])}; the Q-Former reads "
            "a sequence of tokens as wide as the model, as vision transformers give it."
        )
    config = TowerConfig(name=name, hidden_dim=tower.hidden_dim, layer=layer)
    return ImageEncoder(tower, config, preprocessing)


def _cut(config: VisionConfig, layer: int) -> VisionConfig:
    """Our ViT up to a layer. Stochastic depth was of its training; frozen it has none."""
    check_layer(layer, config.num_layers)
    num_layers = layer if layer >= 0 else config.num_layers + 1 + layer
    return replace(config, num_layers=num_layers, output_norm=False, drop_path=0.0)


def _empty(config: VisionConfig) -> VisionTransformer:
    with torch.device("meta"):
        return VisionTransformer(**asdict(config))


def _vit(config: VisionConfig, weights: Mapping[str, Tensor], origin: str) -> VisionTransformer:
    """Our ViT with the weights that it needs of `weights`."""
    model = _empty(config)
    expected = model.state_dict()
    needed = {name: tensor for name, tensor in weights.items() if name in expected}
    check_weights(expected, needed, origin)
    model.load_state_dict(needed, assign=True)
    return model


def at_image_size(parts: ImageEncoder, image_size: int) -> ImageEncoder:
    """The same encoder for pictures of `image_size`; position embeddings of our ViT interpolated for good."""
    preprocessing = replace(parts.preprocessing, image_size=image_size)
    config = parts.config
    if isinstance(config, TowerConfig) or config.image_size == image_size:
        return parts._replace(preprocessing=preprocessing)
    config = replace(config, image_size=image_size)
    weights = parts.model.state_dict()
    weights["position_embedding"] = interpolate_positions(weights["position_embedding"], config.grid)
    return ImageEncoder(_vit(config, weights, "The image encoder"), config, preprocessing)


def read_preprocessing(name: str, default: Preprocessing | None = None) -> Preprocessing:
    """Size, mean and standard deviation of a model's image processor, `default` where it has none.

    Its cropping is not taken over, nor its way of resizing. CheckpointError for a processor that says no
    square size or scales pixels otherwise than to 0...1, or when there is none and no default.
    """
    with quietly():
        try:
            mixin: Any = transformers.image_processing_base.ImageProcessingMixin
            settings: dict[str, Any] = mixin.get_image_processor_dict(name)[0]
        except LOADING_ERRORS as error:
            if default is not None:
                return default
            raise CheckpointError(
                f"{name} has no preprocessor_config.json, which says how it wants its pixels."
            ) from error
    try:
        return _preprocessing(settings)
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{name} prepares pictures in a way that is not known here: {settings}."
        ) from error


def _preprocessing(settings: dict[str, Any]) -> Preprocessing:
    if not settings.get("do_rescale", True) or abs(settings["rescale_factor"] - 1 / 255) > 1e-9:
        raise ValueError("pixels are not scaled to 0...1")
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if settings.get("do_normalize", True):
        red, green, blue = (float(value) for value in settings["image_mean"])
        mean = (red, green, blue)
        red, green, blue = (float(value) for value in settings["image_std"])
        std = (red, green, blue)
    return Preprocessing(image_size=_side(settings), mean=mean, std=std)


def _side(settings: dict[str, Any]) -> int:
    """S of the square that reaches the model, after a crop where there is one."""
    if "max_num_patches" in settings:  # SigLIP 2 of flexible shapes: the square within its budget
        return math.isqrt(int(settings["max_num_patches"])) * int(settings["patch_size"])
    cropped = settings.get("do_center_crop", False) and "crop_size" in settings
    size = settings["crop_size" if cropped else "size"]
    if isinstance(size, int):
        return size
    if "shortest_edge" in size:
        return int(size["shortest_edge"])
    if size["height"] != size["width"]:
        raise ValueError("no square")
    return int(size["height"])
