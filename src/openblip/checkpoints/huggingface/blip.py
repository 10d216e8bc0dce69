"""Folders of transformers' BLIP: for captions, retrieval and questions, and its BlipModel.

What the format has no place for (the temperature of ITC, a captioner's prompt, ...) is written under "openblip" in
config.json, which transformers keeps and ignores.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from openblip.checkpoints import checkpoint as base
from openblip.checkpoints import state_dict
from openblip.checkpoints.checkpoint import CONFIG_FILE, BlipCheckpoint, PathOrName
from openblip.checkpoints.state_dict import LOG_TEMPERATURE, WEIGHTS, Layout, Table, add_prefix
from openblip.data.config import Preprocessing
from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError, ConfigError
from openblip.files import write_json
from openblip.models.blip import INITIAL_TEMPERATURE
from openblip.models.config import BlipConfig, Head, LanguageConfig, TextConfig, VisionConfig

BICUBIC = 3  # PIL's number
DEFAULT_LOG_TEMPERATURE = math.log(INITIAL_TEMPERATURE)

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
# Prefixes of names, also in .pth files
TEXT_ENCODER, TEXT_DECODER = {"encode": "text_encoder"}, {"decode": "text_decoder.bert"}
MATCHING_KEYS: Table = {head: head for head in ("vision_proj", "text_proj", "itm_head")}


def blip_layout(
    heads: tuple[Head, ...],
    body: Table,
    text_prefixes: Mapping[str, str],
    head_keys: Table | None = None,
    *,
    pooled: bool = False,
) -> Layout:
    """The layout of a BLIP. body: key table of image encoder and text; head_keys: of the heads but the decoder's."""
    table = {**body, **(head_keys or {})}
    derived = [f"{prefix}.embeddings.position_ids" for prefix in text_prefixes.values()]  # 0, 1, 2, ...
    if "decode" in text_prefixes:
        table |= add_prefix(BERT_LM_HEAD_KEYS, "text.", "text_decoder.")
        derived.append("text_decoder.cls.predictions.decoder.")  # see `state_dict.check_tied`
    return Layout(heads, table, tuple(derived), text_prefixes, pooled)


_BODY = add_prefix(HF_VISION_KEYS, "vision.", "vision_model.") | add_prefix(BERT_TEXT_KEYS, "text.", "{text}.")
_POOLED_HEAD_KEYS = {
    LOG_TEMPERATURE: "logit_scale",  # its negative: transformers multiplies by it, OpenBLIP divides
    "text_pooler": "text_model.pooler.dense",
    "vision_proj": "visual_projection",
    "text_proj": "text_projection",
}
_LAYOUTS: Mapping[str, Layout] = {
    "BlipForConditionalGeneration": blip_layout(("lm",), _BODY, TEXT_DECODER),
    "BlipForImageTextRetrieval": blip_layout(("itc", "itm"), _BODY, TEXT_ENCODER, MATCHING_KEYS),
    "BlipForQuestionAnswering": blip_layout(("vqa",), _BODY, TEXT_ENCODER | TEXT_DECODER),
    "BlipModel": blip_layout(("itc",), _BODY, {"encode": "text_model"}, _POOLED_HEAD_KEYS, pooled=True),
}

# ---- reading and writing


