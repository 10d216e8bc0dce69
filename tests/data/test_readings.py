"""What each task reads of a sample, by hand; and fields of any other type than they should have."""

import io
import itertools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openblip.data.readings import (
    CaptionReading,
    DialogReading,
    Example,
    Gathered,
    QuestionReading,
    Reading,
    StatementReading,
    open_rounds,
    swap_sides,
)
from openblip.data.sample import Sample
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.errors import SourceError

WORDS = "what color is the dog yes no red blue how many left right one two three cats a picture of there are"
TOKENIZER = Tokenizer.train([WORDS, WORDS], 300)
SIZE = 4


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


LEFT, RIGHT = png(10), png(200)


def sample(captions: tuple[str, ...] = (), **info: Any) -> Sample:
    return Sample("k", "s", LEFT, captions, "source#1", info, RIGHT)


def view(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    return Preprocessing(image_size=SIZE)(image)


def read(reading: Reading, given: Sample, seed: int = 0) -> Example:
    return reading.read(given, view, np.random.default_rng(seed))


def collate(reading: Reading, examples: list[Example]) -> Any:
    pixels = torch.from_numpy(np.stack([example.pixels for example in examples]))
    names = [f"k{i}" for i in range(len(examples))]
    contents = [example.content for example in examples]
    return reading.collate(Gathered(pixels, contents, names, ["s"] * len(names)), TOKENIZER)


def levels(pixels: np.ndarray | torch.Tensor) -> list[int]:
    """Of the pictures in (P, 3, S, S), which are of one grey."""
    return [int(picture[0, 0, 0]) for picture in pixels]


def texts(tokens: Any) -> list[str]:
    return [TOKENIZER.decode(row) for row in tokens.ids]


def test_a_caption_is_drawn_among_those_that_say_something() -> None:
    given = sample(("A red dog!", "...", "Two cats."))
    drawn = Counter(read(CaptionReading(), given, seed).content[0] for seed in range(200))
    assert set(drawn) == {"a red dog", "two cats"}
    assert min(drawn.values()) > 70
    batch = collate(CaptionReading(max_text_length=4), [read(CaptionReading(), given)] * 2)
    assert batch.tokens.ids.shape == (2, 4)
    assert batch.pixels.shape == (2, 3, SIZE, SIZE)
    assert len(set(batch.image_ids.tolist())) == 1


def test_an_answers_weight_is_the_share_of_annotators_who_gave_it() -> None:
    answers = ["yes"] * 5 + ["Yes."] + ["no"] * 3 + ["red"]
    question, weighted = read(QuestionReading(), sample(question="Is the dog  red?", answers=answers)).content
    assert question == "is the dog red?"
    assert dict(weighted) == {
        "yes": pytest.approx(0.6),
        "no": pytest.approx(0.3),
        "red": pytest.approx(0.1),
    }


def test_the_weight_of_a_question_is_shared_by_its_answers() -> None:
    """Visual Genome's questions have one answer, and count 0.2."""
    genome = sample(question="what color?", answers=["red"], weight=0.2)
    assert read(QuestionReading(), genome).content[1] == [("red", pytest.approx(0.2))]
    several = sample(question="what color?", answers=["red", "red", "blue", "!!!"], weight=3)
    assert dict(read(QuestionReading(), several).content[1]) == {
        "red": pytest.approx(2.0),
        "blue": pytest.approx(1.0),
    }


def test_a_batch_of_questions_says_whose_answer_each_is() -> None:
    reading = QuestionReading(max_answer_tokens=4)
    questions = [
        sample(question="is the dog red?", answers=["yes", "no", "yes"]),
        sample(question="how many cats", answers=["one two three cats"], weight=0.2),
    ]
    batch = collate(reading, [read(reading, given) for given in questions])
    assert len(batch) == 2
    assert texts(batch.questions) == ["is the dog red?", "how many cats"]
    assert texts(batch.answers) == ["yes", "no", "one two"]  # the third is cut: four tokens, [CLS] and [SEP]
    assert batch.owners.tolist() == [0, 0, 1]
    assert batch.owners.dtype == torch.int64
    assert batch.weights.tolist() == pytest.approx([2 / 3, 1 / 3, 0.2])
    assert batch.weights.dtype == torch.float32


def test_two_pictures_change_sides_in_half_of_the_draws_and_so_do_the_words() -> None:
    given = sample(statement="The LEFT picture, right of one dog.", label=True)
    plain = ([10, 200], "the left picture, right of one dog")
    swapped = ([200, 10], "the right picture, left of one dog")
    drawn = [read(StatementReading(), given, seed) for seed in range(400)]
    found = [(levels(example.pixels), example.content[0]) for example in drawn]
    assert all(each in (plain, swapped) for each in found)
    assert 160 < found.count(swapped) < 240
    assert {example.content[1] for example in drawn} == {1}


def test_a_batch_of_statements() -> None:
    reading = StatementReading(max_text_length=5)
    statements = [sample(statement="there are two", label=True), sample(statement="a dog", label=False)]
    batch = collate(reading, [read(reading, given) for given in statements])
    assert batch.pixels.shape == (2, 2, 3, SIZE, SIZE)
    assert texts(batch.statements) == ["there are two", "a dog"]
    assert batch.labels.tolist() == [1, 0]
    assert batch.labels.dtype == torch.int64
    long = sample(statement=" ".join(["two"] * 60), label=True)
    assert len(read(reading, long).content[0].split()) == 40


@pytest.mark.parametrize(
    ("statement", "swapped"),
    [
        ("left of the right one", "right of the left one"),
        ("on the left, two; right-hand and leftmost", "on the right, two; left-hand and rightmost"),
        ("an upright bottle, copyright, lefty and bright", "an upright bottle, copyright, lefty and bright"),
        ("the left image's dog", "the right image's dog"),
    ],
)
def test_sides_are_exchanged_as_words(statement: str, swapped: str) -> None:
    assert swap_sides(statement) == swapped
    assert swap_sides(swapped) == statement


def turn(number: int, **changes: Any) -> dict[str, Any]:
    options = [f"answer {number}", "yes", "no", f"Answer {number}.", "red", "blue"]
    return {
        "question": f"Question {number}?",
        "answer": f"answer {number}",
        "options": options,
        "answer_index": 0,
    } | changes


def dialog(*rounds: dict[str, Any]) -> Sample:
    return sample(caption="A Picture.", dialog=list(rounds))


def test_a_round_is_drawn_with_the_rounds_before_it() -> None:
    reading = DialogReading(num_negatives=2, max_text_length=60)
    drawn = [read(reading, dialog(turn(0), turn(1), turn(2)), seed).content for seed in range(90)]
    assert {caption for caption, _ in drawn} == {"a picture"}
    counts: Counter[int] = Counter()
    for _, answers in drawn:
        right, *wrong = answers
        last = len(right) - 1
        counts[last] += 1
        assert right == [f"question {i}? answer {i}" for i in range(last + 1)]
        assert len(wrong) == 2
        assert all(turns[:last] == right[:last] for turns in wrong)
        endings = {turns[-1] for turns in wrong}
        assert len(endings) == 2  # drawn without repetition where there are enough
        assert endings < {f"question {last}? {text}" for text in ("yes", "no", "red", "blue")}
    assert min(counts[i] for i in range(3)) > 15


def test_a_wrong_answer_is_never_the_right_one_in_other_letters() -> None:
    reading = DialogReading(num_negatives=5, max_text_length=60)
    options = ["Yes.", "yes", "YES!", "yes ", "no"]
    given = dialog(turn(0, options=options, answer="yes", answer_index=1))
    for seed in range(20):
        right, *wrong = read(reading, given, seed).content[1]
        assert right == ["question 0? yes"]
        assert wrong == [["question 0? no"]] * 5  # there is but one


def test_rounds_without_a_known_answer_are_not_trained_on() -> None:
    reading = DialogReading(num_negatives=1, max_text_length=60)
    given = dialog(turn(0, options=[]), turn(1), turn(2, answer_index=None), turn(3, answer=None))
    lengths = {len(read(reading, given, seed).content[1][0]) for seed in range(60)}
    assert lengths == {2, 4}  # rounds 1 and 3: the last has no text of its answer, but its number
    with pytest.raises(SourceError, match="no round with options and their right one"):
        read(reading, dialog(turn(0, answer_index=None)))
    with pytest.raises(SourceError, match="round 0 has no wrong answer"):
        read(reading, dialog(turn(0, options=["yes", "Yes."], answer="yes")))


def test_a_batch_of_dialogs() -> None:
    reading = DialogReading(num_negatives=2, max_text_length=12)
    batch = collate(reading, [read(reading, dialog(turn(i)), i) for i in range(3)])
    assert len(batch) == 3
    assert texts(batch.captions) == ["a picture"] * 3
    assert batch.dialogs.ids.shape[0] == 9
    assert batch.dialogs.ids.shape[1] <= 12
    assert batch.labels.tolist() == [1, 0, 0] * 3
    decoded = texts(batch.dialogs)
    for i in range(3):
        right, *wrong = decoded[3 * i : 3 * i + 3]
        assert right.endswith(f"answer {i}")
        assert not any(text.endswith(f"answer {i}") for text in wrong)


def test_open_rounds_are_those_with_candidates_behind_answered_ones() -> None:
    found = open_rounds(dialog(turn(0), turn(1, options=None), turn(2, answer=None), turn(3)))
    assert [each.number for each in found] == [0, 2]  # nothing can follow round 2
    assert found[1].history == [("Question 0?", "answer 0"), ("Question 1?", "answer 1")]
    assert found[1].relevance is None
    assert open_rounds(dialog(turn(0, relevance=[0.5, 0, 1, 0, 0, 0])))[0].relevance == [0.5, 0, 1, 0, 0, 0]


HOSTILE: list[Any] = [
    None, True, False, 0, -1, 7, 2.5, math.nan, math.inf, -math.inf, 10**400, "", "  ", "!!!", "nan",
    "\ud800", "text", b"bytes", [], ["a"], ["a", "b"], [None], [1, 2], [[]], [math.nan] * 6, ["0.5"] * 6,
    [-1.0] * 6, [10**400] * 6, {}, {"a": 1}, {"question": "q"}, [{}], [{"question": None}],
    [{"question": "q", "options": 3}], (), object(),
]  # fmt: skip
READINGS: dict[str, tuple[Reading, Mapping[str, Any]]] = {
    "question": (QuestionReading(), {"question": "what", "answers": ["red", "blue"], "weight": 1.0}),
    "statement": (StatementReading(), {"statement": "a dog", "label": True}),
    "dialog": (
        DialogReading(num_negatives=2, max_text_length=40),
        {"caption": "a picture", "dialog": [turn(0, relevance=[0.0] * 6), turn(1)]},
    ),
}
ROUND = ("question", "answer", "options", "answer_index", "relevance")


def changed(info: Mapping[str, Any], place: str, value: Any) -> dict[str, Any]:
    """The same with one field replaced; "round.NAME" is one of the first round."""
    if not place.startswith("round."):
        return {**info, place: value}
    first, *others = info["dialog"]
    return {**info, "dialog": [{**first, place.removeprefix("round."): value}, *others]}


PLACES = [
    *[("question", name) for name in ("question", "answers", "weight")],
    *[("statement", name) for name in ("statement", "label")],
    *[("dialog", name) for name in ("caption", "dialog", *(f"round.{name}" for name in ROUND))],
]


@pytest.mark.parametrize(("kind", "place"), PLACES)
def test_a_field_of_a_wrong_type_is_a_source_error_or_does_no_harm(kind: str, place: str) -> None:
    reading, info = READINGS[kind]
    refused = 0
    for value, seed in itertools.product(HOSTILE, range(2)):
        try:
            example = read(reading, sample(**changed(info, place, value)), seed)
        except SourceError:
            refused += 1
            continue
        batch = collate(reading, [example, read(reading, sample(**info))])
        if kind == "question":
            assert torch.isfinite(batch.weights).all()
    assert refused >= 20


@pytest.mark.parametrize("kind", READINGS)
def test_a_missing_field_is_named(kind: str) -> None:
    reading, info = READINGS[kind]
    for name in info:
        if name == "weight":
            continue
        left = {key: value for key, value in info.items() if key != name}
        with pytest.raises(SourceError, match=f"no {name.removesuffix('s')}"):
            read(reading, sample(**left))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("weight", "heavy", "weight must be a number from 0 on, not 'heavy'"),
        ("weight", math.nan, "weight must be a number from 0 on, not nan"),
        ("answers", "red", "answers must be a list of strings, not 'red'"),
        ("label", "True", "label must be true or false, not 'True'"),
        ("round.answer_index", 6, "round 0 has 6 options and its answer is number 6"),
        ("round.answer_index", True, "round 0 has 6 options and its answer is number True"),
        ("round.relevance", [1.0], "relevance in round 0 must be 6 numbers"),
        ("round.relevance", 3, "relevance in round 0 must be 6 numbers"),
        ("round.options", "yes", "options of round 0 must be a list of strings"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(place: str, value: Any, message: str) -> None:
    kind = next(kind for kind, name in PLACES if name == place)
    reading, info = READINGS[kind]
    with pytest.raises(SourceError, match=message):
        read(reading, sample(**changed(info, place, value)))


def test_a_statement_needs_two_pictures() -> None:
    lonely = Sample("k", "s", LEFT, (), "source#1", {"statement": "a dog", "label": True})
    with pytest.raises(SourceError, match="no second picture"):
        read(StatementReading(), lonely)
