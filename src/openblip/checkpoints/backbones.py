"""Models of transformers that BLIP and BLIP-2 begin with or freeze, by folder or hub name.

- Weights to start a training from: a ViT for BLIP's image encoder (section 4.1), BERT for its text transformer and for
  the Q-Former of BLIP-2 (BLIP-2 section 3.1).
- Image encoders to freeze. CLIP and the EVA-CLIP of a Hugging Face BLIP-2 become our own ViT, cut after the layer that
  is read; every other vision model stays as it is, behind `VisionTower`.
- Language models to freeze, quantised by transformers, with LoRA through peft.

transformers fetches them and knows every layout of files. The key tables say which of its tensors each of our
parameters is; what a table and the named exceptions do not account for is an error.

R rows of the word embeddings, D width, N image tokens, S side of an image in pixels.
"""

import copy
import logging
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from openblip.checkpoints import hub, state_dict
from openblip.checkpoints.checkpoint import ImageEncoder, PathOrName
from openblip.checkpoints.huggingface import blip as hf_blip
from openblip.checkpoints.state_dict import State, Table
from openblip.data.config import Preprocessing
from openblip.errors import CheckpointError, ConfigError, MissingExtraError
from openblip.models.config import TowerConfig, VisionConfig
from openblip.models.language_model import LanguageModel, has_lora, wrap_language_model
from openblip.models.vision_tower import VisionTower, check_layer, run_without_graph
from openblip.nn.attention import SelfAttention
from openblip.nn.qformer import QFormer, QFormerLayer
from openblip.nn.text_transformer import TextTransformer
from openblip.nn.vit import VisionTransformer, VitBlock, interpolate_positions

Quantization = Literal["8bit", "4bit"]

# ---- names

_VIT_KEYS: Table = {  # ViTModel, DeiTModel
    "class_token": "embeddings.cls_token",
    "position_embedding": "embeddings.position_embeddings",
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "blocks.{i}.attention_norm": "layers.{i}.layernorm_before",
    "blocks.{i}.attention.qkv": "layers.{i}.attention.q_proj+k_proj+v_proj",
    "blocks.{i}.attention.out": "layers.{i}.attention.o_proj",
    "blocks.{i}.mlp_norm": "layers.{i}.layernorm_after",
    "blocks.{i}.mlp.0": "layers.{i}.mlp.fc1",
    "blocks.{i}.mlp.2": "layers.{i}.mlp.fc2",
    "norm": "layernorm",
}
# Older releases of transformers name a ViT's parameters in memory as its files do; newer ones as in the
# table.
_OLD_VIT_NAMES = {
    "encoder.layer.": "layers.",
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}
_CLIP_KEYS: Table = {  # CLIPVisionModel
    **hf_blip.HF_EVA_KEYS,
    "position_embedding": "embeddings.position_embedding.weight",
    "input_norm": "pre_layrnorm",
    "blocks.{i}.attention.qkv": "encoder.layers.{i}.self_attn.q_proj+k_proj+v_proj",
    "blocks.{i}.attention.out": "encoder.layers.{i}.self_attn.out_proj",
}
# BertForMaskedLM. Our names have no mode, since both modes start from the same BERT, which has no cross-attention.
_BERT_KEYS: Table = {
    **{name: f"bert.{bert}" for name, bert in hf_blip.BERT_TEXT_KEYS.items() if "cross_attention" not in name},
    **hf_blip.BERT_LM_HEAD_KEYS,
}
# A Q-Former has a feed-forward for queries and one for text, which both start as BERT's.
_BERT_QFORMER_KEYS: Table = {
    name.replace(".feed_forward", f".{kind}_feed_forward"): bert
    for name, bert in _BERT_KEYS.items()
    for kind in ("query", "text")
}

