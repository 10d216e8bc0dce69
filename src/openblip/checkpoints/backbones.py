"""Models of transformers that BLIP and BLIP-2 begin with or freeze, by folder or hub name.

- Weights to start a training from: a ViT for BLIP's image encoder (section 4.1), BERT for its text transformer and for
  the Q-Former of BLIP-2 (BLIP-2 section 3.1).
- Image encoders to freeze. CLIP and the EVA-CLIP of a Hugging Face BLIP-2 become our own ViT, cut after the layer that
  is read; every other vision model stays as it is, behind `VisionTower`.
- Language models to freeze, quantised by transformers, with LoRA through peft.

transformers takes a second to import, so functions import it. The key tables say which of its tensors each of our
parameters is; what they and the named exceptions do not cover is an error.

R rows of the word embeddings, D width, N image tokens, S side of an image in pixels.
"""

import copy
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from openblip.checkpoints import state_dict
from openblip.checkpoints.state_dict import Layout, State, Table
from openblip.data.config import Preprocessing
from openblip.data.tokenizer import IMAGE_TOKEN
from openblip.errors import CheckpointError, ConfigError, MissingExtraError, hub_problem
from openblip.models.config import TowerConfig
from openblip.models.language_model import LanguageModel, has_lora, wrap_language_model
from openblip.models.vision_tower import VisionTower, check_layer, run_without_graph
from openblip.nn.attention import SelfAttention
from openblip.nn.config import VisionConfig
from openblip.nn.qformer import QFormer
from openblip.nn.text_transformer import TextTransformer
from openblip.nn.vit import VisionTransformer, interpolate_positions

Quantization = Literal["8bit", "4bit"]
PathOrName = str | os.PathLike[str]  # a folder or file, or a name on the Hugging Face hub
# What transformers, the hub and safetensors raise for a checkpoint that is missing, unknown or torn.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


class ImageEncoder(NamedTuple):
    """An image encoder, its part of a `Blip2Config`, and the preprocessing that it expects."""

    model: VisionTransformer | VisionTower
    config: VisionConfig | TowerConfig
    preprocessing: Preprocessing


# ---- names of settings and weights in transformers

