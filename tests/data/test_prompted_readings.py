"""What BLIP-2's generative tasks read of a sample, by hand: prompts, answers with weights, turns."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openblip.data.batch import PromptedBatch, TextBatch
from openblip.data.conversation import Turn, conversation_prompt, turns_of
from openblip.data.prompted_readings import (
    InstructionReading,
    PromptedCaptionReading,
    PromptedQuestionReading,
)
from openblip.data.readings import Example, Gathered, Reading
from openblip.data.sample import Sample
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.errors import SourceError

TOKENIZER = Tokenizer.train(["what color is the dog? how many cats are there? is it big? yes no"] * 2, 300)
ASKED = "Question: {} Answer:"
SIZE = 4


def sample(captions: tuple[str, ...] = (), **info: Any) -> Sample:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (9, 9, 9)).save(buffer, "PNG")
    return Sample("k", "s", buffer.getvalue(), captions, "source#1", info)


def read(reading: Reading, given: Sample, seed: int = 0) -> Example:
    def view(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        return Preprocessing(image_size=SIZE)(image)

    return reading.read(given, view, np.random.default_rng(seed))


def collate(reading: Any, examples: list[Example], tokenizer: Tokenizer | None = TOKENIZER) -> Any:
    pixels = torch.from_numpy(np.stack([example.pixels for example in examples]))
    names = [f"k{i}" for i in range(len(examples))]
    contents = [example.content for example in examples]
    return reading.collate(Gathered(pixels, contents, names, ["s"] * len(examples)), tokenizer)


def test_captions_are_drawn_after_one_prompt() -> None:
    reading = PromptedCaptionReading(prompt="a photo of")
    given = sample(("A red dog.", "Two cats!"))
    texts = {read(reading, given, seed).content for seed in range(20)}
    assert texts == {"a red dog", "two cats"}
    batch = collate(reading, [read(reading, given), read(reading, given, 3)], None)
    assert isinstance(batch, TextBatch)
    assert batch.prompts == ["a photo of"] * 2
    with pytest.raises(SourceError, match="no caption"):
        read(reading, sample(("...",)))


def test_a_question_has_its_distinct_answers_by_their_shares() -> None:
    reading = PromptedQuestionReading(question_prompt=ASKED, instruction_tokens=None)
    first = sample(question="What color is the Dog?", answers=["red", "Red.", "blue", "red"])
    second = sample(question="How many {cats}?", answers=["two"], weight=0.2)
    batch = collate(reading, [read(reading, first), read(reading, second)], None)
    assert isinstance(batch, PromptedBatch)
    assert len(batch) == 2
    first_prompt = "Question: what color is the dog? Answer:"
    assert batch.prompts == [first_prompt, first_prompt, "Question: how many {cats}? Answer:"]
    assert batch.texts == ["red", "blue", "two"]
    assert batch.owners.tolist() == [0, 0, 1]
    assert batch.weights.tolist() == pytest.approx([0.75, 0.25, 0.2])
    assert batch.instructions is None


def test_the_qformer_reads_the_question_alone() -> None:
    reading = PromptedQuestionReading(question_prompt=ASKED, instruction_tokens=6)
    asked = [sample(question=q, answers=["yes", "no"]) for q in ("is it big?", "what color is the dog? " * 3)]
    batch = collate(reading, [read(reading, one) for one in asked])
    expected = TOKENIZER.encode(["is it big?"] * 2 + [asked[1].info["question"]] * 2, 6)
    assert torch.equal(batch.instructions.ids, expected.ids)
    assert torch.equal(batch.instructions.mask, expected.mask)
    assert batch.instructions.ids.shape[1] == 6
    assert batch.instructions.ids[:, 0].tolist() == [TOKENIZER.cls_id] * 4
    moved = batch.to("meta")
    assert {moved.instructions.ids.device.type, moved.owners.device.type} == {"meta"}


def test_every_turn_is_answered_behind_those_before_it() -> None:
    reading = InstructionReading(question_prompt=ASKED, instruction_tokens=8)
    turns = [
        {"question": "Is it BIG?", "answer": "Yes, it is."},
        {"question": "Why?", "answer": "no idea"},
        {"question": "Sure?", "answer": "yes"},
    ]
    batch = collate(reading, [read(reading, sample(turns=turns)), read(reading, sample(turns=turns[:1]))])
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
    assert torch.equal(batch.instructions.ids, expected.ids)


def test_an_instruction_can_be_put_as_it_is() -> None:
    reading = InstructionReading(question_prompt="{}", instruction_tokens=None)
    content = read(reading, sample(instruction="Describe it.", output="A dog.")).content
    assert [(row.prompt, row.text) for row in content] == [("Describe it.", "A dog.")]


def test_a_question_among_instructions_has_one_of_its_answers() -> None:
    reading = InstructionReading(question_prompt=ASKED, instruction_tokens=None)
    asked = sample(question="Is it?", answers=["yes", "yes", "yes", "no"])
    drawn = [read(reading, asked, seed).content[0].text for seed in range(200)]
    assert drawn.count("yes") == pytest.approx(150, abs=25)
    with pytest.raises(SourceError, match="no answer"):
        read(reading, sample(question="Is it?", answers=[" "]))
    told = sample(question="Is it?", answers=["yes"], turns=[{"question": "Why?", "answer": "so"}])
    assert [row.text for row in read(reading, told).content] == ["so"]


@pytest.mark.parametrize(
    ("info", "turns"),
    [
        ({"instruction": "Do", "answer": "Done"}, [("Do", "Done")]),
        ({"instruction": "Do", "input": "this", "output": "Done"}, [("Do\nthis", "Done")]),
        (
            {"dialog": [{"question": "a?", "answer": "b", "options": ["b"]}, {"question": "c?"}]},
            [("a?", "b")],
        ),
        (
            {
                "turns": [
                    {"question": "a?", "answer": "b"},
                    {"question": "c"},
                    {"question": "d", "answer": "e"},
                ]
            },
            [("a?", "b")],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a?\n<image>"},
                    {"from": "gpt", "value": "b"},
                    {"from": "human", "value": "c?"},
                ]
            },
            [("a?", "b")],
        ),
    ],
)
def test_forms_of_turns(info: Mapping[str, Any], turns: list[tuple[str, str]]) -> None:
    assert turns_of(info) == [Turn(*turn) for turn in turns]


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({}, "no instruction, turns, dialog or conversations"),
        ({"instruction": "Do"}, "the answer must be a text"),
        ({"instruction": 5, "answer": "x"}, "the instruction must be a text"),
        ({"turns": "a"}, "turns must be a list of objects"),
        ({"turns": [{"question": "a?"}]}, "no answer in turns"),
        ({"turns": [{"question": "a?", "answer": 3}]}, "the answer must be a text"),
        ({"conversations": {"from": "human"}}, "conversations must be a list of objects"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "no answer in conversations"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "message 0 .* from 'gpt', not human"),
        (
            {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]},
            "value of a message must be a text",
        ),
    ],
)
def test_what_is_no_conversation_is_named(info: Mapping[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        turns_of(info)


def test_prompts_of_other_models() -> None:
    assert conversation_prompt("Question: {} Short answer:", [], "why?") == "Question: why? Short answer:"
    assert conversation_prompt("{}", [("Who?", "He!"), ("Me?", "no")], "Why?") == "Who? He! Me? no. Why?"