# What a checkpoint may have that BLIP has no use for.
_UNUSED_VISION = (
    "pooler.",  # a layer over the class token that only classification trains; BLIP projects the token itself
    "classifier.",  # ImageNet's classes
    "cls_classifier.",
    "distillation_classifier.",
    "embeddings.distillation_token",  # DeiT's second class token; the paper's DeiT-B was trained without it
    "embeddings.mask_token",  # of masked-image training
)
_UNUSED_TEXT = (
    "bert.pooler.",  # for next-sentence prediction
    "cls.seq_relationship.",  # next-sentence prediction
    "bert.embeddings.position_ids",  # 0, 1, 2, ..., in older files
    # BLIP has one kind of text and no token types. BERT adds row 0 to every token; the released code drops it
    # without folding it into the other embeddings, and so is it here.
    "bert.embeddings.token_type_embeddings.",
    "cls.predictions.decoder.",  # tied to the word embeddings and to cls.predictions.bias
)
# Parameters that BERT does not have: the released code starts cross-attention from random weights too.
_FRESH_TEXT = (".cross_attention.", "embeddings.queries")
_NUM_NEW_WORDS = 2  # [DEC] and [ENC], whose rows keep their random start
# Weights that say nothing about hidden states: files of classifiers and of training lack them.
_NEVER_READ = ("pooler.", "embeddings.mask_token")
_FINAL_NORM = "post_layernorm."

# ---- weights to start a training from


def init_vision(vision: VisionTransformer, source: str) -> None:
    """Start a ViT from a Hugging Face ViTModel, DeiTModel or BlipVisionModel, in place.

    Position embeddings are interpolated to the resolution of `vision`. The layer norms keep their own epsilon: 1e-6 as
    in the released code, where Hugging Face's ViTs say 1e-12.

    source: folder or hub name, e.g. "facebook/deit-base-patch16-224". Raises CheckpointError when there is no such
    checkpoint, it cannot be fetched, it is of another kind or shape, or keys are missing or left over; they are listed.
    """
    block = cast(VitBlock, vision.blocks[0])
    classes = {"vit": "ViTModel", "deit": "DeiTModel", "blip_vision_model": "BlipVisionModel"}
    model_type, state = _read_backbone(source, "image", classes, block.attention.num_heads, _UNUSED_VISION)
    table = hf_blip.HF_VISION_KEYS
    if model_type != "blip_vision_model":
        table = _VIT_KEYS
        for old, new in _OLD_VIT_NAMES.items():
            state = {name.replace(old, new): tensor for name, tensor in state.items()}
    parameters = dict(vision.named_parameters())
    weights = state_dict.translate(table, state, parameters, _UNUSED_VISION, source)
    positions = weights["position_embedding"]  # (1, N, D)
    if model_type == "deit":
        positions = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)  # without the distillation token's
    grid = math.isqrt(vision.position_embedding.shape[1] - 1)
    weights["position_embedding"] = interpolate_positions(positions, grid)
    _copy_into(parameters, weights, source)


def init_text(text: TextTransformer, source: str) -> None:
    """Start a text transformer from a Hugging Face BERT, in place, whatever its modes share.

    Both modes start from BERT's self-attention, feed-forward and embeddings, the decoder's head from BERT's where the
    checkpoint has one. Cross-attention, and the rows of the words that BERT does not know ([DEC] and [ENC], the last
    ones), keep their random start.

    source: folder or hub name, e.g. "bert-base-uncased". Raises CheckpointError as `init_vision`, and when `text` has
    another vocabulary.
    """
    modes = cast(Any, text.layers[0]).self_attention.variants.values()
    unused = () if text.lm_head is not None else ("cls.predictions.",)
    _init_from_bert(text, _BERT_KEYS, source, next(iter(modes)).branch.num_heads, unused)


