"""What a checkpoint is: a model, and what turns images and texts into its input; and OpenBLIP's own folders of it.

Every format's reader returns a `BlipCheckpoint` or a `Blip2Checkpoint` on the CPU, in eval mode, and every writer takes
one. A reader's `dtype` chooses a precision by the number of weights in the checkpoint; without it that is float32. Of a
BLIP-2 only image encoder and language model have it: the Q-Former between them stays in float32. Readers raise a
CheckpointError for a file that is missing or damaged, for weights that are missing, left over or of a wrong shape (they
are listed), and for a tokenizer or preprocessing that does not fit the model. Writers raise one for a model that their
format cannot hold.

An OpenBLIP folder holds all of a model under the names of its parameters: config.json, model.safetensors and
tokenizer.json. In that of a BLIP-2, model.safetensors has the Q-Former, the heads, and our own ViT where that is the
image encoder; tokenizer.json is there for a text branch; `language_model/` and `vision_model/` are transformers' own.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import torch

from openblip.checkpoints import backbones, state_dict
from openblip.checkpoints.backbones import PathOrName
from openblip.checkpoints.state_dict import ChooseDtype
from openblip.data.config import Preprocessing
from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError, ConfigError, OpenBlipError
from openblip.files import write_json
from openblip.models.blip import Blip
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, BlipConfig, TowerConfig
from openblip.models.language_model import LanguageModel
from openblip.models.vision_tower import VisionTower
from openblip.nn.vit import VisionTransformer

CONFIG_FILE = "config.json"  # says what a folder is. Written last: a folder without it is not a checkpoint yet.
BERT_NAME = "bert-base-uncased"  # all released models have the vocabulary of this BERT
QUESTION_PROMPT = "Question: {} Answer:"
OPENBLIP_FORMAT = "openblip"  # `format` in config.json of OpenBLIP's own folders
BLIP2_TYPE = "blip2"  # `model_type` there of a BLIP-2; transformers calls its own "blip-2"

EncoderToken = Literal["[ENC]", "[CLS]"]
ConfigT = TypeVar("ConfigT", BlipConfig, Blip2Config)


class BlipCheckpoint(NamedTuple):
    """A BLIP model with what turns images and texts into its input."""

    model: Blip
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    prompt: str = ""  # what captions begin with, unless the caller says otherwise
    encoder_token: EncoderToken = "[ENC]"  # first token of a text beside an image; BLIP was trained with [ENC]


class Blip2Checkpoint(NamedTuple):
    """A BLIP-2 model with what turns images and texts into its input."""

    model: Blip2
    tokenizer: Tokenizer | None  # the Q-Former's; None when it has no text branch
    preprocessing: Preprocessing
    prompt: str = ""  # what captions begin with; "a photo of" in the released captioners
    question_prompt: str = QUESTION_PROMPT  # how a question is put to the language model
    image_token: bool = False  # whether transformers' retrieval model is given "<image>" before a text, and cuts it off


Checkpoint = BlipCheckpoint | Blip2Checkpoint


def settings_to_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint without weights and vocabulary, as numbers, strings, lists and dicts."""
    settings = checkpoint._asdict()
    del settings["tokenizer"]
    return {
        "format": OPENBLIP_FORMAT,
        "model_type": BLIP2_TYPE if isinstance(checkpoint, Blip2Checkpoint) else "blip",
        **settings,
        "model": checkpoint.model.config.to_dict(),
        "preprocessing": asdict(checkpoint.preprocessing),
    }


def read_settings(
    config_class: type[ConfigT], written: Mapping[str, Any], source: object
) -> tuple[ConfigT, dict[str, Any]]:
    """The inverse of `settings_to_dict`: the model's config, and the checkpoint's other fields but the tokenizer."""
    try:
        config = config_class.from_dict(written["model"])
        items = written["preprocessing"].items()  # JSON turns tuples into lists
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in items}
        others = {"preprocessing": Preprocessing(**values), "prompt": str(written["prompt"])}
        if isinstance(config, BlipConfig):
            return config, others | {"encoder_token": checked_encoder_token(written.get("encoder_token", "[ENC]"))}
        image_token = written.get("image_token") is True
        return config, others | {"question_prompt": str(written["question_prompt"]), "image_token": image_token}
    except (KeyError, TypeError, AttributeError, OpenBlipError) as error:
        raise CheckpointError(f"{source}: {error}. Was it written by another version?") from error


@contextmanager
def as_checkpoint_errors(source: object) -> Iterator[None]:
    """Turn the ConfigErrors of the block, about settings that a model cannot have, into CheckpointErrors."""
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error


def checked_encoder_token(token: str) -> EncoderToken:
    """The token itself; CheckpointError unless texts may begin with it."""
    if token not in get_args(EncoderToken):
        raise CheckpointError(f"Texts beside an image begin with [ENC] or [CLS], not with {token}.")
    return cast(EncoderToken, token)


def empty_blip(config: BlipConfig) -> Blip:
    """A model whose weights are on no device until it is filled."""
    with state_dict.without_weights():
        return Blip(config)


