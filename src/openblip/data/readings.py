"""What a task reads of a sample, and how examples become a batch: one class for each kind of batch.

`read` runs in the loader's workers and returns something small beside the pixels; `collate` runs in the
training process, where the tokenizer is. Whatever is drawn comes from the generator of the sample, so it does
not depend on who reads it.

Shapes: B examples, F frames, S image size.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from openblip.data.batch import (
    Batch,
    DialogBatch,
    PromptedBatch,
    QuestionBatch,
    StatementBatch,
    TextBatch,
    hash_image_id,
)
from openblip.data.dialogs import MAX_CAPTION_TOKENS, dialog_turns, open_rounds
from openblip.data.media import Media, Pair, Picture, View
from openblip.data.sample import Sample, is_weight
from openblip.data.tokenizer import Tokenizer, normalize_caption, normalize_question
from openblip.errors import SourceError

MAX_QUESTION_TOKENS = 35  # released code
MAX_STATEMENT_WORDS = 40  # released code
_SIDE = re.compile(r"\b(?:left|right)(?=(?:most|hand)?\b)")

AnyBatch = Batch | QuestionBatch | StatementBatch | DialogBatch | TextBatch | PromptedBatch


class Example(NamedTuple):
    """One sample as a task reads it: uint8 (3, S, S) or (F, 3, S, S), or cached features (N, Dv), and what
    belongs to it."""

    pixels: np.ndarray
    content: Any


class Gathered(NamedTuple):
    """B examples by their places; pixels uint8 (B, ...), or cached features (B, N, Dv)."""

    pixels: torch.Tensor
    contents: Sequence[Any]
    keys: list[str]
    shards: list[str]


class Reading(Protocol):
    """How samples become examples, and examples a batch."""

    def read(self, sample: Sample, view: View, rng: np.random.Generator) -> Example:
        """Raises `SourceError` for a sample without what the task needs, `ImageError` for its picture."""
        ...

    def collate(self, examples: Gathered, tokenizer: Tokenizer) -> AnyBatch: ...


@dataclass(frozen=True, kw_only=True)
class CaptionReading:
    """A picture or clip with one of its captions, drawn at random."""

    media: Media = field(default_factory=Picture)
    max_text_length: int = 30

    def read(self, sample: Sample, view: View, rng: np.random.Generator) -> Example:
        caption = drawn_caption(sample, rng)
        return Example(self.media(sample, view, rng), (caption, hash_image_id(sample.image_id)))

    def collate(self, examples: Gathered, tokenizer: Tokenizer) -> Batch:
        captions = [caption for caption, _ in examples.contents]
        return Batch(
            pixels=examples.pixels,
            keys=examples.keys,
            shards=examples.shards,
            tokens=tokenizer.encode(captions, self.max_text_length),
            captions=captions,
            image_ids=torch.tensor([image_id for _, image_id in examples.contents], dtype=torch.long),
        )


@dataclass(frozen=True, kw_only=True)
class QuestionReading:
    """A question with its distinct answers, each weighted by the share of annotators who gave it."""

    media: Media = field(default_factory=Picture)
    max_answer_tokens: int = 20

    def read(self, sample: Sample, view: View, rng: np.random.Generator) -> Example:
        return Example(self.media(sample, view, rng), asked(sample))

    def collate(self, examples: Gathered, tokenizer: Tokenizer) -> QuestionBatch:
        flat = [(i, *pair) for i, (_, weighted) in enumerate(examples.contents) for pair in weighted]
        owners, answers, weights = zip(*flat, strict=True)
        return QuestionBatch(
            pixels=examples.pixels,
            keys=examples.keys,
            shards=examples.shards,
            questions=tokenizer.encode([question for question, _ in examples.contents], MAX_QUESTION_TOKENS),
            answers=tokenizer.encode(answers, self.max_answer_tokens),
            owners=torch.tensor(owners),
            weights=torch.tensor(weights),
        )


@dataclass(frozen=True, kw_only=True)
class StatementReading:
    """A statement about two pictures; every other time they change sides, and so do the words left and right.

    As the released code's augmentation for NLVR2.
    """

    max_text_length: int = 40

    def read(self, sample: Sample, view: View, rng: np.random.Generator) -> Example:
        statement = normalize_caption(text_field(sample, "statement"), MAX_STATEMENT_WORDS)
        label = label_of(sample)
        if label is None:
            raise SourceError("no label that is true or false")
        swapped = rng.random() < 0.5
        pixels = Pair()(sample, view, rng)  # (2, 3, S, S)
        if swapped:
            return Example(pixels[::-1].copy(), (swap_sides(statement), int(label)))
        return Example(pixels, (statement, int(label)))

    def collate(self, examples: Gathered, tokenizer: Tokenizer) -> StatementBatch:
        return StatementBatch(
            pixels=examples.pixels,
            keys=examples.keys,
            shards=examples.shards,
            statements=tokenizer.encode([text for text, _ in examples.contents], self.max_text_length),
            labels=torch.tensor([label for _, label in examples.contents]),
        )


@dataclass(frozen=True, kw_only=True)
class DialogReading:
    """One round of a dialog, drawn at random, with its answer and wrong ones out of its candidates."""

    num_negatives: int
    max_text_length: int

    def read(self, sample: Sample, view: View, rng: np.random.Generator) -> Example:
        rounds = [(turn, turn.answer) for turn in open_rounds(sample) if turn.answer is not None]
        if not rounds:
            raise SourceError("no round with options and their right one")
        asked, right = rounds[int(rng.integers(len(rounds)))]
        same = normalize_question(right)  # candidates of VisDial differ by a period alone
        wrong = [text for text in asked.options if normalize_question(text) != same]
        if not wrong:
            raise SourceError(f"round {asked.number} has no wrong answer among its options")
        drawn = rng.choice(len(wrong), self.num_negatives, replace=len(wrong) < self.num_negatives)
        answers = [right, *(wrong[i] for i in drawn)]
        turns = [dialog_turns(asked.history, asked.question, answer) for answer in answers]
        caption = normalize_caption(text_field(sample, "caption"))
        return Example(Picture()(sample, view, rng), (caption, turns))

    def collate(self, examples: Gathered, tokenizer: Tokenizer) -> DialogBatch:
        dialogs = [turns for _, several in examples.contents for turns in several]
        labels = torch.tensor([1] + [0] * self.num_negatives)
        return DialogBatch(
            pixels=examples.pixels,
            keys=examples.keys,
            shards=examples.shards,
            captions=tokenizer.encode([caption for caption, _ in examples.contents], MAX_CAPTION_TOKENS),
            dialogs=tokenizer.encode_turns(dialogs, self.max_text_length),
            labels=labels.repeat(len(examples.keys)),
        )


def drawn_caption(sample: Sample, rng: np.random.Generator) -> str:
    """One of a sample's captions at random, normalised; `SourceError` when it has none."""
    captions = [text for caption in sample.captions if (text := normalize_caption(caption))]
    if not captions:
        raise SourceError("no caption")
    return captions[int(rng.integers(len(captions)))]