_SIZES = {
    "hidden_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "layer_norm_eps": "layer_norm_eps",
}
HF_VISION_SETTINGS = {"image_size": "image_size", "patch_size": "patch_size"} | _SIZES  # BlipVisionConfig
HF_TEXT_SETTINGS = _SIZES | {  # BlipTextConfig
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "dropout": "hidden_dropout_prob",
}
_B, _HF, _VIT = "blocks.{i}", "encoder.layers.{i}", "layers.{i}"
_VIT_NAMES = (  # ours; BlipVisionModel's; those of ViTModel and DeiTModel; those of timm's VisionTransformer
    ("class_token", "embeddings.class_embedding", "embeddings.cls_token", "cls_token"),
    ("position_embedding", "embeddings.position_embedding", "embeddings.position_embeddings", "pos_embed"),
    ("patch_embedding", "embeddings.patch_embedding", "embeddings.patch_embeddings.projection", "patch_embed.proj"),
    (f"{_B}.attention_norm", f"{_HF}.layer_norm1", f"{_VIT}.layernorm_before", f"{_B}.norm1"),
    (f"{_B}.attention.qkv", f"{_HF}.self_attn.qkv", f"{_VIT}.attention.q_proj+k_proj+v_proj", f"{_B}.attn.qkv"),
    (f"{_B}.attention.out", f"{_HF}.self_attn.projection", f"{_VIT}.attention.o_proj", f"{_B}.attn.proj"),
    (f"{_B}.mlp_norm", f"{_HF}.layer_norm2", f"{_VIT}.layernorm_after", f"{_B}.norm2"),
    (f"{_B}.mlp.0", f"{_HF}.mlp.fc1", f"{_VIT}.mlp.fc1", f"{_B}.mlp.fc1"),
    (f"{_B}.mlp.2", f"{_HF}.mlp.fc2", f"{_VIT}.mlp.fc2", f"{_B}.mlp.fc2"),
    ("norm", "post_layernorm", "layernorm", "norm"),
)
HF_VISION_KEYS: Table = {row[0]: row[1] for row in _VIT_NAMES}
_VIT_KEYS: Table = {row[0]: row[2] for row in _VIT_NAMES}
TIMM_VISION_KEYS: Table = {row[0]: row[3] for row in _VIT_NAMES}
# Blip2VisionModel, whose last norm is kept apart
HF_EVA_KEYS: Table = {name: hf_name for name, hf_name in HF_VISION_KEYS.items() if name != "norm"}
_SELF, _CROSS = "encoder.layer.{i}.attention", "encoder.layer.{i}.crossattention"
BERT_TEXT_KEYS: Table = {  # BlipTextModel, whose names are BERT's
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "layers.{i}.self_attention.branch.qkv": f"{_SELF}.self.query+key+value",
    "layers.{i}.self_attention.branch.out": f"{_SELF}.output.dense",
    "layers.{i}.self_attention.norm": f"{_SELF}.output.LayerNorm",
    "layers.{i}.cross_attention.branch.query": f"{_CROSS}.self.query",
    "layers.{i}.cross_attention.branch.key_value": f"{_CROSS}.self.key+value",
    "layers.{i}.cross_attention.branch.out": f"{_CROSS}.output.dense",
    "layers.{i}.cross_attention.norm": f"{_CROSS}.output.LayerNorm",
    "layers.{i}.feed_forward.branch.0": "encoder.layer.{i}.intermediate.dense",
    "layers.{i}.feed_forward.branch.2": "encoder.layer.{i}.output.dense",
    "layers.{i}.feed_forward.norm": "encoder.layer.{i}.output.LayerNorm",
}
BERT_LM_HEAD_KEYS: Table = {  # BlipTextLMPredictionHead
    "lm_head.transform": "cls.predictions.transform.dense",
    "lm_head.norm": "cls.predictions.transform.LayerNorm",
    "lm_head.bias": "cls.predictions.bias",
}
# Older releases of transformers name a ViT's parameters in memory as its files do; newer ones as in the table.
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
    **HF_EVA_KEYS,
    "position_embedding": "embeddings.position_embedding.weight",
    "input_norm": "pre_layrnorm",
    "blocks.{i}.attention.qkv": "encoder.layers.{i}.self_attn.q_proj+k_proj+v_proj",
    "blocks.{i}.attention.out": "encoder.layers.{i}.self_attn.out_proj",
}
# BertForMaskedLM. Our names have no mode, since both modes start from the same BERT, which has no cross-attention. A
# Q-Former has a feed-forward for queries and one for text, which both start as BERT's.
_BERT_KEYS: Table = {
    **{
        name.replace(".feed_forward", f".{kind}feed_forward"): f"bert.{bert}"
        for name, bert in BERT_TEXT_KEYS.items()
        for kind in ("", "query_", "text_")
        if "cross_attention" not in name
    },
    **BERT_LM_HEAD_KEYS,
    **{f"m{name}": bert for name, bert in BERT_LM_HEAD_KEYS.items()},
}

