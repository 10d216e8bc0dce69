"""The original .pth files, of the released code and of LAVIS: one file with {"model": state dict, ...}.

A file that OpenBLIP wrote has what the format has no place for (settings, prompt, tokenizer) beside "model", under
"openblip". In files of others, the shapes of the tensors tell the settings.

The image encoder has timm's names, the text transformer those that transformers took over.

P patch size, N image tokens, D width, V vocabulary.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openblip.checkpoints import checkpoint as base
from openblip.checkpoints import state_dict
from openblip.checkpoints.checkpoint import BlipCheckpoint, PathOrName
from openblip.checkpoints.huggingface import blip as hf_blip
from openblip.checkpoints.state_dict import LOG_TEMPERATURE, Layout, State, Table, add_prefix
from openblip.data.config import Preprocessing
from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError, ConfigError
from openblip.files import atomic_file
from openblip.models.blip import INITIAL_TEMPERATURE
from openblip.models.config import BlipConfig, TextConfig, VisionConfig

_CAPTION_PROMPT = "a picture of "  # of every released captioner
HEAD_WIDTH = 64  # of every released model: ViT-B has 12 heads, ViT-L 16, BERT 12
VISION_EPS, TEXT_EPS = 1e-6, 1e-12  # vit.py, med_config.json
_TEMPERATURE = "temp"
_ENTRY = "openblip"
_SUFFIX = ".pth"

# ---- names

# State of a training that no model has: momentum copies and queues of features. It is left out, and no error.
TRAINING_ONLY = (
    "visual_encoder_m.",
    "text_encoder_m.",
    "vision_proj_m.",
    "text_proj_m.",
    "image_queue",
    "text_queue",
    "idx_queue",  # image ids of the queues' entries, retrieval
    "queue_ptr",  # pre-training; in LAVIS retrieval too
    "ptr_queue",  # retrieval
)
TIMM_VISION_KEYS: Table = {  # timm's VisionTransformer
    "class_token": "cls_token",
    "position_embedding": "pos_embed",
    "patch_embedding": "patch_embed.proj",
    "blocks.{i}.attention_norm": "blocks.{i}.norm1",
    "blocks.{i}.attention.qkv": "blocks.{i}.attn.qkv",
    "blocks.{i}.attention.out": "blocks.{i}.attn.proj",
    "blocks.{i}.mlp_norm": "blocks.{i}.norm2",
    "blocks.{i}.mlp.0": "blocks.{i}.mlp.fc1",
    "blocks.{i}.mlp.2": "blocks.{i}.mlp.fc2",
    "norm": "norm",
}
_CROSS = "{text}.encoder.layer.{i}.crossattention"
_NLVR_KEYS: Table = {  # nlvr_encoder: cross-attention over two images
    "text.layers.{i}.cross_attention.branch.first.query": f"{_CROSS}.self0.query",
    "text.layers.{i}.cross_attention.branch.first.key_value": f"{_CROSS}.self0.key+value",
    "text.layers.{i}.cross_attention.branch.first.out": f"{_CROSS}.output.dense0",
    "text.layers.{i}.cross_attention.branch.second.query": f"{_CROSS}.self1.query",
    "text.layers.{i}.cross_attention.branch.second.key_value": f"{_CROSS}.self1.key+value",
    "text.layers.{i}.cross_attention.branch.second.out": f"{_CROSS}.output.dense1",
    "text.layers.{i}.cross_attention.branch.merge": f"{_CROSS}.output.merge_layer",  # from the middle layer on
    "nlvr_head.{i}": "cls_head.{i}",
}
_BODY = {
    **add_prefix(TIMM_VISION_KEYS, "vision.", "visual_encoder."),
    **add_prefix(hf_blip.BERT_TEXT_KEYS, "text.", "{text}."),
}
_ENCODER, _BOTH = hf_blip.TEXT_ENCODER, hf_blip.TEXT_ENCODER | hf_blip.TEXT_DECODER
_MATCHING = {LOG_TEMPERATURE: _TEMPERATURE, **hf_blip.MATCHING_KEYS}  # the file has no logarithm

_LAYOUTS: Mapping[str, Layout] = {
    "pre-trained": hf_blip.blip_layout(("itc", "itm", "lm"), _BODY, _BOTH, _MATCHING),  # BLIP_Pretrain
    "captions": hf_blip.blip_layout(("lm",), _BODY, hf_blip.TEXT_DECODER),  # BLIP_Decoder
    "retrieval": hf_blip.blip_layout(("itc", "itm"), _BODY, _ENCODER, _MATCHING),  # BLIP_Retrieval, BLIP_ITM
    "VQA": hf_blip.blip_layout(("vqa",), _BODY, _BOTH),  # BLIP_VQA
    "NLVR2": hf_blip.blip_layout(("nlvr",), _BODY, _ENCODER, _NLVR_KEYS),  # BLIP_NLVR
}

# ---- files


class PthFile(NamedTuple):
    """The part of a .pth file that belongs to a model; the state of a training is left out."""

    path: Path
    weights: dict[str, Tensor]
    entry: Any
    """What OpenBLIP wrote beside "model"; None in a file of others."""


def read_pth(path: Path) -> PthFile:
    """A .pth file of {"model": state dict, ...}, or of the state dict alone."""
    content = state_dict.read_pickle(path)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        return PthFile(path, state_dict.as_state_dict(content["model"], path), content.get(_ENTRY))
    return PthFile(path, state_dict.as_state_dict(content, path), None)


def write_pth(path: Path, weights: State, entry: Mapping[str, Any]) -> None:
    """Write such a file, whole or not at all. Raises ConfigError unless its name ends with .pth."""
    if path.suffix != _SUFFIX:
        raise ConfigError(f"{path}: an original checkpoint is one file; let its name end with {_SUFFIX}.")
    # A file object, since torch.save would write the temporary file's name into the file.
    with atomic_file(path) as partial, partial.open("wb") as opened:
        torch.save({"model": dict(weights), _ENTRY: dict(entry)}, opened)


def pth_tokenizer(file: PthFile, named: PathOrName | None) -> Tokenizer:
    """The tokenizer that `named` names, else that in the file's entry, else one beside it, else BERT's from the hub."""
    if named is None and file.entry is not None and "tokenizer" in file.entry:
        try:
            return Tokenizer.from_json(str(file.entry["tokenizer"]))
        except CheckpointError as error:
            raise CheckpointError(f"{file.path}, its openblip entry: {error}") from error
    return base.find_tokenizer(file.path, file.path.parent, named)


def check_entry(file: PthFile) -> str:
    """How errors name the "openblip" entry of a file; CheckpointError when it is damaged."""
    if not isinstance(file.entry, dict):
        raise CheckpointError(f"{file.path}: its openblip entry is damaged, a {type(file.entry).__name__}.")
    return f"{file.path}, its openblip entry"


def with_log_temperature(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Our weights with the logarithm of the temperature, if they have one; CheckpointError for an impossible one."""
    temperature = weights.get(LOG_TEMPERATURE)
    if temperature is None:
        return weights
    if temperature.numel() != 1 or not 0 < temperature.item() < math.inf:
        raise CheckpointError(f"{path}: temp is {temperature.tolist()}; ITC divides by one number above 0.")
    return {**weights, LOG_TEMPERATURE: temperature.log()}


