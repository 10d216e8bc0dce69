"""Folders of transformers' BLIP: for captions, retrieval and questions, and its BlipModel.

What the format has no place for (the temperature of ITC, a captioner's prompt, ...) is written under "openblip" in
config.json, which transformers keeps and ignores.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor

from openblip.checkpoints.checkpoint import (
    CONFIG_FILE,
    BlipCheckpoint,
    EncoderToken,
    PathOrName,
    check_parts_fit,
    checked_encoder_token,
    empty_blip,
    find_tokenizer,
)
from openblip.checkpoints.state_dict import (
    WEIGHTS,
    Layout,
    Table,
    add_prefix,
    check_tied,
    find_layout,
    infer_sharing,
    load_weights,
    read_folder_weights,
    read_json_object,
    translate,
    translate_back,
    write_safetensors,
)
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.errors import CheckpointError, ConfigError
from openblip.files import write_json
from openblip.models.blip import INITIAL_TEMPERATURE
from openblip.models.config import BlipConfig, Head, LanguageConfig, Sharing, TextConfig, VisionConfig

LOG_TEMPERATURE = "log_temperature"
BICUBIC = 3  # PIL's number

# ---- names of settings (configuration_blip) and of weights (modeling_blip)

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

HF_VISION_KEYS: Table = {  # BlipVisionModel
    "class_token": "embeddings.class_embedding",
    "position_embedding": "embeddings.position_embedding",
    "patch_embedding": "embeddings.patch_embedding",
    "blocks.{i}.attention_norm": "encoder.layers.{i}.layer_norm1",
    "blocks.{i}.attention.qkv": "encoder.layers.{i}.self_attn.qkv",
    "blocks.{i}.attention.out": "encoder.layers.{i}.self_attn.projection",
    "blocks.{i}.mlp_norm": "encoder.layers.{i}.layer_norm2",
    "blocks.{i}.mlp.0": "encoder.layers.{i}.mlp.fc1",
    "blocks.{i}.mlp.2": "encoder.layers.{i}.mlp.fc2",
    "norm": "post_layernorm",
}
# Blip2VisionModel, whose last norm is kept apart
HF_EVA_KEYS: Table = {ours: theirs for ours, theirs in HF_VISION_KEYS.items() if ours != "norm"}
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
TEXT_ENCODER, TEXT_DECODER = (
    {"encode": "text_encoder"},
    {"decode": "text_decoder.bert"},
)  # prefixes, also in .pth files
MATCHING_KEYS: Table = {head: head for head in ("vision_proj", "text_proj", "itm_head")}


def blip_layout(
    heads: tuple[Head, ...],
    body: Table,
    text_prefixes: Mapping[str, str],
    head_keys: Table | None = None,
    *,
    pooled: bool = False,
) -> Layout[Head]:
    """The layout of a BLIP. body: key table of image encoder and text; head_keys: of the heads but the decoder's."""
    table = {**body, **(head_keys or {})}
    derived = [f"{prefix}.embeddings.position_ids" for prefix in text_prefixes.values()]  # 0, 1, 2, ...
    if "decode" in text_prefixes:
        table |= add_prefix(BERT_LM_HEAD_KEYS, "text.", "text_decoder.")
        derived.append("text_decoder.cls.predictions.decoder.")  # see `state_dict.check_tied`
    return Layout(heads, table, tuple(derived), text_prefixes, pooled)


_BODY = add_prefix(HF_VISION_KEYS, "vision.", "vision_model.") | add_prefix(BERT_TEXT_KEYS, "text.", "{text}.")
_LAYOUTS: Mapping[str, Layout[Head]] = {
    "BlipForConditionalGeneration": blip_layout(("lm",), _BODY, TEXT_DECODER),
    "BlipForImageTextRetrieval": blip_layout(("itc", "itm"), _BODY, TEXT_ENCODER, MATCHING_KEYS),
    "BlipForQuestionAnswering": blip_layout(("vqa",), _BODY, TEXT_ENCODER | TEXT_DECODER),
    "BlipModel": blip_layout(
        ("itc",),
        _BODY,
        {"encode": "text_model"},
        {
            LOG_TEMPERATURE: "logit_scale",  # its negative
            "text_pooler": "text_model.pooler.dense",
            "vision_proj": "visual_projection",
            "text_proj": "text_projection",
        },
        pooled=True,
    ),
}

# ---- reading and writing


