"""What BLIP-2's generative tasks take of a sample, by hand: prompts, answers with weights, turns."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openblip.data.batch import Example, SampleProcessor
from openblip.data.config import Preprocessing
from openblip.data.sample import Sample
from openblip.data.tokenizer import Tokenizer
from openblip.errors import SourceError
from openblip.tasks.language_model import (
    InstructionProcessor,
    PromptedBatch,
    PromptedCaptionProcessor,
    PromptedQuestionProcessor,
)

TOKENIZER = Tokenizer.train(["what color is the dog? how many cats are there? is it big? yes no"] * 2, 300)
ASKED = "Question: {} Answer:"
SIZE = 4


def sample(captions: tuple[str, ...] = (), **info: Any) -> Sample:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (9, 9, 9)).save(buffer, "PNG")
    return Sample("k", "s", buffer.getvalue(), captions, "source#1", info)


def process(processor: SampleProcessor, given: Sample, seed: int = 0) -> Example:
    def view(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        return Preprocessing(image_size=SIZE)(image)

    return processor(given, view, np.random.default_rng(seed))


def collate(processor: Any, examples: list[Example], tokenizer: Tokenizer | None = TOKENIZER) -> Any:
    return processor.collate(examples, tokenizer)


def test_captions_are_drawn_after_one_prompt() -> None:
    processor = PromptedCaptionProcessor(prompt="a photo of")
    given = sample(("A red dog.", "Two cats!"))
    texts = {process(processor, given, seed).content[0].text for seed in range(20)}
    assert texts == {"a red dog", "two cats"}
    batch = collate(processor, [process(processor, given), process(processor, given, 3)], None)
    assert isinstance(batch, PromptedBatch)
    assert batch.prompts == ["a photo of"] * 2
    with pytest.raises(SourceError, match="no caption"):
        process(processor, sample(("...",)))


def test_a_question_has_its_distinct_answers_by_their_shares() -> None:
    processor = PromptedQuestionProcessor(question_prompt=ASKED, instruction_tokens=None)
    first = sample(question="What color is the Dog?", answers=["red", "Red.", "blue", "red"])
    second = sample(question="How many {cats}?", answers=["two"], weight=0.2)
    batch = collate(processor, [process(processor, first), process(processor, second)], None)
    assert isinstance(batch, PromptedBatch)
    assert len(batch) == 2
    first_prompt = "Question: what color is the dog? Answer:"
    assert batch.prompts == [first_prompt, first_prompt, "Question: how many {cats}? Answer:"]
    assert batch.texts == ["red", "blue", "two"]
    assert batch.owners.tolist() == [0, 0, 1]
    assert batch.weights.tolist() == pytest.approx([0.75, 0.25, 0.2])
    assert batch.instructions is None


def test_the_qformer_reads_the_question_alone() -> None:
    processor = PromptedQuestionProcessor(question_prompt=ASKED, instruction_tokens=6)
    asked = [sample(question=q, answers=["yes", "no"]) for q in ("is it big?", "what color is the dog? " * 3)]
    batch = collate(processor, [process(processor, one) for one in asked])
    expected = TOKENIZER.encode(["is it big?"] * 2 + [asked[1].info["question"]] * 2, 6)
    assert torch.equal(batch.instructions.ids, expected.ids)
    assert torch.equal(batch.instructions.mask, expected.mask)
    assert batch.instructions.ids.shape[1] == 6
    assert batch.instructions.ids[:, 0].tolist() == [TOKENIZER.cls_id] * 4
    moved = batch.to("meta")
    assert {moved.instructions.ids.device.type, moved.owners.device.type} == {"meta"}


def test_every_turn_is_answered_behind_those_before_it() -> None:
    processor = InstructionProcessor(question_prompt=ASKED, instruction_tokens=8)
    turns = [
        {"question": "Is it BIG?", "answer": "Yes, it is."},
        {"question": "Why?", "answer": "no idea"},
        {"question": "Sure?", "answer": "yes"},
    ]
    batch = collate(processor, [process(processor, sample(turns=turns)), process(processor, sample(turns=turns[:1]))])
    assert batch.prompts == [
        "Question: Is it BIG? Answer:",
        "Question: Is it BIG? Answer: Yes, it is. Question: Why? Answer:",
        "Question: Is it BIG? Answer: Yes, it is. Question: Why? Answer: no idea. Question: Sure? Answer:",
        "Question: Is it BIG? Answer:",
    ]
    assert batch.texts == ["Yes, it is.", "no idea", "yes", "Yes, it is."]
    assert batch.owners.tolist() == [0, 0, 0, 1]
    assert batch.weights.tolist() == [1.0] * 4
    expected = TOKENIZER.encode(["Is it BIG?", "Why?", "Sure?", "Is it BIG?"], 8)
    assert batch.instructions.ids.shape == (4, 8)  # padded to one of a few lengths
    assert torch.equal(batch.instructions.ids[:, :6], expected.ids)
    assert not batch.instructions.mask[:, 6:].any()


def test_an_instruction_can_be_put_as_it_is() -> None:
    processor = InstructionProcessor(question_prompt="{}", instruction_tokens=None)
    content = process(processor, sample(instruction="Describe it.", output="A dog.")).content
    assert [(row.prompt, row.text) for row in content] == [("Describe it.", "A dog.")]


def test_a_question_among_instructions_has_one_of_its_answers() -> None:
    processor = InstructionProcessor(question_prompt=ASKED, instruction_tokens=None)
    asked = sample(question="Is it?", answers=["yes", "yes", "yes", "no"])
    drawn = [process(processor, asked, seed).content[0].text for seed in range(200)]
    assert drawn.count("yes") == pytest.approx(150, abs=25)
    with pytest.raises(SourceError, match="no answer"):
        process(processor, sample(question="Is it?", answers=[" "]))
    told = sample(question="Is it?", answers=["yes"], turns=[{"question": "Why?", "answer": "so"}])
    assert [row.text for row in process(processor, told).content] == ["so"]