# What a checkpoint may have that BLIP has no use for.
_UNUSED_VISION = (
    "pooler.",  # a layer over the class token that only classification trains; BLIP projects the token itself
    *("classifier.", "cls_classifier.", "distillation_classifier."),  # ImageNet's classes
    "embeddings.distillation_token",  # DeiT's second class token; the paper's DeiT-B was trained without it
    "embeddings.mask_token",  # of masked-image training
)
_UNUSED_TEXT = (
    *("bert.pooler.", "cls.seq_relationship."),  # for next-sentence prediction
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

# ---- what transformers loads, by folder or by name on the Hugging Face hub


def load_from_hub(load: Callable[..., Any], name: str, **settings: Any) -> Any:
    """What `load`, a `from_pretrained` of transformers, returns: without its warnings, errors as CheckpointErrors."""
    is_folder = Path(name).is_dir()
    if not is_folder and (name.startswith((".", "/", "~")) or name.count("/") > 1):  # no name on the hub
        raise CheckpointError(f"There is no folder {name}; name one, or a model on the Hugging Face hub.")
    with quietly():
        try:
            return load(name, **settings)
        except LOADING_ERRORS as error:
            problem = f"cannot be read ({type(error).__name__}: {first_line(error)})"
            if is_folder:
                for path in filter(Path.is_file, sorted(Path(name).glob("*.*"))):
                    state_dict.check_file(path)
            elif (hub := hub_problem(error)) is not None:
                problem = f"is no folder, and the Hugging Face hub {hub}; name a folder"
            raise CheckpointError(f"{name} {problem}.") from error


def read_hub_model(model_class: Any, name: str, **settings: Any) -> tuple[Any, set[str], set[str]]:
    """A model, the names of weights that its file lacks, which the caller has to judge, and of those left over."""
    settings = {"key_mapping": {r"^(module\.|_orig_mod\.)+": ""}} | settings  # of DDP and torch.compile
    model, report = load_from_hub(model_class.from_pretrained, name, output_loading_info=True, **settings)
    return model, set(report["missing_keys"]), set(report["unexpected_keys"])


def build_theirs(
    source: object,
    model_class: Any,
    config: Any,
    state: State,
    prefix: str = "",
    ignored: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A model of transformers with exactly these weights; CheckpointError when they do not fit. prefix: of their names
    in the folder. ignored: prefixes of what may be left over.
    """
    with quietly():  # transformers warns of wrong names and shapes, which are errors below
        try:
            model, report = model_class.from_pretrained(
                None,
                config=copy.deepcopy(config),
                state_dict=dict(state),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except (*LOADING_ERRORS, TypeError) as error:
            problem = f"its {config.model_type} cannot be made: {first_line(error)}"
            raise CheckpointError(f"{source}: {problem}.") from error
    # A file may have one copy or more of weights that a class ties.
    missing = [prefix + name for name in report["missing_keys"]]
    left_over = [prefix + name for name in report["unexpected_keys"] if not name.startswith(ignored)]
    shapes = [
        f"{prefix}{name} is {tuple(shape)}, the model has {tuple(expected)}"
        for name, shape, expected in report["mismatched_keys"]
    ]
    state_dict.raise_on_mismatch(source, missing, left_over, [*shapes, *report["error_msgs"]])
    return model


def read_hub_tokenizer(name: str) -> Any:
    """The tokenizer of a language model; CheckpointError also where transformers would make an empty one."""
    import transformers

    try:
        tokenizer = load_from_hub(transformers.AutoTokenizer.from_pretrained, name)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        raise CheckpointError(f"{name}: the language model's tokenizer cannot be read: {first_line(error)}.") from error
    files = ("tokenizer.json", *tokenizer.vocab_files_names.values())
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        raise CheckpointError(
            f"{name} has no tokenizer of the language model: put its tokenizer.json and tokenizer_config.json there, "
            "or name the folder that has them as the tokenizer."
        )
    return tokenizer


@contextmanager
def quietly() -> Iterator[None]:
    """Silence transformers' warnings and its progress bar over weights, but not the bars of downloads."""
    import transformers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    log: Any = transformers.utils.logging
    verbosity, had_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    hub_had_bars = not are_progress_bars_disabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    if hub_had_bars:
        enable_progress_bars()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if had_bars:
            log.enable_progress_bar()
            if not hub_had_bars:
                disable_progress_bars()


def first_line(error: Exception) -> str:
    """The first line of an error's message: libraries put advice about their own calls below it."""
    return str(error).strip().split("\n")[0]


# ---- weights to start a training from


def init_vision(vision: VisionTransformer, source: str) -> None:
    """Start a ViT from a Hugging Face ViTModel, DeiTModel or BlipVisionModel, in place.

    Position embeddings are interpolated to the resolution of `vision`. The layer norms keep their own epsilon: 1e-6 as
    in the released code, where Hugging Face's ViTs say 1e-12. source: folder or hub name. Raises CheckpointError when
    there is no such checkpoint, it is of another kind or shape, or keys are missing or left over; they are listed.
    """
    num_heads = cast(Any, vision.blocks[0]).attention.num_heads
    classes = {"vit": "ViTModel", "deit": "DeiTModel", "blip_vision_model": "BlipVisionModel"}
    model_type, state = _read_backbone(source, "image", classes, num_heads, _UNUSED_VISION)
    table = HF_VISION_KEYS
    if model_type != "blip_vision_model":
        table = _VIT_KEYS
        for old, new in _OLD_VIT_NAMES.items():
            state = {name.replace(old, new): tensor for name, tensor in state.items()}
    weights = state_dict.translate(Layout(table, _UNUSED_VISION), state, vision.state_dict(), source)
    positions = weights["position_embedding"]  # (1, N, D)
    if model_type == "deit":
        positions = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)  # without the distillation token's
    grid = math.isqrt(vision.position_embedding.shape[1] - 1)
    weights["position_embedding"] = interpolate_positions(positions, grid)
    state_dict.load_weights(vision, weights, source)


def init_text(model: TextTransformer | QFormer, source: str) -> None:
    """Start a text transformer, whatever its modes share, or a Q-Former from a Hugging Face BERT, in place.

    Self-attention (in both modes), feed-forwards and embeddings start as BERT's, and so does the head where both have
    one. Cross-attention, queries, and the rows of the words that BERT does not know ([DEC] and [ENC], the last ones),
    keep their random start, as in the released code. `source` and errors are those of `init_vision`; another vocabulary
    is one, too.
    """
    num_heads = next(module.num_heads for module in model.modules() if isinstance(module, SelfAttention))
    _, state = _read_backbone(source, "text", {"bert": "BertForMaskedLM"}, num_heads, _UNUSED_TEXT)
    unused = list(_UNUSED_TEXT)  # and that for which the model has no place
    heads = tuple(f"{name}." for name in ("lm_head", "mlm_head") if getattr(model, name, None) is not None)
    if not heads:
        unused.append("cls.predictions.")
    if isinstance(model, QFormer) and model.embeddings.word is None:
        unused += ["bert.embeddings.word_embeddings.", "bert.embeddings.position_embeddings."]
    has_head = any(n.startswith("cls.predictions.") for n in state_dict.without(_UNUSED_TEXT, state))
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not any(part in name for part in _FRESH_TEXT) and (has_head or not name.startswith(heads))
    }
    weights = state_dict.translate(Layout(_BERT_KEYS, tuple(unused)), state, parameters, source)
    for name, tensor in weights.items():
        rows = len(parameters[name])
        if name.endswith((".word.weight", "lm_head.bias")):
            if not 0 <= rows - len(tensor) <= _NUM_NEW_WORDS:
                raise CheckpointError(f"{source} has {len(tensor)} words, the run's tokenizer {rows}: use BERT's own.")
            weights[name] = torch.cat([tensor, parameters[name].detach()[len(tensor) :].to(tensor)])  # (R, D) or (R,)
        elif name.endswith(".position.weight"):
            weights[name] = tensor[:rows]  # positions are absolute: a shorter text uses the first ones
    state_dict.load_weights(model, weights, source, parameters)


