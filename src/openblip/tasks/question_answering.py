"""Visual question answering, on images and videos: a decoder writes the answers (BLIP 5.3 and 5.6).

B examples, A answers, T text tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openblip.data.batch import Batch, Example, SampleProcessor, pixel_reader, shared_fields
from openblip.data.config import DataConfig
from openblip.data.sample import Sample
from openblip.data.texts import question_with_answers
from openblip.data.tokenizer import BATCH_LENGTH_STEP, Tokenizer, Tokens
from openblip.objectives import answer_loss, next_token_labels
from openblip.tasks.base import BlipTask, replace_first
from openblip.tasks.config import QuestionAnsweringConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionBatch(Batch):
    """B questions with all their answers, A together."""

    questions: Tokens
    """(B, T): [CLS] ... [SEP]."""
    answers: Tokens
    """(A, T): [CLS] ... [SEP]."""
    owners: torch.Tensor
    """int64 (A,), ascending: the question that each answer belongs to."""
    weights: torch.Tensor
    """float32 (A,)."""


@dataclass(frozen=True, kw_only=True)
class QuestionProcessor(SampleProcessor):
    """A question with its distinct answers, each weighted by the share of annotators who gave it."""

    max_text_length: int = 35
    """Tokens of a question or answer, [CLS] and [SEP] included; more are cut."""

    def content(self, sample: Sample, rng: np.random.Generator) -> tuple[str, list[tuple[str, float]]]:
        return question_with_answers(sample)

    def collate(self, examples: Sequence[Example], tokenizer: Tokenizer) -> QuestionBatch:
        questions = [example.content[0] for example in examples]
        rows = [(i, *answer) for i, example in enumerate(examples) for answer in example.content[1]]
        owners, answers, weights = zip(*rows, strict=True)
        return QuestionBatch(
            **shared_fields(examples),
            questions=tokenizer.encode(questions, self.max_text_length, BATCH_LENGTH_STEP),
            answers=tokenizer.encode(answers, self.max_text_length, BATCH_LENGTH_STEP),
            owners=torch.tensor(owners),
            weights=torch.tensor(weights),
        )


class QuestionAnswering(BlipTask):
    """A BLIP whose decoder writes answers."""

    config: QuestionAnsweringConfig
    trained_heads = ("vqa",)

    @classmethod
    def sample_processor(cls, config: Any, data: DataConfig, question_prompt: str) -> SampleProcessor:
        return QuestionProcessor(read_pixels=pixel_reader(data.num_frames), max_text_length=data.max_text_length)

    def forward(self, batch: QuestionBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss vqa: every answer of a question counts by its weight."""
        image_kv = self.model.image_kv(self.encode(batch.pixels), "encode")
        questions = replace_first(batch.questions, self.tokenizer.enc_id)
        question_kv = self.model.question_kv(questions.ids, questions.mask, image_kv)
        answers = replace_first(batch.answers, self.tokenizer.dec_id)
        logits = self.model.decode(answers.ids[:, :-1], question_kv.select(batch.owners))  # (A, T - 1, V)
        labels = next_token_labels(answers.ids, answers.mask)
        return {"vqa": answer_loss(logits, labels, batch.weights, len(batch), self.config.label_smoothing)}