def with_temperature(weights: State) -> dict[str, Tensor]:
    """Our weights on the CPU with the temperature that a file has; the inverse of `with_log_temperature`."""
    weights = {name: tensor.detach().cpu() for name, tensor in weights.items()}
    return {name: tensor.exp() if name == LOG_TEMPERATURE else tensor for name, tensor in weights.items()}


# ---- reading and writing


def load_original_blip(file: PthFile, tokenizer: PathOrName | None = None) -> BlipCheckpoint:
    """The model of a .pth file, without the state of its training: see `TRAINING_ONLY`."""
    path = file.path
    state = state_dict.as_float32(state_dict.without(TRAINING_ONLY, file.weights))
    if file.entry is None:
        config, others = infer_blip_settings(state, path)
    else:
        config, others = base.read_settings(BlipConfig, file.entry, check_entry(file))
    layout = _layout_for(config)
    state_dict.check_tied(state, path)
    model = base.empty_blip(config)
    names = model.state_dict().keys()
    if LOG_TEMPERATURE in names and _TEMPERATURE not in state:  # the model was saved without its losses
        state[_TEMPERATURE] = torch.tensor(INITIAL_TEMPERATURE)
    weights = state_dict.translate(layout.table, state, names, layout.derived, path, layout.text_prefixes)
    state_dict.load_weights(model, with_log_temperature(weights, path), path)
    checkpoint = BlipCheckpoint(model.eval(), pth_tokenizer(file, tokenizer), **others)
    base.check_parts_fit(path, checkpoint)
    return checkpoint