def _read_backbone(
    source: str, side: str, classes: Mapping[str, str], num_heads: int, unused: tuple[str, ...]
) -> tuple[str, dict[str, Tensor]]:
    """The model_type of `source`, and the float32 weights that it has, under the names of its class.

    Raises CheckpointError for what shapes do not show, and for names that neither the class nor `unused` knows.
    """
    import transformers

    config = load_from_hub(transformers.AutoConfig.from_pretrained, source)
    if config.model_type not in classes:
        kinds = " or ".join(classes)
        raise CheckpointError(f"{source} is a {config.model_type}; the {side} side starts from a {kinds}.")
    if config.num_attention_heads != num_heads:
        raise CheckpointError(
            f"{source} has {config.num_attention_heads} attention heads, the run's model {num_heads}."
        )
    if config.hidden_act != "gelu":
        raise CheckpointError(f"{source} computes with {config.hidden_act}; BLIP's layers are gelu.")
    model_class = getattr(transformers, classes[config.model_type])
    model, missing, left_over = read_hub_model(model_class, source, dtype=torch.float32)
    prefix = f"{model.base_model_prefix}."  # a file of the bare model has names without it
    left_over = {n for n in left_over if not (n.startswith(unused) or f"{prefix}{n}".startswith(unused))}
    state_dict.raise_on_mismatch(source, (), left_over)
    return config.model_type, {n: t for n, t in model.state_dict().items() if n not in missing}


# ---- image encoders


# model_type of models whose image side becomes our ViT: its class, its key table, and the layer that BLIP-2 reads.
_OUR_VITS = {
    "blip-2": ("Blip2VisionModel", HF_EVA_KEYS, -1),
    "instructblip": ("InstructBlipVisionModel", HF_EVA_KEYS, -1),
    "clip": ("CLIPVisionModel", _CLIP_KEYS, -2),
    "clip_vision_model": ("CLIPVisionModel", _CLIP_KEYS, -2),
}