def init_qformer(qformer: QFormer, source: str) -> None:
    """Start a Q-Former from a Hugging Face BERT, in place.

    Self-attention and the feed-forwards of queries and of text start as BERT's, and so do embeddings and ITG's head
    where the Q-Former has them. Queries, cross-attention and the rows of new words ([DEC]) keep their random start, as
    in the released code. Source and errors are those of `init_text`.
    """
    first = cast(QFormerLayer, qformer.layers[0])
    num_heads = cast(SelfAttention, first.self_attention.branch).num_heads
    unused = [] if qformer.lm_head is not None else ["cls.predictions."]
    if qformer.embeddings.word is None:
        unused += ["bert.embeddings.word_embeddings.", "bert.embeddings.position_embeddings."]
    _init_from_bert(qformer, _BERT_QFORMER_KEYS, source, num_heads, tuple(unused))


def _init_from_bert(model: nn.Module, table: Table, source: str, num_heads: int, unused: tuple[str, ...]) -> None:
    """Copy a BERT's weights into a model. unused: prefixes of those for which the model has no place."""
    _, state = _read_backbone(source, "text", {"bert": "BertForMaskedLM"}, num_heads, _UNUSED_TEXT)
    has_head = any(n.startswith("cls.predictions.") for n in state_dict.without(_UNUSED_TEXT, state))
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not any(part in name for part in _FRESH_TEXT) and (has_head or not name.startswith("lm_head."))
    }
    weights = state_dict.translate(table, state, parameters, (*_UNUSED_TEXT, *unused), source)
    for name, tensor in weights.items():
        rows = len(parameters[name])
        if name.endswith((".word.weight", "lm_head.bias")):
            if not 0 <= rows - len(tensor) <= _NUM_NEW_WORDS:
                raise CheckpointError(f"{source} has {len(tensor)} words, the run's tokenizer {rows}: use BERT's own.")
            weights[name] = torch.cat([tensor, parameters[name].detach()[len(tensor) :].to(tensor)])  # (R, D) or (R,)
        elif name.endswith(".position.weight"):
            weights[name] = tensor[:rows]  # positions are absolute: a shorter text uses the first ones
    _copy_into(parameters, weights, source)


def _read_backbone(
    source: str, side: str, classes: Mapping[str, str], num_heads: int, unused: tuple[str, ...]
) -> tuple[str, dict[str, Tensor]]:
    """The model_type of `source`, and its float32 weights under the names of the class of its model_type.

    Weights that the class has and the file has not are left out. Raises CheckpointError for what the shapes of weights
    do not show, and when the file has names, besides `unused`, that the class does not know.
    """
    import transformers

    config = hub.read_hub_config(source)
    if config.model_type not in classes:
        raise CheckpointError(
            f"{source} is a {config.model_type}; the {side} side starts from a {' or '.join(classes)}."
        )
    if config.num_attention_heads != num_heads:
        raise CheckpointError(
            f"{source} has {config.num_attention_heads} attention heads, the run's model {num_heads}."
        )
    if config.hidden_act != "gelu":
        raise CheckpointError(f"{source} computes with {config.hidden_act}; BLIP's layers are gelu.")
    model_class = getattr(transformers, classes[config.model_type])
    model, missing, left_over = hub.read_hub_model(model_class, source, dtype=torch.float32)
    prefix = f"{model.base_model_prefix}."  # a file of the bare model has names without it
    left_over = {n for n in left_over if not (n.startswith(unused) or f"{prefix}{n}".startswith(unused))}
    state_dict.raise_on_mismatch(source, (), left_over)
    return config.model_type, {n: t for n, t in model.state_dict().items() if n not in missing}