def save_original_blip(path: Path, checkpoint: BlipCheckpoint) -> None:
    """Write one .pth file that the released code and `load_original_blip` read, without momentum copies and queues.

    Raises ConfigError unless its name ends with .pth.
    """
    config = checkpoint.model.config
    layout = _layout_for(config)
    weights = with_temperature(checkpoint.model.state_dict())
    state = state_dict.translate_back(layout.table, weights, layout.text_prefixes)
    state |= state_dict.tied_copies(state)
    for prefix in layout.text_prefixes.values():  # a buffer that the released code asks for
        state[f"{prefix}.embeddings.position_ids"] = torch.arange(config.text.max_positions)[None]
    write_pth(path, state, {**base.settings_to_dict(checkpoint), "tokenizer": checkpoint.tokenizer.to_json()})


def _layout_for(config: BlipConfig) -> Layout:
    name = state_dict.find_layout(_LAYOUTS, config)
    if name is None:
        kinds = ", ".join(f"{name} ({', '.join(layout.heads)})" for name, layout in _LAYOUTS.items())
        pooled = " and a pooler" if config.pooled else ""
        raise CheckpointError(
            f"The released code has no model with the heads {', '.join(config.heads)}{pooled}; it has {kinds}. Save "
            "as openblip."
        )
    return _LAYOUTS[name]


# ---- settings from the shapes of tensors


def infer_blip_settings(state: State, source: object) -> tuple[BlipConfig, dict[str, Any]]:
    """What `read_settings` returns, of a released file: what shapes show, and what is the same in all released models.

    Raises CheckpointError when the tensors are not those of a BLIP, when one that would show something is missing or of
    a strange shape, or when the number of heads cannot be told from the width.
    """
    layout = _layout_of(state, source)
    text = next(iter(layout.text_prefixes.values()))
    vision = infer_vit(state, TIMM_VISION_KEYS, "visual_encoder.", source, {"layer_norm_eps": VISION_EPS})
    vocab_size, width = shape_of(state, f"{text}.embeddings.word_embeddings.weight", 2, source)
    max_positions, _ = shape_of(state, f"{text}.embeddings.position_embeddings.weight", 2, source)
    mlp_dim, _ = shape_of(state, f"{text}.encoder.layer.0.intermediate.dense.weight", 2, source)
    embed_dim = BlipConfig.embed_dim
    if "itc" in layout.heads:
        embed_dim, _ = shape_of(state, "vision_proj.weight", 2, source)
    with base.as_checkpoint_errors(source):
        text_config = TextConfig(
            vocab_size=vocab_size,
            hidden_dim=width,
            num_layers=len(layer_numbers(state, f"{text}.encoder.layer")),
            num_heads=num_heads_of(width, "texts", source),
            mlp_dim=mlp_dim,
            max_positions=max_positions,
            layer_norm_eps=TEXT_EPS,
            sharing=state_dict.infer_sharing(state, layout.text_prefixes),
        )
        config = BlipConfig(vision=vision, text=text_config, embed_dim=embed_dim, heads=layout.heads)
    prompt = _CAPTION_PROMPT if layout.heads == ("lm",) else ""
    return config, {"preprocessing": Preprocessing(image_size=vision.image_size), "prompt": prompt}


