"""Fine-tuning BLIP-2 on questions and instructions (BLIP-2 section 4.3; InstructBLIP section 2.2).

The language model writes answers after a prompt. Where the model is instructed, the Q-Former reads the question as
well, so that its queries extract what the question asks about.

B images, R rows of text, Q queries, T text tokens, D width of the Q-Former, Dl of the language model, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openblip.data.batch import Batch, Example, SampleProcessor, pixel_reader, shared_fields
from openblip.data.config import DataConfig, Preprocessing
from openblip.data.sample import Sample
from openblip.data.texts import conversation_prompt, draw_turns, question_with_answers
from openblip.data.tokenizer import BATCH_LENGTH_STEP, Tokenizer, Tokens
from openblip.models.blip2 import Blip2
from openblip.models.language_model import Predicted
from openblip.objectives.language_modeling import answer_loss, lm_loss
from openblip.tasks.base import Blip2Task


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptedBatch(Batch):
    """R texts after prompts, several about one of B images, for a language model, which has a tokenizer of its own."""

    prompts: list[str]
    """Read by the language model before the texts, and not predicted."""
    texts: list[str]
    instructions: Tokens | None
    """What the Q-Former reads beside its queries, (R, T): [CLS] ... [SEP]; None where it reads nothing."""
    owners: torch.Tensor
    """int64 (R,), ascending: the image that each text is about."""
    weights: torch.Tensor
    """float32 (R,)."""


class PromptedText(NamedTuple):
    """A text to be written, with what the Q-Former (`instruction`) and the language model (`prompt`) read."""

    instruction: str
    prompt: str
    text: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PromptedProcessor(SampleProcessor):
    """The base of both tasks' processors: the content of an example is a list of `PromptedText`."""

    question_prompt: str
    """How a question or instruction is put to the language model, with `{}` in its place."""
    instruction_tokens: int | None
    """Number of tokens of an instruction that the Q-Former reads at most; None: it reads none."""

    def collate(self, examples: Sequence[Example], tokenizer: Tokenizer | None) -> PromptedBatch:
        rows: list[PromptedText] = [row for example in examples for row in example.content]
        instructions = None
        if self.instruction_tokens is not None:
            assert tokenizer is not None  # a Q-Former that reads instructions has one
            texts = [row.instruction for row in rows]
            instructions = tokenizer.encode(texts, self.instruction_tokens, BATCH_LENGTH_STEP)
        return PromptedBatch(
            **shared_fields(examples),
            prompts=[row.prompt for row in rows],
            texts=[row.text for row in rows],
            instructions=instructions,
            owners=torch.tensor([i for i, example in enumerate(examples) for _ in example.content]),
            weights=torch.tensor([row.weight for row in rows]),
        )


@dataclass(frozen=True, kw_only=True)
class PromptedQuestionProcessor(PromptedProcessor):
    """A question with its distinct answers, each weighted by the share of annotators who gave it."""

    def content(self, sample: Sample, rng: np.random.Generator) -> list[PromptedText]:
        question, answers = question_with_answers(sample)
        prompt = conversation_prompt(self.question_prompt, (), question)
        return [PromptedText(question, prompt, answer, weight) for answer, weight in answers]


@dataclass(frozen=True, kw_only=True)
class InstructionProcessor(PromptedProcessor):
    """Every turn of a conversation about an image: its answer, after everything that was said before.

    The Q-Former reads the turn's own instruction, the language model also the turns before it. A sample that has only a
    question is one turn, with one of its annotators' answers, drawn at random. Texts are not normalised.
    """

    def content(self, sample: Sample, rng: np.random.Generator) -> list[PromptedText]:
        turns = draw_turns(sample, rng)
        return [
            PromptedText(question, conversation_prompt(self.question_prompt, turns[:number], question), answer)
            for number, (question, answer) in enumerate(turns)
        ]


class _PromptedTask(Blip2Task):
    """The predictions of texts after prompts, by the language model of a BLIP-2; its settings say `instructed`."""

    trained_heads = ("llm",)
    processor_class: ClassVar[type[PromptedProcessor]]

    def __init__(self, config: Any, model: Blip2, tokenizer: Any, preprocessing: Preprocessing) -> None:
        super().__init__(config, model, tokenizer, preprocessing)
        if model.config.instructed and set(model.config.heads) == {"llm"}:
            # Nothing reads the states of the instruction after the last layer, so these get no gradient.
            model.qformer.layers[-1].text_feed_forward.requires_grad_(False)

    @classmethod
    def sample_processor(cls, config: Any, data: DataConfig, question_prompt: str) -> SampleProcessor:
        return cls.processor_class(
            read_pixels=pixel_reader(data.num_frames),
            question_prompt=question_prompt,
            instruction_tokens=data.max_text_length if config.instructed else None,
        )

    def predict(self, batch: PromptedBatch) -> Predicted:
        """Logits (R, T, V) and labels (R, T) of a batch's texts; each image is encoded once."""
        image_kv = self.model.image_kv(self.encode(batch.pixels))
        if batch.instructions is None:
            visual = self.model.visual_prompts(self.model.encode_queries(image_kv).queries)  # (B, Q, Dl)
            return self.model.predict_text(visual[batch.owners], batch.prompts, batch.texts)
        ids, mask = batch.instructions.ids, batch.instructions.mask
        queries = self.model.encode_multimodal(ids, mask, image_kv.select(batch.owners))  # (R, Q, D)
        return self.model.predict_text(self.model.visual_prompts(queries), batch.prompts, batch.texts)


class PromptedAnswering(_PromptedTask):
    """Questions with all their answers, each of which counts by its weight."""

    processor_class = PromptedQuestionProcessor

    def forward(self, batch: PromptedBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss vqa, the same as BLIP's: the BLIP-2 paper does not define one."""
        logits, labels = self.predict(batch)
        return {"vqa": answer_loss(logits, labels, batch.weights, len(batch), label_smoothing=0.0)}


class InstructionFollowing(_PromptedTask):
    """Conversations, in which every token of every answer counts alike."""

    processor_class = InstructionProcessor

    def forward(self, batch: PromptedBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss lm: cross-entropy, the mean over all tokens of the answers."""
        logits, labels = self.predict(batch)
        return {"lm": lm_loss(logits, labels, label_smoothing=0.0)}