def _copy_into(parameters: Mapping[str, nn.Parameter], weights: State, source: str) -> None:
    """Copy `weights` into `parameters` of the same names; CheckpointError when shapes differ."""
    state_dict.check_weights(parameters, weights, source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


# ---- image encoders


def read_transformers_encoder(
    name: str, model_type: str, *, layer: int | None, image_size: int | None, dtype: torch.dtype
) -> ImageEncoder:
    """The image encoder of a model of transformers; see `loading.load_image_encoder`.

    `image_size` and `dtype` are for a `VisionTower`; our own ViT comes in float32, at the size of its file.
    """
    config = hub.read_hub_config(name)
    config = getattr(config, "vision_config", config)  # the image side of a whole CLIP or BLIP-2
    if model_type in ("blip-2", "instructblip"):
        is_instructed = config.model_type == "instructblip_vision_model"
        model_class = "InstructBlipVisionModel" if is_instructed else "Blip2VisionModel"
        settings = {"key_mapping": {r"^vision_model\.": ""}}  # the other parts are not loaded
        return _as_our_vit(name, model_class, config, -1 if layer is None else layer, hf_blip.HF_EVA_KEYS, **settings)
    layer = -2 if layer is None else layer
    if model_type in ("clip", "clip_vision_model") and config.hidden_act in ("gelu", "quick_gelu"):
        return _as_our_vit(name, "CLIPVisionModel", config, layer, _CLIP_KEYS)
    return _read_tower(name, layer, image_size, dtype)


def _as_our_vit(name: str, model_class: str, config: Any, layer: int, table: Table, **settings: Any) -> ImageEncoder:
    """A vision model of transformers as our ViT, up to a layer."""
    import transformers

    vit = VisionConfig(
        **{name: getattr(config, hf_name) for name, hf_name in hf_blip.HF_VISION_SETTINGS.items()},
        activation=config.hidden_act,
        input_norm="input_norm" in table,
        output_norm=False,
    )
    vit = cut_vit(vit, layer)
    hf_class = getattr(transformers, model_class)
    model, missing, _ = hub.read_hub_model(hf_class, name, config=config, dtype=torch.float32, **settings)
    # Older releases of transformers put a prefix before CLIP's names.
    state = {k.removeprefix("vision_model."): t for k, t in model.state_dict().items() if k not in missing}
    cut_off = tuple(f"encoder.layers.{i}." for i in range(vit.num_layers, config.num_hidden_layers))
    expected = empty_vit(vit).state_dict()
    weights = state_dict.translate(table, state, expected, (_FINAL_NORM, *cut_off), name)
    for key, tensor in weights.items():
        if tensor.numel() == expected[key].numel():  # it may lack the axis of images
            weights[key] = tensor.view_as(expected[key])
    preprocessing = read_hub_preprocessing(name, Preprocessing(image_size=vit.image_size))
    encoder = ImageEncoder(build_vit(vit, weights, name), vit, preprocessing)
    return resize_encoder(encoder, preprocessing.image_size)


def _read_tower(name: str, layer: int, image_size: int | None, dtype: torch.dtype) -> ImageEncoder:
    """A vision model as it is. Whether it works is not known beforehand, so it encodes one image."""
    tower = load_vision_tower(name, layer=layer, dtype=dtype)
    preprocessing = read_hub_preprocessing(name)
    size = preprocessing.image_size if image_size is None else image_size
    try:
        features = run_without_graph(tower, torch.zeros(1, 3, size, size, dtype=dtype))
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{name} cannot encode images of {size}x{size}: {hub.first_line(error)} Choose its own image size."
        ) from error
    if features.dim() != 3 or features.shape[2] != tower.hidden_dim:
        raise CheckpointError(
            f"{name} turns an image into features of shape {tuple(features.shape[1:])}; the Q-Former attends to a "
            "sequence of tokens as wide as the model, as vision transformers give it."
        )
    config = TowerConfig(name=name, hidden_dim=tower.hidden_dim, layer=layer)
    return ImageEncoder(tower, config, preprocessing)


def cut_vit(config: VisionConfig, layer: int) -> VisionConfig:
    """Our ViT up to a layer, without last norm and stochastic depth; CheckpointError when it has no such layer."""
    check_layer(layer, config.num_layers)
    num_layers = layer if layer >= 0 else config.num_layers + 1 + layer
    return replace(config, num_layers=num_layers, output_norm=False, drop_path=0.0)