def read_transformers_encoder(
    name: str, model_type: str, *, layer: int | None, image_size: int | None, dtype: torch.dtype
) -> ImageEncoder:
    """The image encoder of a model of transformers, see `loading.load_image_encoder`.

    `image_size` and `dtype` are for a `VisionTower`; our own ViT comes in float32, at the size of its file.
    """
    import transformers

    config = load_from_hub(transformers.AutoConfig.from_pretrained, name)
    config = getattr(config, "vision_config", config)  # the image side of a whole CLIP or BLIP-2
    is_clip = model_type in ("clip", "clip_vision_model")
    if model_type not in _OUR_VITS or (is_clip and config.hidden_act not in ("gelu", "quick_gelu")):
        return _read_tower(name, -2 if layer is None else layer, image_size, dtype)
    class_name, table, default_layer = _OUR_VITS[model_type]
    sizes = {ours: getattr(config, theirs) for ours, theirs in HF_VISION_SETTINGS.items()}
    vit = VisionConfig(**sizes, activation=config.hidden_act, input_norm=is_clip, output_norm=False)
    vit = cut_vit(vit, default_layer if layer is None else layer)
    # The other parts of a BLIP-2 are not loaded.
    settings = {} if is_clip else {"key_mapping": {r"^(module\.|_orig_mod\.)*vision_model\.": ""}}
    hf_class = getattr(transformers, class_name)
    model, missing, _ = read_hub_model(hf_class, name, config=config, dtype=torch.float32, **settings)
    # Older releases of transformers put a prefix before CLIP's names.
    state = {k.removeprefix("vision_model."): t for k, t in model.state_dict().items() if k not in missing}
    cut_off = tuple(f"encoder.layers.{i}." for i in range(vit.num_layers, config.num_hidden_layers))
    expected = empty_vit(vit).state_dict()
    weights = state_dict.translate(Layout(table, ("post_layernorm.", *cut_off)), state, expected, name)
    for key, tensor in weights.items():
        if tensor.numel() == expected[key].numel():  # it may lack the axis of images
            weights[key] = tensor.view_as(expected[key])
    preprocessing = read_hub_preprocessing(name, Preprocessing(image_size=vit.image_size))
    return resize_encoder(ImageEncoder(build_vit(vit, weights, name), vit, preprocessing), preprocessing.image_size)


def _read_tower(name: str, layer: int, image_size: int | None, dtype: torch.dtype) -> ImageEncoder:
    """A vision model as it is. Whether it works is not known beforehand, so it encodes one image."""
    tower = load_vision_tower(name, layer=layer, dtype=dtype)
    preprocessing = read_hub_preprocessing(name)
    size = preprocessing.image_size if image_size is None else image_size
    try:
        features = run_without_graph(tower, torch.zeros(1, 3, size, size, dtype=dtype))
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{name} cannot encode images of {size}x{size}: {first_line(error)} Choose its own image size."
        ) from error
    if features.dim() != 3 or features.shape[2] != tower.hidden_dim:
        raise CheckpointError(
            f"{name} turns an image into features of shape {tuple(features.shape[1:])}; the Q-Former attends to a "
            "sequence of tokens as wide as the model, as vision transformers give it."
        )
    return ImageEncoder(tower, TowerConfig(name=name, hidden_dim=tower.hidden_dim, layer=layer), preprocessing)


def cut_vit(config: VisionConfig, layer: int) -> VisionConfig:
    """Our ViT up to a layer, without last norm and stochastic depth; CheckpointError when it has no such layer."""
    check_layer(layer, config.num_layers)
    num_layers = layer if layer >= 0 else config.num_layers + 1 + layer
    return replace(config, num_layers=num_layers, output_norm=False, drop_path=0.0)


def empty_vit(config: VisionConfig) -> VisionTransformer:
    """A ViT without weights, on no device."""
    with state_dict.without_weights():
        return VisionTransformer(config)


def build_vit(config: VisionConfig, weights: State, source: object) -> VisionTransformer:
    """Our ViT with those of `weights` that it needs, in float32; CheckpointError when they do not fit."""
    model = empty_vit(config)
    expected = model.state_dict().keys()
    needed = {name: tensor for name, tensor in weights.items() if name in expected}
    state_dict.fill(model, needed, source)
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


def rgb(values: Any) -> tuple[float, float, float]:
    """Three numbers, of red, green and blue; ValueError or TypeError for anything else."""
    red, green, blue = map(float, values)
    return red, green, blue