def load_huggingface_blip(folder: Path, tokenizer: PathOrName | None = None) -> BlipCheckpoint:
    """Read a folder of transformers' `save_pretrained`.

    tokenizer: folder or hub name; None is the folder's own, or BERT's from the hub when it has none. Raises
    CheckpointError also for another class of model, and for a setting that BLIP does not have.
    """
    import transformers

    config = read_huggingface_config(folder, {"blip": transformers.BlipConfig})
    state = state_dict.read_folder_weights(folder)
    prefixes = {prefix for layout in _LAYOUTS.values() for prefix in layout.text_prefixes.values()}
    present = {prefix for prefix in prefixes if any(name.startswith(f"{prefix}.") for name in state)}
    matching = [name for name, layout in _LAYOUTS.items() if set(layout.text_prefixes.values()) == present]
    told_by_weights = matching[0] if len(matching) == 1 else None
    layout = _LAYOUTS[find_class(folder, config, _LAYOUTS, told_by_weights)]
    # BlipModel is the one class that no conversion of BLIP's own weights uses: its models were trained with [CLS].
    extra = read_extra(folder, config, encoder_token="[CLS]" if layout.pooled else "[ENC]")
    state_dict.check_tied(state, folder)
    extra.sharing = extra.sharing or state_dict.infer_sharing(state, layout.text_prefixes)
    model = base.empty_blip(_read_config(folder, config, layout, extra))
    names = set(model.state_dict())
    translated = names if LOG_TEMPERATURE in layout.table else names - {LOG_TEMPERATURE}
    weights = state_dict.translate(layout.table, state, translated, layout.derived, folder, layout.text_prefixes)
    if LOG_TEMPERATURE in weights:
        weights[LOG_TEMPERATURE] = -weights[LOG_TEMPERATURE]
    elif LOG_TEMPERATURE in names:
        weights[LOG_TEMPERATURE] = torch.tensor(extra.log_temperature)
    state_dict.load_weights(model, weights, folder)
    vocabulary = base.find_tokenizer(folder, folder, tokenizer)
    if "decode" in layout.text_prefixes:  # captions begin and end with the tokens that config.json names
        text = config.text_config
        named, expected = (text.bos_token_id, text.sep_token_id), (vocabulary.dec_id, vocabulary.sep_id)
        if named != expected:
            raise CheckpointError(
                f"{folder}: [DEC] and [SEP] are {named} in config.json and {expected} in the tokenizer; they belong to "
                "different models."
            )
    preprocessing = read_preprocessing(folder, config.vision_config.image_size)
    checkpoint = BlipCheckpoint(model.eval(), vocabulary, preprocessing, extra.prompt, extra.encoder_token)
    base.check_parts_fit(folder, checkpoint)
    return checkpoint