def empty_blip2(
    source: object,
    config: Blip2Config,
    vision: VisionTransformer | VisionTower | None = None,
    language: LanguageModel | None = None,
) -> Blip2:
    """A model around parts that have their weights already, and must be of the width that the config says.

    Its other weights are on no device until it is filled.
    """
    with as_checkpoint_errors(source), state_dict.without_weights():
        return Blip2(config, vision, language)


def check_parts_fit(source: object, checkpoint: BlipCheckpoint) -> None:
    """Raise a CheckpointError for a tokenizer or preprocessing whose words or images the model cannot take."""
    config, num_entries = checkpoint.model.config, checkpoint.tokenizer.vocab_size
    state_dict.check_vocabulary(
        source, num_entries, "the model", config.text.vocab_size, "entries, with [DEC] and [ENC],"
    )
    check_image_size(source, checkpoint.preprocessing.image_size, config.vision.patch_size)


def check_image_size(source: object, image_size: int, patch_size: int) -> None:
    """Raise a CheckpointError unless patches tile the images."""
    if image_size < 1 or image_size % patch_size:
        problem = f"image_size {image_size} is no multiple of the patch size {patch_size}"
        raise CheckpointError(f"{source}: preprocessing.{problem}.")


def find_tokenizer(source: Path, folder: Path, named: PathOrName | None) -> Tokenizer:
    """The tokenizer that `named` names, else the one in `folder`, else BERT's from the hub."""
    if named is not None:
        return Tokenizer.load(os.fspath(named))
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.txt").is_file():
        return Tokenizer.load(folder)
    try:
        return Tokenizer.load(BERT_NAME)
    except CheckpointError as error:
        raise CheckpointError(
            f"{source} has no vocabulary. Put the tokenizer.json or vocab.txt of {BERT_NAME} into {folder}, or name "
            f"its folder as the tokenizer; by name it could not be fetched: {error}."
        ) from error


# ---- OpenBLIP's folders

_LANGUAGE_FOLDER, _VISION_FOLDER = "language_model", "vision_model"


def save_native(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a folder that `load_native` reads, every part in its own precision. config.json comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(checkpoint, Blip2Checkpoint):
        language, vision = checkpoint.model.language, checkpoint.model.vision
        if language is not None:
            backbones.save_language_model(folder / _LANGUAGE_FOLDER, language)
        if isinstance(vision, VisionTower):
            with backbones.quietly():
                vision.model.save_pretrained(folder / _VISION_FOLDER)
    state_dict.write_safetensors(folder / state_dict.WEIGHTS, _own_weights(checkpoint.model))
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save(folder)
    write_json(folder / CONFIG_FILE, settings_to_dict(checkpoint))


def load_native(
    folder: Path,
    tokenizer: PathOrName | None = None,
    state: dict[str, torch.Tensor] | None = None,
    dtype: ChooseDtype = state_dict.in_float32,
) -> Checkpoint:
    """Read a folder of `save_native`. tokenizer: folder or hub name of another vocabulary, BLIP's or the Q-Former's.
    state: weights in place of those in model.safetensors.
    """
    config_file, weights_file = folder / CONFIG_FILE, folder / state_dict.WEIGHTS
    tokenizer_source = folder if tokenizer is None else os.fspath(tokenizer)
    written = state_dict.read_json_object(config_file)
    if state is None:
        state = state_dict.unwrapped(state_dict.read_weights(weights_file))
    num_weights = state_dict.count_weights(state)
    if written.get("model_type") != BLIP2_TYPE:
        config, others = read_settings(BlipConfig, written, config_file)
        model = empty_blip(config)
        state_dict.fill(model, state, weights_file, dtype=dtype(num_weights))
        blip = BlipCheckpoint(model.eval(), Tokenizer.load(tokenizer_source), **others)
        check_parts_fit(folder, blip)
        return blip
    blip2_config, others = read_settings(Blip2Config, written, config_file)
    language = vision = None
    for part in (_LANGUAGE_FOLDER, _VISION_FOLDER):
        if (folder / part).is_dir():
            num_weights += state_dict.count_weights(state_dict.read_folder_weights(folder / part))
    precision = dtype(num_weights)
    if blip2_config.language is not None:
        end_of_text = blip2_config.language.end_of_text
        language = backbones.load_language_model(folder / _LANGUAGE_FOLDER, end_of_text=end_of_text, dtype=precision)
    if isinstance(blip2_config.vision, TowerConfig):
        vision = backbones.load_vision_tower(folder / _VISION_FOLDER, layer=blip2_config.vision.layer, dtype=precision)
    blip2 = empty_blip2(folder, blip2_config, vision, language)
    state_dict.fill(blip2, state, weights_file, _own_weights(blip2), dtype=precision, prefix="vision.")
    has_tokenizer = tokenizer is not None or blip2_config.has_text_branch
    return Blip2Checkpoint(blip2.eval(), Tokenizer.load(tokenizer_source) if has_tokenizer else None, **others)


def _own_weights(model: Blip | Blip2) -> dict[str, torch.Tensor]:
    """The weights that are not in folders of transformers, which only a BLIP-2 has."""
    prefixes = ("language.", "vision.") if isinstance(model.vision, VisionTower) else ("language.",)
    return state_dict.without(prefixes, model.state_dict())
