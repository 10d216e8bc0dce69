"""Hugging Face's BLIP folders: BlipForConditionalGeneration (captions), BlipForImageTextRetrieval (ITC, ITM).

The tables of names are in `huggingface_keys.py`. What the format has no place for (the temperature of ITC, a
captioner's prompt) is written under "openblip" in config.json, which transformers keeps and ignores.
"""

import json
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from openblip.checkpoints.huggingface_keys import CAPTIONER, RETRIEVER, TEXT_SETTINGS, VISION_SETTINGS
from openblip.checkpoints.key_table import Table, translate, translate_back
from openblip.checkpoints.native import (
    CONFIG,
    WEIGHTS,
    Checkpoint,
    as_float32,
    load_weights,
    read_json,
    read_weights,
)
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.errors import CheckpointError
from openblip.models.blip import INITIAL_TEMPERATURE, Blip
from openblip.models.config import BlipConfig, Head, TextConfig, VisionConfig

INDEX, PICKLED = "model.safetensors.index.json", "pytorch_model.bin"
BERT = "bert-base-uncased"  # whose vocabulary a folder without a tokenizer was trained with
BICUBIC = 3  # PIL's number
TEMPERATURE = "log_temperature"


class _Kind(NamedTuple):
    """One of transformers' classes: its heads, its table, and of its keys those that say nothing new."""

    heads: tuple[Head, ...]
    table: Table
    derived: tuple[str, ...]


KINDS = {
    "BlipForConditionalGeneration": _Kind(
        ("lm",),
        CAPTIONER,
        # The word embeddings and cls.predictions.bias over again, which `_check_tied` sees to.
        ("text_decoder.cls.predictions.decoder.", "text_decoder.bert.embeddings.position_ids"),
    ),
    "BlipForImageTextRetrieval": _Kind(("itc", "itm"), RETRIEVER, ("text_encoder.embeddings.position_ids",)),
}


def load_huggingface(folder: str | Path) -> Checkpoint:
    """Read a folder of transformers' `save_pretrained`, in float32 on the CPU, in eval mode.

    The weights may be safetensors, whole or sharded, or a pytorch_model.bin, of which no code is run. The
    tokenizer and preprocessing are the folder's own; without a tokenizer, BERT's from the hub. Sizes, head
    counts and epsilons come from config.json.

    Raises CheckpointError for another class of model, a setting that BLIP does not have, weights that are
    missing or left over (it lists them), or a tokenizer of another model.
    """
    folder = Path(folder)
    model_type = read_json(folder / CONFIG).get("model_type")
    if model_type != "blip":
        raise CheckpointError(f"{folder / CONFIG} is that of no BLIP: its model_type is {model_type}.")
    config: Any = transformers.BlipConfig.from_pretrained(folder)
    kind = _kind_of(folder, config)
    theirs = _read_tensors(folder)
    _check_tied(folder, theirs)
    with torch.device("meta"):
        model = Blip(_blip_config(folder, config, kind.heads))
    model.to_empty(device="cpu")
    extra = getattr(config, "openblip", {})
    names = model.state_dict().keys() - {TEMPERATURE}
    weights = translate(kind.table, theirs, names, kind.derived, str(folder))
    if "itc" in kind.heads:  # transformers' own files have no temperature: it starts where pre-training does
        weights[TEMPERATURE] = torch.tensor(extra.get(TEMPERATURE, math.log(INITIAL_TEMPERATURE)))
    load_weights(model, weights, origin=str(folder))
    tokenizer = _tokenizer(folder)
    if "lm" in kind.heads:
        _check_special_tokens(folder, config.text_config, tokenizer)
    if tokenizer.vocab_size > config.text_config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} entries, with [DEC] and [ENC], the model "
            f"{config.text_config.vocab_size}; it is another model's."
        )
    preprocessing = _preprocessing(folder, config.vision_config.image_size)
    return Checkpoint(model.eval(), tokenizer, preprocessing, str(extra.get("prompt", "")))


