"""The settings of transformers' BLIP folders: config.json and preprocessor_config.json, read and written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from openblip.checkpoints.huggingface_keys import TEXT_SETTINGS, VISION_SETTINGS
from openblip.checkpoints.key_table import Layout
from openblip.checkpoints.native import CONFIG, read_json
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.errors import CheckpointError, ConfigError
from openblip.models.config import BlipConfig, Sharing, TextConfig, VisionConfig

BICUBIC = 3  # PIL's number


def read_config(folder: Path, kinds: Mapping[str, Any]) -> Any:
    """The folder's config, of the class that `kinds` names for its model_type.

    Raises CheckpointError when it is of another model or damaged.
    """
    model_type = str(read_json(folder / CONFIG).get("model_type"))
    if model_type not in kinds:
        raise CheckpointError(f"{folder / CONFIG} is that of no BLIP: its model_type is {model_type}.")
    try:
        return kinds[model_type].from_pretrained(folder)
    except (StrictDataclassError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().replace("\n", " ").partition(". Should contain one of")[0]
        raise CheckpointError(f"{folder / CONFIG}: {reason}.") from error


def blip_config(
    folder: Path, config: Any, layout: Layout, *, sharing: Sharing, drop_path: float
) -> BlipConfig:
    """Our settings of a model of theirs. CheckpointError for one that BLIP does not have."""
    vision, text = config.vision_config, config.text_config
    if (vision.hidden_act, text.hidden_act) != ("gelu", "gelu"):
        raise CheckpointError(
            f"{folder} computes with {vision.hidden_act}/{text.hidden_act}; BLIP's layers are gelu."
        )
    if text.encoder_hidden_size != vision.hidden_size:
        raise CheckpointError(
            f"{folder}: text that reads image tokens of width {text.encoder_hidden_size}, where those of the "
            f"image encoder are {vision.hidden_size}."
        )
    if "vqa" in layout.heads and text.hidden_size != vision.hidden_size:
        raise CheckpointError(
            f"{folder}: answers read questions of width {text.hidden_size} with cross-attention for images, "
            f"of width {vision.hidden_size}. transformers cannot run such a model either; both widths must "
            "be the same."
        )
    try:
        return BlipConfig(
            vision=VisionConfig(**sizes_of(vision, VISION_SETTINGS), drop_path=drop_path),
            text=TextConfig(**sizes_of(text, TEXT_SETTINGS), sharing=sharing),
            embed_dim=config.projection_dim if layout.pooled else config.image_text_hidden_size,
            heads=layout.heads,
            pooled=layout.pooled,
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error


def sizes_of(theirs: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Our settings from theirs, by a table of names; ConfigError for what is no size."""
    values = {ours: getattr(theirs, name) for ours, name in names.items()}
    strange = [f"{names[ours]} {value}" for ours, value in values.items() if not _is_size(ours, value)]
    if strange:
        raise ConfigError(f"{', '.join(strange)}: BLIP's settings are single numbers, sizes above 0.")
    return values


def _is_size(name: str, value: Any) -> bool:
    if isinstance(value, int):
        return value > 0 or (name == "dropout" and value == 0)
    return isinstance(value, float) and value >= 0


def huggingface_config(config: BlipConfig, tokenizer: Tokenizer) -> transformers.BlipConfig:
    """Their settings of a model of ours."""
    return transformers.BlipConfig(
        vision_config={name: getattr(config.vision, ours) for ours, name in VISION_SETTINGS.items()},
        text_config={
            **{name: getattr(config.text, ours) for ours, name in TEXT_SETTINGS.items()},
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


def read_preprocessing(folder: Path, image_size: int) -> Preprocessing:
    """The folder's own; BLIP's, at the model's resolution, where it says nothing."""
    settings: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        settings = read_json(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").is_file():
        settings = read_json(folder / "processor_config.json").get("image_processor", {})
    try:
        return _preprocessing(settings, image_size)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} prepares pictures unlike any BLIP (bicubic to a square, 1/255): {settings}."
        ) from error


def _preprocessing(settings: dict[str, Any], image_size: int) -> Preprocessing:
    size = settings.get("size", image_size)
    height, width = (size["height"], size["width"]) if isinstance(size, dict) else (size, size)
    steps = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
    same = height == width and settings.get("resample", BICUBIC) == BICUBIC
    same = same and all(settings.get(step, True) for step in steps)
    if not same or abs(settings.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise ValueError("another preparation")
    default = Preprocessing()
    red, green, blue = (float(mean) for mean in settings.get("image_mean", default.mean))
    mean = (red, green, blue)
    red, green, blue = (float(std) for std in settings.get("image_std", default.std))
    return Preprocessing(image_size=int(height), mean=mean, std=(red, green, blue))


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
