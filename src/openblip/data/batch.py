"""What a training step receives, one kind of batch for each kind of example.

Shapes: B examples, F frames of a clip, S image size, T text tokens, A answers, K answers of a dialog, R rows
of text.
"""

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch

from openblip.data.tokenizer import Tokens


@dataclass(frozen=True, slots=True)
class Examples:
    """B examples by the names of their samples.

    `pixels`: uint8 (B, 3, S, S), of clips (B, F, 3, S, S), of two pictures (B, 2, 3, S, S); float (B, N, Dv)
    where features of a cache take their place.
    """

    pixels: torch.Tensor
    keys: list[str]
    shards: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Self:
        """The same with every tensor on a device."""
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})


@dataclass(frozen=True, slots=True)
class Batch(Examples):
    """Image-text pairs. `tokens` [CLS]...[SEP]; `image_ids` int64 (B), equal for pairs of the same image."""

    tokens: Tokens
    captions: list[str]
    image_ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class QuestionBatch(Examples):
    """Questions with all their answers. `questions` (B, T) and `answers` (A, T) [CLS]...[SEP]; `owners` int64
    (A,) says whose answer each is, ascending; `weights` float (A,).
    """

    questions: Tokens
    answers: Tokens
    owners: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class StatementBatch(Examples):
    """Statements about two pictures. `statements` (B, T) [CLS]...[SEP]; `labels` int64 (B,), 1 is true."""

    statements: Tokens
    labels: torch.Tensor


@dataclass(frozen=True, slots=True)
class DialogBatch(Examples):
    """One round of each dialog with K answers. `captions` (B, T); `dialogs` (B * K, T), the K of a dialog one
    after the other; `labels` int64 (B * K,), 1 is the right answer.
    """

    captions: Tokens
    dialogs: Tokens
    labels: torch.Tensor


@dataclass(frozen=True, slots=True)
class TextBatch(Examples):
    """Texts as they are written, for a language model with a tokenizer of its own.

    `prompts` stand before the texts and are not predicted, "" for none. Of texts alone `pixels` is (B, 0).
    """

    prompts: list[str]
    texts: list[str]


@dataclass(frozen=True, slots=True)
class PromptedBatch(Examples):
    """R texts after prompts, several about one picture, for a language model with a tokenizer of its own.

    `prompts` are read and not predicted. `instructions`: what the Q-Former reads beside its queries, (R, T)
    [CLS]...[SEP]; None where it reads nothing. `owners` int64 (R,) says whose picture each is about,
    ascending; `weights` float (R,).
    """

    prompts: list[str]
    texts: list[str]
    instructions: Tokens | None
    owners: torch.Tensor
    weights: torch.Tensor


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    return value.to(device) if isinstance(value, Tokens) else value


def hash_image_id(image_id: str) -> int:
    """A stable non-negative 63-bit number for a `Sample.image_id`; two of a billion images collide with
    chance 5%.
    """
    digest = hashlib.blake2b(image_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
