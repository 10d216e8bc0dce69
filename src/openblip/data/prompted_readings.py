"""What BLIP-2's generative tasks read of a sample, as words: its language model has a tokenizer of its own.

B examples, R rows of text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from openblip.data.batch import PromptedBatch, TextBatch
from openblip.data.conversation import FORMS, Turn, conversation_prompt, turns_of
from openblip.data.media import Media, Picture, View
from openblip.data.readings import Example, Gathered, answers_of, asked, drawn_caption
from openblip.data.sample import Sample, clean_text
from openblip.data.tokenizer import Tokenizer
from openblip.errors import SourceError


@dataclass(frozen=True, kw_only=True)
class PromptedCaptionReading:
    """A picture or clip with one of its captions, drawn at random, after a prompt that all have in common."""

    media: Media = field(default_factory=Picture)
    prompt: str = ""

    def read(self, sample: Sample, view: View, rng: np.random.Generator) -> Example:
        caption = drawn_caption(sample, rng)
        return Example(self.media(sample, view, rng), caption)

    def collate(self, examples: Gathered, tokenizer: Tokenizer | None) -> TextBatch:
        return TextBatch(
            pixels=examples.pixels,
            keys=examples.keys,
            shards=examples.shards,
            prompts=[self.prompt] * len(examples.keys),
            texts=list(examples.contents),
        )


class PromptedText(NamedTuple):
    """A text that is to be written, and what is read before: by the Q-Former and by the language model."""

    instruction: str
    prompt: str
    text: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PromptedQuestionReading:
    """A question with its distinct answers, each weighted by the share of annotators who gave it."""

    media: Media = field(default_factory=Picture)
    question_prompt: str
    """How a question is put to the language model."""
    instruction_tokens: int | None
    """Tokens of a question that the Q-Former reads at most; None: it reads none."""

    def read(self, sample: Sample, view: View, rng: np.random.Generator) -> Example:
        question, weighted = asked(sample)
        prompt = conversation_prompt(self.question_prompt, (), question)
        rows = [PromptedText(question, prompt, answer, weight) for answer, weight in weighted]
        return Example(self.media(sample, view, rng), rows)

    def collate(self, examples: Gathered, tokenizer: Tokenizer | None) -> PromptedBatch:
        return prompted_batch(examples, tokenizer, self.instruction_tokens)


@dataclass(frozen=True, kw_only=True)
class InstructionReading:
    """Every turn of a conversation about a picture: its answer behind all that was said before.

    The Q-Former reads the turn's own instruction, the language model also the turns before it. A sample that
    has only a question is one turn, with one of its annotators' answers, drawn at random. Texts are read as
    they are written.
    """

    media: Media = field(default_factory=Picture)
    question_prompt: str
    """How an instruction is put to the language model; "{}" as it is."""
    instruction_tokens: int | None
    """Tokens of an instruction that the Q-Former reads at most; None: it reads none."""

    def read(self, sample: Sample, view: View, rng: np.random.Generator) -> Example:
        turns = drawn_turns(sample, rng)
        rows = [
            PromptedText(question, conversation_prompt(self.question_prompt, turns[:place], question), answer)
            for place, (question, answer) in enumerate(turns)
        ]
        return Example(self.media(sample, view, rng), rows)

    def collate(self, examples: Gathered, tokenizer: Tokenizer | None) -> PromptedBatch:
        return prompted_batch(examples, tokenizer, self.instruction_tokens)


def drawn_turns(sample: Sample, rng: np.random.Generator) -> list[Turn]:
    """The turns of a sample, or its question with one of its answers; `SourceError` without either."""
    question = sample.info.get("question")
    if not isinstance(question, str) or sample.info.keys() & FORMS:
        return turns_of(sample.info)
    answers = [text for answer in answers_of(sample) if (text := clean_text(answer))]
    if not answers:
        raise SourceError("no answer")
    return [Turn(clean_text(question), answers[int(rng.integers(len(answers)))])]


def prompted_batch(
    examples: Gathered, tokenizer: Tokenizer | None, instruction_tokens: int | None
) -> PromptedBatch:
    """The batch of B examples whose contents are rows of `PromptedText`."""
    contents: Sequence[Sequence[PromptedText]] = examples.contents
    rows = [row for own in contents for row in own]
    instructions = None
    if instruction_tokens is not None:
        assert tokenizer is not None  # of a Q-Former that reads instructions
        instructions = tokenizer.encode([row.instruction for row in rows], instruction_tokens)
    return PromptedBatch(
        pixels=examples.pixels,
        keys=examples.keys,
        shards=examples.shards,
        prompts=[row.prompt for row in rows],
        texts=[row.text for row in rows],
        instructions=instructions,
        owners=torch.tensor([i for i, own in enumerate(contents) for _ in own]),
        weights=torch.tensor([row.weight for row in rows]),
    )