def empty_vit(config: VisionConfig) -> VisionTransformer:
    """A ViT without weights, on no device."""
    with torch.device("meta"):
        return VisionTransformer(config)


def build_vit(config: VisionConfig, weights: State, source: object) -> VisionTransformer:
    """Our ViT with those of `weights` that it needs; CheckpointError when they do not fit."""
    model = empty_vit(config)
    expected = model.state_dict()
    needed = {name: tensor for name, tensor in weights.items() if name in expected}
    state_dict.check_weights(expected, needed, source)
    model.load_state_dict(needed, assign=True)
    return model


def resize_encoder(encoder: ImageEncoder, image_size: int) -> ImageEncoder:
    """The same encoder for images of `image_size`, with position embeddings of our ViT interpolated."""
    preprocessing = replace(encoder.preprocessing, image_size=image_size)
    config = encoder.config
    if isinstance(config, TowerConfig) or config.image_size == image_size:
        return encoder._replace(preprocessing=preprocessing)
    config = replace(config, image_size=image_size)
    weights = encoder.model.state_dict()
    weights["position_embedding"] = interpolate_positions(weights["position_embedding"], config.grid)
    return ImageEncoder(build_vit(config, weights, "The image encoder"), config, preprocessing)


def read_hub_preprocessing(name: str, default: Preprocessing | None = None) -> Preprocessing:
    """Size, mean and standard deviation of a model's image processor; `default` when it has none.

    Its cropping is not taken over, nor its way of resizing. Raises CheckpointError for a processor that says no square
    size or scales pixels otherwise than to 0...1, or when there is none and no default.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    with hub.quietly():
        try:
            read: Any = ImageProcessingMixin.get_image_processor_dict
            settings: dict[str, Any] = read(name)[0]
        except hub.LOADING_ERRORS as error:
            if default is not None:
                return default
            raise CheckpointError(
                f"{name} has no preprocessor_config.json, which says how it wants its pixels."
            ) from error
    try:
        if not settings.get("do_rescale", True) or abs(settings["rescale_factor"] - 1 / 255) > 1e-9:
            raise ValueError("pixels are not scaled to 0...1")
        size = _square_size(settings)
        if not settings.get("do_normalize", True):
            return Preprocessing(image_size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        mean, std = hf_blip.rgb(settings["image_mean"]), hf_blip.rgb(settings["image_std"])
        return Preprocessing(image_size=size, mean=mean, std=std)
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name} prepares images in a way that is not known here: {settings}.") from error


def _square_size(settings: dict[str, Any]) -> int:
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


def load_vision_tower(source: PathOrName, *, layer: int = -2, dtype: torch.dtype = torch.float32) -> VisionTower:
    """A vision model of transformers, or the image side of a model of images and texts, in eval mode.

    layer: the one whose output is taken, see `VisionTower`. Raises CheckpointError also when the model has no such
    layer or no image side.
    """
    import transformers

    name = os.fspath(source)
    config = hub.read_hub_config(name)
    config = getattr(config, "vision_config", config)  # what else the file holds is not read
    model, missing, _ = hub.read_hub_model(transformers.AutoModel, name, config=config, dtype=dtype)
    if model.main_input_name != "pixel_values":
        raise CheckpointError(f"{name} is a {config.model_type}, which takes no images.")
    state_dict.raise_on_mismatch(name, {weight for weight in missing if not weight.startswith(_NEVER_READ)}, ())
    return VisionTower(model.eval(), layer)


# ---- language models

# A folder is one of transformers. Adapters are in a folder of it, apart from the weights that they change.
_ADAPTER, _ADAPTER_WEIGHTS = "adapter", "adapter_model.safetensors"


def load_language_model(
    source: PathOrName,
    *,
    end_of_text: str | None = None,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    changes: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """A causal or sequence-to-sequence model of transformers with its tokenizer, in eval mode.

    source: a folder, or a name on the Hugging Face hub. quantization: the linear layers in 8 bits, or in the 4-bit
    normal floats of QLoRA; `dtype` is then that of the rest, and that in which it computes. changes: settings that its
    config is to have in place of its own. Raises CheckpointError also when weights or vocabulary are missing,
    MissingExtraError without bitsandbytes when it is quantised, and without peft when it has adapters.
    """
    import transformers

    name = os.fspath(source)
    config = hub.read_hub_config(name, **(changes or {}))
    tokenizer = hub.read_hub_tokenizer(name)
    auto: Any = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    if getattr(config, "quantization_config", None) is not None:  # it was saved so
        _require_bitsandbytes()
    model, missing, _ = hub.read_hub_model(auto, name, config=config, dtype=dtype, **_quantized(quantization, dtype))
    state_dict.raise_on_mismatch(name, missing, ())
    if (Path(name) / _ADAPTER).is_dir():
        model = _with_adapters(model, Path(name) / _ADAPTER)
    return wrap_language_model(model.eval(), tokenizer, end_of_text)


def save_language_model(folder: Path, language: LanguageModel) -> None:
    """Write a folder that `load_language_model` reads, in the model's own precision."""
    if (folder / _ADAPTER).is_dir():
        shutil.rmtree(folder / _ADAPTER)  # of an earlier model
    model = language.model
    with hub.quietly():
        if has_lora(language):
            # A copy that shares its weights loses its adapters; the given one keeps them.
            shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
            copy.deepcopy(model, shared).unload().save_pretrained(folder)
            model.save_pretrained(folder / _ADAPTER)
        else:
            model.save_pretrained(folder)
        language.tokenizer.save_pretrained(folder)


