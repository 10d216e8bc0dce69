"""Natural language visual reasoning, NLVR2: is a statement about two images true? (BLIP section 5.4).

B examples, S image size, N image tokens, T text tokens, D image width.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.data import texts
from openblip.data.batch import Batch, Example, PixelReader, SampleProcessor, View, shared_fields
from openblip.data.config import DataConfig
from openblip.data.images import read_image
from openblip.data.sample import Sample
from openblip.data.tokenizer import BATCH_LENGTH_STEP, Tokenizer, Tokens
from openblip.errors import SourceError
from openblip.tasks.base import BlipTask, replace_first
from openblip.tasks.config import NlvrConfig

_SIDE = re.compile(r"\b(?:left|right)(?=(?:most|hand)?\b)")


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementBatch(Batch):
    """B statements, each about two images: `pixels` is (B, 2, 3, S, S)."""

    statements: Tokens
    """(B, T): [CLS] ... [SEP]."""
    labels: torch.Tensor
    """int64 (B,), 1 is true."""


def pair_pixels(sample: Sample, view: View, rng: np.random.Generator) -> np.ndarray:
    """The left and the right image, uint8 (2, 3, S, S), each with a view of its own."""
    if sample.second_image is None:
        raise SourceError("no second image")
    name = f"{sample.shard}/{sample.key}"
    left = view(read_image(sample.image, name=f"{name} (left)"), rng)
    return np.stack([left, view(read_image(sample.second_image, name=f"{name} (right)"), rng)])


@dataclass(frozen=True, kw_only=True)
class StatementProcessor(SampleProcessor):
    """A statement about two images. In a random half of the samples they change sides, and so do the words left and
    right: the released code's augmentation for NLVR2.
    """

    read_pixels: PixelReader = pair_pixels
    max_text_length: int = 40

    def __call__(self, sample: Sample, view: View, rng: np.random.Generator) -> Example:
        example = super().__call__(sample, view, rng)
        statement, label, swapped = example.content
        if swapped:
            return example._replace(pixels=example.pixels[::-1].copy(), content=(swap_sides(statement), label))
        return example._replace(content=(statement, label))

    def content(self, sample: Sample, rng: np.random.Generator) -> tuple[str, int, bool]:
        """The statement, its label, and whether the sides are exchanged."""
        statement = texts.normalize_caption(texts.text_field(sample, "statement"))
        label = texts.label_of(sample)
        if label is None:
            raise SourceError("no label that is true or false")
        return statement, int(label), bool(rng.random() < 0.5)

    def collate(self, examples: Sequence[Example], tokenizer: Tokenizer) -> StatementBatch:
        statements = [example.content[0] for example in examples]
        return StatementBatch(
            **shared_fields(examples),
            statements=tokenizer.encode(statements, self.max_text_length, BATCH_LENGTH_STEP),
            labels=torch.tensor([example.content[1] for example in examples]),
        )


def swap_sides(statement: str) -> str:
    """The same text with left and right exchanged, also in rightmost, left-hand and before a comma. The released code
    overlooks these, and so trains on a statement about the other image.
    """
    return _SIDE.sub(lambda side: "left" if side[0] == "right" else "right", statement)


class Nlvr(BlipTask):
    """A BLIP that tells true statements from false ones."""

    trained_heads = ("nlvr",)

    @classmethod
    def sample_processor(cls, config: NlvrConfig, data: DataConfig, question_prompt: str) -> SampleProcessor:
        return StatementProcessor(max_text_length=data.max_text_length)

    def forward(self, batch: StatementBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss nlvr: cross-entropy of true and false."""
        image_tokens = self.model.encode_pair(self.preprocessing.normalize(batch.pixels))  # (B, 2, N, D)
        statements = replace_first(batch.statements, self.tokenizer.enc_id)
        pair_kv = self.model.image_kv(image_tokens, "encode")
        logits = self.model.judge_logits(statements.ids, statements.mask, pair_kv)  # (B, 2)
        return {"nlvr": F.cross_entropy(logits.float(), batch.labels)}