def load_huggingface_blip(folder: Path, tokenizer: PathOrName | None = None) -> BlipCheckpoint:
    """Read a folder of transformers' `save_pretrained`.

    tokenizer: folder or hub name; None is the folder's own, or BERT's from the hub when it has none. Sizes, head counts
    and epsilons come from config.json.

    Raises CheckpointError also for another class of model, and for a setting that BLIP does not have.
    """
    import transformers

    config = read_huggingface_config(folder, {"blip": transformers.BlipConfig})
    state = read_folder_weights(folder)
    layout = _LAYOUTS[_class_of(folder, config, state)]
    # BlipModel is the one class that no conversion of BLIP's own weights uses: what trained it used [CLS].
    extra = read_extra(folder, config, Extra(encoder_token="[CLS]") if layout.pooled else Extra())
    check_tied(state, str(folder))
    sharing = extra.sharing or infer_sharing(state, layout.text_prefixes)
    model = empty_blip(_blip_config(folder, config, layout, sharing=sharing, drop_path=extra.drop_path))
    names = set(model.state_dict())
    translated = names if LOG_TEMPERATURE in layout.table else names - {LOG_TEMPERATURE}
    weights = translate(layout.table, state, translated, layout.derived, str(folder), layout.text_prefixes)
    if LOG_TEMPERATURE in weights:
        weights[LOG_TEMPERATURE] = -weights[LOG_TEMPERATURE]  # transformers multiplies, ours divides
    elif LOG_TEMPERATURE in names:
        weights[LOG_TEMPERATURE] = torch.tensor(extra.log_temperature)
    load_weights(model, weights, origin=str(folder))
    words = find_tokenizer(folder, folder, tokenizer)
    if "decode" in layout.text_prefixes:
        _check_special_tokens(folder, config.text_config, words)
    preprocessing = read_preprocessing(folder, config.vision_config.image_size)
    checkpoint = BlipCheckpoint(model.eval(), words, preprocessing, extra.prompt, extra.encoder_token)
    check_parts_fit(folder, checkpoint)
    return checkpoint


