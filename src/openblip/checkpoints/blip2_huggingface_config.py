"""The settings of transformers' BLIP-2 folders, read and written, and what OpenBLIP keeps beside them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from openblip.checkpoints.blip2_huggingface_keys import QFORMER_SETTINGS, Blip2Layout
from openblip.checkpoints.huggingface_config import sizes_of
from openblip.checkpoints.huggingface_keys import VISION_SETTINGS
from openblip.checkpoints.native import CONFIG
from openblip.errors import CheckpointError, ConfigError
from openblip.models.blip import INITIAL_TEMPERATURE
from openblip.models.config import Blip2Config, LanguageConfig, QFormerConfig, VisionConfig
from openblip.models.language_model import LanguageModel

CONFIG_CLASSES: Mapping[str, Any] = {
    "blip-2": transformers.Blip2Config,
    "instructblip": transformers.InstructBlipConfig,
}
_ACTIVATIONS = ("gelu", "quick_gelu")  # of the image encoder: EVA's and CLIP's


class Extra(NamedTuple):
    """What their format has no place for; the defaults are for a folder that transformers wrote."""

    prompt: str = ""
    question_prompt: str | None = None
    end_of_text: str | None = None
    language: str | None = None
    max_text_tokens: int = LanguageConfig.max_text_tokens
    log_temperature: float = math.log(INITIAL_TEMPERATURE)
    vision_norm_eps: float | None = None
    drop_path: float = 0.0
    embed_dim: int | None = None


_EXTRA_TYPES: dict[str, type] = {
    "prompt": str,
    "question_prompt": str,
    "end_of_text": str,
    "language": str,
    "max_text_tokens": int,
    "log_temperature": float,
    "vision_norm_eps": float,
    "drop_path": float,
    "embed_dim": int,
}


def read_extra(folder: Path, config: Any) -> Extra:
    """What OpenBLIP wrote into the folder's config, or what holds without; CheckpointError if damaged."""
    written = getattr(config, "openblip", None) or {}
    try:
        return Extra(
            **{
                name: kind(written[name])
                for name, kind in _EXTRA_TYPES.items()
                if written.get(name) is not None
            }
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: its openblip entry is damaged: {error}.") from error


def question_prompt_of(extra: Extra, language: LanguageModel | None, instructed: bool) -> str:
    """How a question is put to the language model: as the folder says, or as the papers do."""
    if extra.question_prompt is not None:
        return extra.question_prompt
    is_short = instructed or (language is not None and language.is_encoder_decoder)
    return "Question: {} Short answer:" if is_short else "Question: {} Answer:"


def blip2_config(
    folder: Path, config: Any, layout: Blip2Layout, extra: Extra, language: LanguageModel | None
) -> Blip2Config:
    """Our settings of a model of theirs. CheckpointError for one that BLIP-2 does not have."""
    vision, qformer = config.vision_config, config.qformer_config
    if vision.hidden_act not in _ACTIVATIONS or qformer.hidden_act != "gelu" or not vision.qkv_bias:
        raise CheckpointError(
            f"{folder} has {vision.hidden_act}/{qformer.hidden_act} and qkv_bias {vision.qkv_bias}; "
            f"in BLIP-2 the image encoder has {' or '.join(_ACTIVATIONS)} and that bias, its Q-Former gelu."
        )
    try:
        embed_dim = getattr(config, "image_text_hidden_size", None)  # InstructBLIP compares nothing
        return Blip2Config(
            vision=VisionConfig(
                **sizes_of(vision, VISION_SETTINGS),
                activation=vision.hidden_act,
                drop_path=extra.drop_path,
                output_norm=False,
            ),
            qformer=QFormerConfig(**sizes_of(qformer, QFORMER_SETTINGS), num_queries=config.num_query_tokens),
            language=None if language is None else _language_config(folder, config, extra, language),
            embed_dim=extra.embed_dim or embed_dim or Blip2Config.embed_dim,
            heads=layout.heads,
            instructed=layout.instructed,
            vision_norm_eps=(
                vision.layer_norm_eps if extra.vision_norm_eps is None else extra.vision_norm_eps
            ),
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error


def _language_config(folder: Path, config: Any, extra: Extra, language: LanguageModel) -> LanguageConfig:
    end = language.tokenizer.decode([language.end_id])
    is_own_end = extra.end_of_text is None and language.end_id == language.tokenizer.eos_token_id
    return LanguageConfig(
        name=extra.language or getattr(config.text_config, "_name_or_path", "") or str(folder),
        hidden_dim=language.hidden_dim,
        end_of_text=None if is_own_end else extra.end_of_text or str(end),
        max_text_tokens=extra.max_text_tokens,
    )


def extra_of(config: Blip2Config, prompt: str, question_prompt: str, temperature: float | None) -> Extra:
    """What a model of ours has that their format has no place for; temperature: its logarithm."""
    language = config.language
    extra = Extra(
        prompt=prompt,
        question_prompt=question_prompt,
        vision_norm_eps=config.vision_norm_eps,
        drop_path=config.vision.drop_path if isinstance(config.vision, VisionConfig) else 0.0,
        embed_dim=config.embed_dim,
    )
    if temperature is not None:
        extra = extra._replace(log_temperature=temperature)
    if language is not None:
        extra = extra._replace(
            language=language.name,
            end_of_text=language.end_of_text,
            max_text_tokens=language.max_text_tokens,
        )
    return extra


def huggingface_config(
    model_type: str, config: Blip2Config, text_config: Mapping[str, Any] | None, image_token: int | None
) -> Any:
    """Their settings of a model of ours; image_token: which word stands for a visual prompt."""
    vision, qformer = config.vision, config.qformer
    if not isinstance(vision, VisionConfig) or vision.input_norm or vision.output_norm:
        kind = (
            "is not ours" if not isinstance(vision, VisionConfig) else "has CLIP's first norm or a last norm"
        )
        raise CheckpointError(
            f"transformers' BLIP-2 has one kind of image encoder, and this model's {kind}: save as openblip."
        )
    settings: dict[str, Any] = {
        "vision_config": {
            **{name: getattr(vision, ours) for ours, name in VISION_SETTINGS.items()},
            "hidden_act": vision.activation,
        },
        "qformer_config": {
            **{name: getattr(qformer, ours) for ours, name in QFORMER_SETTINGS.items()},
            "attention_probs_dropout_prob": qformer.dropout,
            "encoder_hidden_size": vision.hidden_dim,
        },
        "num_query_tokens": qformer.num_queries,
        "image_token_index": image_token,
    }
    if text_config is not None:
        settings["text_config"] = dict(text_config)
    if model_type == "blip-2":
        settings["image_text_hidden_size"] = config.embed_dim
        settings["qformer_config"]["use_qformer_text_input"] = config.has_text_branch
    return CONFIG_CLASSES[model_type](**settings)