def _layout_of(state: State, source: object) -> Layout:
    """The kind of model whose tensors these are; CheckpointError when there is none."""
    has_encoder = any(name.startswith("text_encoder.") for name in state)
    has_decoder = any(name.startswith("text_decoder.") for name in state)
    matches = any(name.startswith(("itm_head.", "vision_proj.")) for name in state)
    if has_encoder and any(".crossattention.self0." in name for name in state):
        return _LAYOUTS["NLVR2"]
    if has_encoder and has_decoder:
        return _LAYOUTS["pre-trained" if matches else "VQA"]
    if has_decoder:
        return _LAYOUTS["captions"]
    if has_encoder and matches:
        return _LAYOUTS["retrieval"]
    raise CheckpointError(
        f"{source} is no BLIP for {', '.join(_LAYOUTS)}: its weights begin with "
        f"{', '.join(sorted({name.partition('.')[0] for name in state})[:10])}."
    )


def infer_vit(
    state: State, table: Table, prefix: str, source: object, settings: Mapping[str, Any], head_width: int = HEAD_WIDTH
) -> VisionConfig:
    """The config of a ViT whose names are those of a key table below `prefix`; `settings` are what no shape tells."""
    blocks, _, mlp = table["blocks.{i}.mlp.0"].partition(".{i}.")
    width, _, patch_size, _ = shape_of(state, f"{prefix}{table['patch_embedding']}.weight", 4, source)
    _, num_tokens, _ = shape_of(state, f"{prefix}{table['position_embedding']}", 3, source)
    mlp_dim, _ = shape_of(state, f"{prefix}{blocks}.0.{mlp}.weight", 2, source)
    grid = math.isqrt(max(num_tokens - 1, 0))
    if grid < 1 or grid**2 != num_tokens - 1:
        raise CheckpointError(
            f"{source} has {num_tokens} image tokens, where a class token and a square of patches are expected."
        )
    with base.as_checkpoint_errors(source):
        return VisionConfig(
            image_size=grid * patch_size,
            patch_size=patch_size,
            hidden_dim=width,
            num_layers=len(layer_numbers(state, f"{prefix}{blocks}")),
            num_heads=num_heads_of(width, "images", source, head_width),
            mlp_dim=mlp_dim,
            **settings,
        )


def shape_of(state: State, name: str, num_axes: int, source: object) -> tuple[int, ...]:
    """A tensor's shape; CheckpointError when it is missing or has another number of axes."""
    if name not in state:
        state_dict.raise_on_mismatch(source, {name}, ())
    shape = tuple(state[name].shape)
    if len(shape) != num_axes or min(shape) < 1:
        raise CheckpointError(f"{source}: {name} is {shape}; it has {num_axes} axes in every BLIP.")
    return shape


def layer_numbers(state: State, prefix: str, suffix: str = "") -> list[int]:
    """The numbers that stand between `prefix` and `suffix` in names of tensors, sorted."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.{re.escape(suffix)}")
    return sorted({int(match[1]) for name in state if (match := pattern.match(name))})


def num_heads_of(width: int, what: str, source: object, head_width: int = HEAD_WIDTH) -> int:
    """Number of heads of a released model; CheckpointError when they do not divide the width."""
    if width % head_width:
        raise CheckpointError(
            f"{source} is {width} wide for {what}, which heads of {head_width} do not divide. Released models have "
            "such heads; how many this one has cannot be told from its weights."
        )
    return width // head_width