def save_huggingface_blip(folder: Path, checkpoint: BlipCheckpoint) -> None:
    """Write a folder that transformers and `load_huggingface_blip` read; config.json comes last."""
    model = checkpoint.model
    class_name = _class_for(model.config)
    layout = _LAYOUTS[class_name]
    weights = model.state_dict()
    extra: dict[str, Any] = {"prompt": checkpoint.prompt, "encoder_token": checkpoint.encoder_token}
    if LOG_TEMPERATURE in layout.table:
        weights[LOG_TEMPERATURE] = -weights[LOG_TEMPERATURE]
    elif LOG_TEMPERATURE in weights:
        extra[LOG_TEMPERATURE] = float(weights.pop(LOG_TEMPERATURE))
    extra |= {"sharing": model.config.text.sharing, "drop_path": model.config.vision.drop_path}
    write_safetensors(folder / WEIGHTS, translate_back(layout.table, weights, layout.text_prefixes))
    write_tokenizer(folder, checkpoint.tokenizer)
    write_json(folder / PREPROCESSOR_CONFIG, preprocessor_config(checkpoint.preprocessing))
    config = _huggingface_config(model.config, checkpoint.tokenizer).to_dict()
    write_json(folder / CONFIG_FILE, {**config, "architectures": [class_name], "openblip": extra})


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer that transformers reads too."""
    tokenizer.save(folder)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})


def _class_of(folder: Path, config: Any, state: Mapping[str, Tensor]) -> str:
    """The class of transformers that a folder holds: config.json says so, or else its weights do."""
    named: list[str] = list(config.architectures or [])
    known = [name for name in named if name in _LAYOUTS]
    if len(known) == 1:
        return known[0]
    prefixes = {prefix for layout in _LAYOUTS.values() for prefix in layout.text_prefixes.values()}
    present = {prefix for prefix in prefixes if any(name.startswith(f"{prefix}.") for name in state)}
    matching = [name for name, layout in _LAYOUTS.items() if set(layout.text_prefixes.values()) == present]
    if len(matching) != 1:
        raise unknown_class(folder, named, _LAYOUTS)
    return matching[0]


def unknown_class(folder: Path, named: list[str], known: Mapping[str, object]) -> CheckpointError:
    """The error for a folder whose class neither config.json nor its weights tell."""
    return CheckpointError(
        f"{folder} holds {' and '.join(named) or 'a model of no named class'}, and its weights do not look like those "
        f"of a class that can be read: {', '.join(known)}."
    )


def _class_for(config: BlipConfig) -> str:
    """The class of transformers that can hold a model of ours."""
    name = find_layout(_LAYOUTS, config.heads, pooled=config.pooled)
    if name is None:
        pooled = " and a pooler" if config.pooled else ""
        raise CheckpointError(
            f"No model of transformers has the heads {', '.join(config.heads)}{pooled}: it has captioners (lm), "
            "retrieval models (itc and itm), question answering (vqa), and BlipModel (itc with a pooler). Fine-tune "
            "one of these, or save as openblip."
        )
    if "vqa" in config.heads and config.text.hidden_dim != config.vision.hidden_dim:
        raise CheckpointError(
            f"transformers' {name} needs text as wide as its images: {config.text.hidden_dim} and "
            f"{config.vision.hidden_dim} are not. Save as openblip or original."
        )
    return name


def _check_special_tokens(folder: Path, text_config: Any, tokenizer: Tokenizer) -> None:
    """Raise a CheckpointError unless captions begin and end with the tokens that config.json names."""
    for token, index, expected in (
        ("[DEC]", text_config.bos_token_id, tokenizer.dec_id),
        ("[SEP]", text_config.sep_token_id, tokenizer.sep_id),
    ):
        if index != expected:
            raise CheckpointError(
                f"{folder}: {token} is {index} in config.json and {expected} in the tokenizer; they are of two models."
            )


# ---- config.json


def read_huggingface_config(folder: Path, classes: Mapping[str, Any]) -> Any:
    """The folder's config, of the class that `classes` names for its model_type.

    Raises CheckpointError when it is of another model or damaged.
    """
    from huggingface_hub.errors import StrictDataclassError

    model_type = str(read_json_object(folder / CONFIG_FILE).get("model_type"))
    if model_type not in classes:
        raise CheckpointError(f"{folder / CONFIG_FILE} is that of no BLIP: its model_type is {model_type}.")
    try:
        return classes[model_type].from_pretrained(folder)
    except (StrictDataclassError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().replace("\n", " ").partition(". Should contain one of")[0]
        raise CheckpointError(f"{folder / CONFIG_FILE}: {reason}.") from error


def _blip_config(folder: Path, config: Any, layout: Layout[Head], *, sharing: Sharing, drop_path: float) -> BlipConfig:
    """Our settings of a model of transformers; CheckpointError for one that BLIP does not have."""
    vision, text = config.vision_config, config.text_config
    if (vision.hidden_act, text.hidden_act) != ("gelu", "gelu"):
        raise CheckpointError(f"{folder} computes with {vision.hidden_act}/{text.hidden_act}; BLIP's layers are gelu.")
    if text.encoder_hidden_size != vision.hidden_size:
        raise CheckpointError(
            f"{folder}: the text attends to image tokens of width {text.encoder_hidden_size}, but those of the image "
            f"encoder are {vision.hidden_size}."
        )
    if "vqa" in layout.heads and text.hidden_size != vision.hidden_size:
        raise CheckpointError(
            f"{folder}: answers attend to questions of width {text.hidden_size} with cross-attention for images, of "
            f"width {vision.hidden_size}. transformers cannot run such a model either; both widths must be the same."
        )
    try:
        return BlipConfig(
            vision=VisionConfig(**read_sizes(vision, HF_VISION_SETTINGS), drop_path=drop_path),
            text=TextConfig(**read_sizes(text, HF_TEXT_SETTINGS), sharing=sharing),
            embed_dim=config.projection_dim if layout.pooled else config.image_text_hidden_size,
            heads=layout.heads,
            pooled=layout.pooled,
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error


def read_sizes(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Our settings, by a table from our names to theirs; ConfigError for what is no size."""
    values = {ours: getattr(config, theirs) for ours, theirs in names.items()}
    strange = [f"{names[ours]} {value}" for ours, value in values.items() if not _is_size(ours, value)]
    if strange:
        raise ConfigError(f"{', '.join(strange)}: BLIP's settings are single numbers, sizes above 0.")
    return values


def _is_size(name: str, value: Any) -> bool:
    if isinstance(value, int):
        return value > 0 or (name == "dropout" and value == 0)
    return isinstance(value, float) and value >= 0