def _with_adapters(model: Any, folder: Path) -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(
            f'{folder} holds LoRA adapters, which need peft: pip install "openblip[language]"'
        ) from error
    path = folder / _ADAPTER_WEIGHTS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of missing weights, which are an error below
            adapted = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        written = load_file(path)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not hold adapters of its model: {error}") from error
    state_dict.check_weights(peft.get_peft_model_state_dict(adapted), written, str(path))
    return adapted


def quantize_language_model(
    language: LanguageModel, quantization: Quantization, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Put the linear layers of a loaded language model into 8 or 4 bits, as `load_language_model` does, on `device`.

    Raises ConfigError when it is quantised already or has adapters, MissingExtraError without bitsandbytes.
    """
    model = language.model
    if has_lora(language) or getattr(model, "is_quantized", False):
        raise ConfigError(
            f"quantization {quantization}: the language model has LoRA adapters or is quantised already; leave "
            "quantization out."
        )
    settings = {"dtype": dtype, "device_map": {"": device}, **_quantized(quantization, dtype)}
    with hub.quietly():
        config, weights = copy.deepcopy(model.config), model.state_dict()
        quantized = type(model).from_pretrained(None, config=config, state_dict=weights, **settings)
    language.model = quantized.eval()


def _quantized(quantization: Quantization | None, dtype: torch.dtype) -> Mapping[str, Any]:
    """Settings with which transformers quantises a model as it loads it."""
    if quantization is None:
        return {}
    import transformers

    _require_bitsandbytes()
    settings: dict[str, dict[str, Any]] = {
        "8bit": {"load_in_8bit": True},
        "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype},
    }
    if quantization not in settings:
        raise ConfigError(f"quantization {quantization}: choose 8bit or 4bit.")
    make: Any = transformers.BitsAndBytesConfig
    return {"quantization_config": make(**settings[quantization])}


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            'A language model in 8 or 4 bits needs bitsandbytes: pip install "openblip[quantized]"'
        ) from error
    # It logs at every layer of every step that it computes in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
