"""What a checkpoint is: a model, and what turns images and texts into its input.

Every format's reader returns a `BlipCheckpoint` or a `Blip2Checkpoint`, and every writer takes one.
"""

import os
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.errors import CheckpointError
from openblip.models.blip import Blip
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, BlipConfig, TowerConfig, VisionConfig
from openblip.models.language_model import LanguageModel
from openblip.models.vision_tower import VisionTower
from openblip.nn.vit import VisionTransformer

CONFIG = "config.json"
"""The file that says what a folder is. Writers write it last: a folder without it is no checkpoint yet."""
BERT_NAME = "bert-base-uncased"
"""All released models have the vocabulary of this BERT."""
QUESTION_PROMPT = "Question: {} Answer:"

EncoderToken = Literal["[ENC]", "[CLS]"]


class BlipCheckpoint(NamedTuple):
    """A BLIP model with what turns images and texts into its input."""

    model: Blip
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    prompt: str = ""
    """What captions begin with, unless the caller says otherwise."""
    encoder_token: EncoderToken = "[ENC]"
    """First token of a text that is encoded together with an image; BLIP was trained with [ENC]."""


class Blip2Checkpoint(NamedTuple):
    """A BLIP-2 model with what turns images and texts into its input."""

    model: Blip2
    tokenizer: Tokenizer | None
    """The Q-Former's; None when it has no text branch."""
    preprocessing: Preprocessing
    prompt: str = ""
    """What captions begin with, unless the caller says otherwise; "a photo of" in the released captioners."""
    question_prompt: str = QUESTION_PROMPT
    """How a question is put to the language model."""


Checkpoint = BlipCheckpoint | Blip2Checkpoint


class BlipSettings(NamedTuple):
    """A `BlipCheckpoint` without weights and vocabulary."""

    model: BlipConfig
    preprocessing: Preprocessing
    prompt: str
    encoder_token: EncoderToken


class Blip2Settings(NamedTuple):
    """A `Blip2Checkpoint` without weights and vocabulary."""

    model: Blip2Config
    preprocessing: Preprocessing
    prompt: str
    question_prompt: str


class ImageEncoder(NamedTuple):
    """An image encoder, its part of a `Blip2Config`, and the preprocessing that it expects."""

    model: VisionTransformer | VisionTower
    config: VisionConfig | TowerConfig
    preprocessing: Preprocessing


class FrozenParts(NamedTuple):
    """The models that a BLIP-2 checkpoint leaves out because it did not train them.

    They are loaded from elsewhere. None stands for a part that the checkpoint holds itself, or does not have.
    """

    encoder: ImageEncoder | None = None
    language: LanguageModel | None = None


def checked_encoder_token(token: str) -> EncoderToken:
    """The token itself; CheckpointError unless texts may begin with it."""
    if token not in get_args(EncoderToken):
        raise CheckpointError(f"Texts beside an image begin with [ENC] or [CLS], not with {token}.")
    return cast(EncoderToken, token)


def check_parts_fit(source: str | Path, checkpoint: BlipCheckpoint) -> None:
    """Raise a CheckpointError for a tokenizer or preprocessing of another model.

    Otherwise the first unlucky word or image would fail.
    """
    config, num_entries = checkpoint.model.config, checkpoint.tokenizer.vocab_size
    if num_entries > config.text.vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has {num_entries} entries, with [DEC] and [ENC], the model "
            f"{config.text.vocab_size}; it is another model's."
        )
    check_image_size(source, checkpoint.preprocessing.image_size, config.vision.patch_size)


def check_image_size(source: str | Path, image_size: int, patch_size: int) -> None:
    """Raise a CheckpointError unless patches tile the images."""
    if image_size < 1 or image_size % patch_size:
        raise CheckpointError(
            f"{source}: preprocessing.image_size {image_size} is no multiple of the patch size {patch_size}."
        )


def find_tokenizer(source: Path, folder: Path, named: str | os.PathLike[str] | None) -> Tokenizer:
    """The tokenizer that `named` names, else the one in `folder`, else BERT's from the hub.

    Raises a CheckpointError that says what to provide for `source`, when there is none of these.
    """
    if named is not None:
        return Tokenizer.load(os.fspath(named))
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.txt").is_file():
        return Tokenizer.load(folder)
    try:
        return Tokenizer.load(BERT_NAME)
    except CheckpointError as error:
        raise CheckpointError(
            f"{source} has no vocabulary. Put the tokenizer.json or vocab.txt of {BERT_NAME} into {folder}, "
            f"or name its folder as the tokenizer; by name it could not be fetched: {error}."
        ) from error