def write_sizes(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Their settings, the inverse of `read_sizes`."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}


def _huggingface_config(config: BlipConfig, tokenizer: Tokenizer) -> Any:
    """transformers' settings of a model of ours."""
    import transformers

    return transformers.BlipConfig(
        vision_config=write_sizes(config.vision, HF_VISION_SETTINGS),
        text_config={
            **write_sizes(config.text, HF_TEXT_SETTINGS),
            "attention_probs_dropout_prob": config.text.dropout,
            "encoder_hidden_size": config.vision.hidden_dim,
            "bos_token_id": tokenizer.dec_id,
            "eos_token_id": tokenizer.sep_id,
            "sep_token_id": tokenizer.sep_id,
            "pad_token_id": tokenizer.pad_id,
        },
        projection_dim=config.embed_dim,
        image_text_hidden_size=config.embed_dim,
    )


class Extra(NamedTuple):
    """What transformers' formats of BLIP and BLIP-2 have no place for.

    The defaults hold for a folder that transformers wrote.
    """

    prompt: str = ""
    log_temperature: float = math.log(INITIAL_TEMPERATURE)
    drop_path: float = 0.0
    encoder_token: EncoderToken = "[ENC]"
    sharing: Sharing | None = None
    question_prompt: str | None = None
    end_of_text: str | None = None
    language: str | None = None
    max_text_tokens: int = LanguageConfig.max_text_tokens
    vision_norm_eps: float | None = None
    embed_dim: int | None = None


def _checked_sharing(value: Any) -> Sharing:
    if value not in get_args(Sharing):
        raise ValueError(f"sharing {value}")
    return cast(Sharing, value)


_EXTRA_TYPES: Mapping[str, Callable[[Any], object]] = {
    "prompt": str,
    "log_temperature": float,
    "drop_path": float,
    "encoder_token": checked_encoder_token,
    "sharing": _checked_sharing,
    "question_prompt": str,
    "end_of_text": str,
    "language": str,
    "max_text_tokens": int,
    "vision_norm_eps": float,
    "embed_dim": int,
}


def read_extra(folder: Path, config: Any, default: Extra) -> Extra:
    """What OpenBLIP wrote into the folder's config; `default` for what it did not; CheckpointError if damaged."""
    written = getattr(config, "openblip", None)
    if written is None:
        return default
    try:
        values: dict[str, Any] = {
            name: convert(written[name]) for name, convert in _EXTRA_TYPES.items() if written.get(name) is not None
        }
        return Extra(**values)
    except (AttributeError, TypeError, ValueError, CheckpointError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: its openblip entry is damaged: {error}.") from error


# ---- preprocessor_config.json

PREPROCESSOR_CONFIG = "preprocessor_config.json"


def read_preprocessing(folder: Path, image_size: int) -> Preprocessing:
    """The folder's preprocessing; BLIP's, at the model's resolution, where it says nothing.

    Raises CheckpointError for one that BLIP does not have.
    """
    settings: dict[str, Any] = {}
    if (folder / PREPROCESSOR_CONFIG).is_file():
        settings = read_json_object(folder / PREPROCESSOR_CONFIG)
    elif (folder / "processor_config.json").is_file():
        settings = read_json_object(folder / "processor_config.json").get("image_processor", {})
    try:
        size = settings.get("size", image_size)
        height, width = (size["height"], size["width"]) if isinstance(size, dict) else (size, size)
        steps = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
        same = height == width and settings.get("resample", BICUBIC) == BICUBIC
        same = same and all(settings.get(step, True) for step in steps)
        if not same or abs(settings.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
            raise ValueError("another preprocessing")
        return Preprocessing(
            image_size=int(height),
            mean=rgb(settings.get("image_mean", Preprocessing.mean)),
            std=rgb(settings.get("image_std", Preprocessing.std)),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} prepares images unlike any BLIP (bicubic to a square, 1/255): {settings}."
        ) from error


def rgb(values: Any) -> tuple[float, float, float]:
    """Three numbers, of red, green and blue; ValueError or TypeError for anything else."""
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def preprocessor_config(preprocessing: Preprocessing, processor: str = "BlipProcessor") -> dict[str, Any]:
    """What transformers' BlipImageProcessor reads, on its own or as part of `processor`."""
    size = preprocessing.image_size
    return {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": processor,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
        "do_convert_rgb": True,
    }