def asked(sample: Sample) -> tuple[str, list[tuple[str, float]]]:
    """A sample's question and its distinct answers, each with the share of annotators who gave it.

    Normalised, as the released code: the weights of a question sum to 1, those of Visual Genome's to 0.2.
    Raises `SourceError` for a sample without a question or answer.
    """
    question = normalize_question(text_field(sample, "question"))
    answers = Counter(filter(None, map(normalize_question, answers_of(sample))))
    if not question or not answers:
        raise SourceError("no question" if not question else "no answer")
    share = weight_of(sample) / answers.total()
    return question, [(answer, count * share) for answer, count in answers.items()]


def text_field(sample: Sample, name: str) -> str:
    """A text of the sample's json; `SourceError` when there is none."""
    value = sample.info.get(name)
    if not isinstance(value, str) or not value.strip():
        raise SourceError(f"no {name}")
    return value


def answers_of(sample: Sample) -> list[str]:
    """What every annotator answered; empty where nobody did. `SourceError` for anything but texts."""
    answers = sample.info.get("answers", [])
    if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
        raise SourceError(f"the answers must be a list of strings, not {answers!r:.80}")
    return list(answers)


def weight_of(sample: Sample) -> float:
    """How much a question counts in training; `SourceError` for anything but a number from 0 on."""
    weight = sample.info.get("weight", 1.0)
    if not is_weight(weight):
        raise SourceError(f"the weight must be a number from 0 on, not {weight!r:.80}")
    return float(weight)


def label_of(sample: Sample) -> bool | None:
    """Whether a statement is true, None where nobody says; `SourceError` for anything but true and false."""
    label = sample.info.get("label")
    if label is not None and not isinstance(label, bool):
        raise SourceError(f"the label must be true or false, not {label!r:.80}")
    return label


def swap_sides(statement: str) -> str:
    """The same text with left and right exchanged, also in rightmost, left-hand and before a comma.

    The released code passes over these, and so trains on a statement about the other picture.
    """
    other = {"left": "right", "right": "left"}
    return _SIDE.sub(lambda side: other[side[0]], statement)