def read_hub_preprocessing(name: str, default: Preprocessing | None = None) -> Preprocessing:
    """Size, mean and standard deviation of a model's image processor, not its cropping nor its way of resizing.

    Raises CheckpointError for a processor that says no square size or scales pixels otherwise than to 0...1, or when
    there is none and no default.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    read: Any = ImageProcessingMixin.get_image_processor_dict
    with quietly():
        try:
            settings: dict[str, Any] = read(name)[0]
        except LOADING_ERRORS as error:
            problem = None if Path(name).is_dir() else hub_problem(error)
            if problem is None and default is not None:
                return default
            advice = "write it there with save_pretrained of the model's image processor, or copy it from its hub page"
            raise CheckpointError(
                f"{name} has no preprocessor_config.json, which says the size, mean and deviation of its pixels; "
                f"{advice if problem is None else f'the Hugging Face hub {problem}'}."
            ) from error
    try:
        if not settings.get("do_rescale", True) or abs(settings["rescale_factor"] - 1 / 255) > 1e-9:
            raise ValueError("pixels are not scaled to 0...1")
        size = _square_size(settings)
        if not settings.get("do_normalize", True):
            return Preprocessing(image_size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        return Preprocessing(image_size=size, mean=rgb(settings["image_mean"]), std=rgb(settings["image_std"]))
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

    layer: see `VisionTower`. Raises CheckpointError also when the model has no such layer or no image side.
    """
    import transformers

    name = os.fspath(source)
    config = load_from_hub(transformers.AutoConfig.from_pretrained, name)
    config = getattr(config, "vision_config", config)  # what else the file holds is not read
    model, missing, _ = read_hub_model(transformers.AutoModel, name, config=config, dtype=dtype)
    if model.main_input_name != "pixel_values":
        raise CheckpointError(f"{name} is a {config.model_type}, which takes no images.")
    state_dict.raise_on_mismatch(name, {weight for weight in missing if not weight.startswith(_NEVER_READ)}, ())
    return VisionTower(model.eval(), layer)


# ---- language models

_ADAPTER = "adapter"  # folder of the adapters in a folder of transformers, which has the weights that they change
ADAPTER_CONFIG = "adapter_config.json"  # peft's, in a folder that has adapters alone