def save_huggingface_blip(folder: Path, checkpoint: BlipCheckpoint) -> None:
    """Write a folder that transformers and `load_huggingface_blip` read; config.json comes last."""
    model, class_name = checkpoint.model, _class_for(checkpoint.model.config)
    layout = _LAYOUTS[class_name]
    weights = model.state_dict()
    extra: dict[str, Any] = {"prompt": checkpoint.prompt, "encoder_token": checkpoint.encoder_token}
    if LOG_TEMPERATURE in layout.table:
        weights[LOG_TEMPERATURE] = -weights[LOG_TEMPERATURE]
    elif LOG_TEMPERATURE in weights:
        extra[LOG_TEMPERATURE] = float(weights.pop(LOG_TEMPERATURE))
    extra |= {"sharing": model.config.text.sharing, "drop_path": model.config.vision.drop_path}
    state = state_dict.translate_back(layout.table, weights, layout.text_prefixes)
    state_dict.write_safetensors(folder / WEIGHTS, state)
    write_tokenizer(folder, checkpoint.tokenizer)
    write_json(folder / PREPROCESSOR_CONFIG, preprocessor_config(checkpoint.preprocessing))
    config = _write_config(model.config, checkpoint.tokenizer)
    write_json(folder / CONFIG_FILE, {**config, "architectures": [class_name], "openblip": extra})


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer that transformers reads too."""
    tokenizer.save(folder)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})


def find_class(folder: Path, config: Any, known: Mapping[str, Layout], told_by_weights: str | None) -> str:
    """The class of transformers that a folder holds: config.json says so, or else its weights do."""
    named: list[str] = list(config.architectures or [])
    named_and_known = [name for name in named if name in known]
    class_name = named_and_known[0] if len(named_and_known) == 1 else told_by_weights
    if class_name is None:
        raise CheckpointError(
            f"{folder} holds {' and '.join(named) or 'a model of no named class'}, and its weights do not look like "
            f"those of a class that can be read: {', '.join(known)}."
        )
    return class_name


def _class_for(config: BlipConfig) -> str:
    """The class of transformers that can hold such a model; CheckpointError when there is none."""
    name = state_dict.find_layout(_LAYOUTS, config)
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


# ---- config.json


def read_huggingface_config(folder: Path, classes: Mapping[str, Any]) -> Any:
    """The folder's config, of the class that `classes` names for its model_type; CheckpointError when damaged."""
    from huggingface_hub.errors import StrictDataclassError

    model_type = str(state_dict.read_json_object(folder / CONFIG_FILE).get("model_type"))
    if model_type not in classes:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} does not describe a BLIP or BLIP-2: its model_type is {model_type}. A language "
            "model or a vision model is only a part of a BLIP-2."
        )
    try:
        return classes[model_type].from_pretrained(folder)
    except (StrictDataclassError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().replace("\n", " ").partition(". Should contain one of")[0]
        raise CheckpointError(f"{folder / CONFIG_FILE}: {reason}.") from error


def _read_config(folder: Path, config: Any, layout: Layout, extra: SimpleNamespace) -> BlipConfig:
    """The settings of a model of transformers; CheckpointError for one that BLIP does not have."""
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
    with base.as_checkpoint_errors(folder / CONFIG_FILE):
        return BlipConfig(
            vision=VisionConfig(**read_sizes(vision, HF_VISION_SETTINGS), drop_path=extra.drop_path),
            text=TextConfig(**read_sizes(text, HF_TEXT_SETTINGS), sharing=extra.sharing),
            embed_dim=config.projection_dim if layout.pooled else config.image_text_hidden_size,
            heads=layout.heads,
            pooled=layout.pooled,
        )


def _write_config(config: BlipConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json as transformers writes it."""
    import transformers

    hf_config = transformers.BlipConfig(
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
    return dict(hf_config.to_dict())


def read_sizes(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Settings under our names, by a table to transformers' names; ConfigError for values that are no sizes."""
    values = {name: getattr(config, hf_name) for name, hf_name in names.items()}
    strange = []
    for name, value in values.items():
        may_be_zero = isinstance(value, float) or name == "dropout"
        if not isinstance(value, int | float) or not (value > 0 or (value == 0 and may_be_zero)):
            strange.append(f"{names[name]} {value}")
    if strange:
        raise ConfigError(f"{', '.join(strange)}: BLIP's settings are single numbers, sizes above 0.")
    return values


def write_sizes(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """The same settings under transformers' names, the inverse of `read_sizes`."""
    return {hf_name: getattr(config, name) for name, hf_name in names.items()}


# What transformers' formats of BLIP and BLIP-2 have no place for: name -> conversion, and the value in a folder that
# transformers wrote.
_EXTRA: Mapping[str, tuple[Callable[[Any], object], object]] = {
    "prompt": (str, ""),
    "log_temperature": (float, DEFAULT_LOG_TEMPERATURE),
    "drop_path": (float, 0.0),
    "encoder_token": (base.checked_encoder_token, "[ENC]"),
    "sharing": (str, None),
    "question_prompt": (str, None),
    "end_of_text": (str, None),
    "language": (str, None),
    "max_text_tokens": (int, LanguageConfig.max_text_tokens),
    "vision_norm_eps": (float, None),
    "embed_dim": (int, None),
}


def read_extra(folder: Path, config: Any, **defaults: object) -> SimpleNamespace:
    """The attributes that OpenBLIP wrote into the folder's config, or their defaults; CheckpointError if damaged."""
    written: Any = getattr(config, "openblip", None)
    values = {name: default for name, (_, default) in _EXTRA.items()} | defaults
    try:
        for name, (convert, _) in _EXTRA.items() if written is not None else ():
            if written.get(name) is not None:
                values[name] = convert(written[name])
    except (AttributeError, TypeError, ValueError, CheckpointError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: its openblip entry is damaged: {error}.") from error
    return SimpleNamespace(**values)


# ---- preprocessor_config.json

PREPROCESSOR_CONFIG = "preprocessor_config.json"


def read_preprocessing(folder: Path, image_size: int) -> Preprocessing:
    """The folder's preprocessing, or BLIP's where it says nothing; CheckpointError for one that BLIP does not have."""
    settings: dict[str, Any] = {}
    if (folder / PREPROCESSOR_CONFIG).is_file():
        settings = state_dict.read_json_object(folder / PREPROCESSOR_CONFIG)
    elif (folder / "processor_config.json").is_file():
        settings = state_dict.read_json_object(folder / "processor_config.json").get("image_processor", {})
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