def save_huggingface(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Write a folder that transformers and `load_huggingface` read.

    Raises CheckpointError when none of transformers' classes has the model's heads: it knows captioners (lm)
    and retrieval models (itc and itm).
    """
    folder, model = Path(folder), checkpoint.model
    matching = [name for name, kind in KINDS.items() if set(kind.heads) == set(model.config.heads)]
    if not matching:
        raise CheckpointError(
            f"No model of transformers has the heads {', '.join(model.config.heads)}: it has captioners (lm) "
            "and retrieval models (itc and itm). Fine-tune one of these, or save as openblip."
        )
    name = matching[0]
    extra: dict[str, Any] = {"prompt": checkpoint.prompt}
    ours = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    if TEMPERATURE in ours:
        extra[TEMPERATURE] = float(ours.pop(TEMPERATURE))
    theirs = translate_back(KINDS[name].table, ours)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {key: tensor.contiguous() for key, tensor in theirs.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    checkpoint.tokenizer.save(folder)
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    _write_json(folder / "preprocessor_config.json", _preprocessor_config(checkpoint.preprocessing))
    config = _huggingface_config(model.config, checkpoint.tokenizer).to_dict()
    _write_json(folder / CONFIG, {**config, "architectures": [name], "openblip": extra})


def _kind_of(folder: Path, config: Any) -> _Kind:
    (name,) = config.architectures or ("none",)
    if name not in KINDS:
        raise CheckpointError(
            f"{folder} holds a {name}; of transformers' BLIPs, {' and '.join(KINDS)} can be read."
        )
    return KINDS[name]


def _blip_config(folder: Path, config: Any, heads: tuple[Head, ...]) -> BlipConfig:
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
    return BlipConfig(
        vision=VisionConfig(**{ours: getattr(vision, name) for ours, name in VISION_SETTINGS.items()}),
        text=TextConfig(**{ours: getattr(text, name) for ours, name in TEXT_SETTINGS.items()}),
        embed_dim=config.image_text_hidden_size,
        heads=heads,
    )


def _huggingface_config(config: BlipConfig, tokenizer: Tokenizer) -> transformers.BlipConfig:
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
        image_text_hidden_size=config.embed_dim,
    )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, floating ones as float32."""
    if (folder / WEIGHTS).is_file():
        return read_weights(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        shards = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
        return {name: tensor for shard in shards for name, tensor in read_weights(folder / shard).items()}
    path = folder / PICKLED
    if not path.is_file():
        raise CheckpointError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX} nor {PICKLED}.")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as weights: {error}") from error
    return as_float32(tensors)


def _check_tied(folder: Path, theirs: Mapping[str, Tensor]) -> None:
    """The decoder's matrix and bias, where a file has them, are those that ours computes with."""
    head = "text_decoder.cls.predictions"
    for copy, original in (
        (f"{head}.decoder.weight", "text_decoder.bert.embeddings.word_embeddings.weight"),
        (f"{head}.decoder.bias", f"{head}.bias"),
    ):
        if copy in theirs and original in theirs and not torch.equal(theirs[copy], theirs[original]):
            raise CheckpointError(f"{folder}: {copy} differs from {original}; BLIP's decoder has them tied.")


def _tokenizer(folder: Path) -> Tokenizer:
    has_own = (folder / "tokenizer.json").is_file() or (folder / "vocab.txt").is_file()
    return Tokenizer.load(folder if has_own else BERT)


def _check_special_tokens(folder: Path, text: Any, tokenizer: Tokenizer) -> None:
    """Captions begin and end with the tokens that config.json names."""
    for name, theirs, ours in (
        ("[DEC]", text.bos_token_id, tokenizer.dec_id),
        ("[SEP]", text.sep_token_id, tokenizer.sep_id),
    ):
        if theirs != ours:
            raise CheckpointError(
                f"{folder}: {name} is {theirs} in config.json and {ours} in the tokenizer; of two models."
            )


def _preprocessing(folder: Path, image_size: int) -> Preprocessing:
    """The folder's own; BLIP's, at the model's resolution, where it says nothing."""
    settings: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        settings = read_json(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").is_file():
        settings = read_json(folder / "processor_config.json").get("image_processor", {})
    size = settings.get("size", {"height": image_size, "width": image_size})
    steps = [
        settings.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
    ]
    known = size["height"] == size["width"] and settings.get("resample", BICUBIC) == BICUBIC and all(steps)
    if not known or abs(settings.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise CheckpointError(
            f"{folder} prepares pictures unlike any BLIP (bicubic to a square, 1/255): {settings}."
        )
    default = Preprocessing()
    mean, std = settings.get("image_mean", default.mean), settings.get("image_std", default.std)
    return Preprocessing(image_size=size["height"], mean=tuple(mean), std=tuple(std))


def _preprocessor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    size = preprocessing.image_size
    return {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "BlipProcessor",
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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