def load_language_model(
    source: PathOrName,
    *,
    end_of_text: str | None = None,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    changes: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """A causal or sequence-to-sequence model of transformers with its tokenizer, in eval mode.

    source: a folder, or a name on the Hugging Face hub; or a folder of peft's adapters, which names its model.
    quantization: the linear layers in 8 bits, or in the 4-bit normal floats of QLoRA; `dtype` is then that of the rest,
    and that in which it computes. changes: settings that its config is to have in place of its own. Raises
    CheckpointError also when weights or vocabulary are missing, MissingExtraError without bitsandbytes when it is
    quantised, and without peft when it has adapters.
    """
    import transformers

    name, adapter = os.fspath(source), Path(source) / _ADAPTER
    vocabulary = name
    if (Path(name) / ADAPTER_CONFIG).is_file():
        name, adapter = adapted_model(Path(name)), Path(name)
        vocabulary = str(adapter) if (adapter / "tokenizer_config.json").is_file() else name
    config = load_from_hub(transformers.AutoConfig.from_pretrained, name, **(changes or {}))
    tokenizer = read_hub_tokenizer(vocabulary)
    is_decoder = not config.is_encoder_decoder
    auto: Any = transformers.AutoModelForCausalLM if is_decoder else transformers.AutoModelForSeq2SeqLM
    if getattr(config, "quantization_config", None) is not None:  # it was saved so
        _require_bitsandbytes()
    model, missing, _ = read_hub_model(
        auto, name, config=config, dtype=dtype, **quantized_settings(quantization, dtype)
    )
    state_dict.raise_on_mismatch(name, missing, ())
    model = with_all_words(vocabulary, model, tokenizer)
    if adapter.is_dir():
        model = with_adapters(model, adapter)
    return wrap_language_model(model.eval(), tokenizer, end_of_text)


def with_rows(model: Any, num_rows: int) -> Any:
    """The model with so many word embeddings, or a copy that has them and shares all other weights.

    An added row is the mean of the others, in the output layer too: a token that is never the most likely.
    """
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    num_old = len(layers[0].weight)
    if num_rows <= num_old:
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for layer in filter(None, layers):
        for tensor in layer.parameters():
            shared.pop(id(tensor), None)  # once for both layers where they are tied
    larger = copy.deepcopy(model, shared)
    larger.resize_token_embeddings(num_rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (larger.get_input_embeddings(), larger.get_output_embeddings()):
            for rows in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
                if rows is not None:
                    rows[num_old:] = rows[:num_old].mean(dim=0)
    return larger


def with_all_words(source: object, model: Any, tokenizer: Any) -> Any:
    """A language model with a word embedding for every word that someone added to its tokenizer, but for <image>."""
    num_rows = len(model.get_input_embeddings().weight)
    without_row = [w for w, index in tokenizer.get_vocab().items() if index >= num_rows and w != IMAGE_TOKEN]
    if without_row:
        state_dict.check_vocabulary(source, tokenizer.vocab_size, "the language model", num_rows, "words,")
        warn_of_rows(source, sorted(without_row))
        model = with_rows(model, len(tokenizer))
    return model


def warn_of_rows(source: object, words: Sequence[str]) -> None:
    """Warn of words that someone added to a tokenizer alone."""
    warnings.warn(
        f"{source}: {len(words)} words of its tokenizer ({', '.join(words[:5])}) have no word embedding and get the "
        "mean of the others; in transformers, model.resize_token_embeddings(len(tokenizer)) makes room for them.",
        stacklevel=4,
    )


def adapted_model(folder: Path) -> str:
    """The folder or hub name of the model that the adapters in a folder of peft belong to."""
    name = state_dict.read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if name and (Path(name).is_dir() or not name.startswith((".", "/"))):
        return str(name)
    raise CheckpointError(
        f"{folder} holds adapters of {name or 'a model that is not named'}, which is not here: write the folder or hub "
        f"name of that model as base_model_name_or_path into its {ADAPTER_CONFIG}."
    )


def with_adapters(model: Any, folder: Path) -> Any:
    """A model of transformers, or the language model in it, in peft's with the adapters of a folder, which must fit."""
    try:
        import peft
    except ImportError as error:
        problem = f"{folder} holds LoRA adapters, which need peft"
        raise MissingExtraError(f'{problem}: pip install "openblip[language]"') from error
    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    path = pickled if pickled.is_file() and not safe.is_file() else safe
    written = state_dict.read_weights(path)
    parts = {name.removeprefix("base_model.model.").partition(".")[0] for name in written}
    if parts.isdisjoint(name for name, _ in model.named_children()) and hasattr(model, "language_model"):
        model = model.language_model
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of missing weights, which are an error below
            adapted = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except (*LOADING_ERRORS, TypeError) as error:
        raise CheckpointError(f"{folder} does not hold adapters of its model: {first_line(error)}") from error
    state_dict.check_weights(peft.get_peft_model_state_dict(adapted), written, str(path))
    return adapted


def save_language_model(folder: Path, language: LanguageModel) -> None:
    """Write a folder that `load_language_model` reads, in the model's own precision."""
    if (folder / _ADAPTER).is_dir():
        shutil.rmtree(folder / _ADAPTER)  # of an earlier model
    model = language.model
    with quietly():
        if has_lora(language):
            # A copy that shares its weights loses its adapters; the given one keeps them.
            shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
            copy.deepcopy(model, shared).unload().save_pretrained(folder)
            model.save_pretrained(folder / _ADAPTER)
        else:
            model.save_pretrained(folder)
        language.tokenizer.save_pretrained(folder)


def quantize_language_model(
    language: LanguageModel, quantization: Quantization, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Put the linear layers of a loaded language model into 8 or 4 bits, as `load_language_model` does, on `device`.

    Raises ConfigError when it is quantised already or has adapters, MissingExtraError without bitsandbytes.
    """
    model = language.model
    if has_lora(language) or getattr(model, "is_quantized", False):
        problem = "the language model has LoRA adapters or is quantised already"
        raise ConfigError(f"quantization {quantization}: {problem}; leave quantization out.")
    settings = {"dtype": dtype, "device_map": {"": device}, **quantized_settings(quantization, dtype)}
    with quietly():
        config, weights = copy.deepcopy(model.config), model.state_dict()
        quantized = type(model).from_pretrained(None, config=config, state_dict=weights, **settings)
    language.model = quantized.eval()


def quantized_settings(quantization: Quantization | None, dtype: torch.dtype) -> Mapping[str, Any]:
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
    return {"quantization_config": cast(Any, transformers.BitsAndBytesConfig)(**settings[quantization])}


def _require_bitsandbytes() -> None:
    try:
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        problem = "A language model in 8 or 4 bits needs bitsandbytes and accelerate"
        raise MissingExtraError(f'{problem}: pip install "openblip[quantized]"') from error
    # It logs at every layer of every step that it computes in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
