"""What each task takes of a sample, by hand; and fields of any other type than they should have."""

import io
import itertools
import math
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openblip.data.batch import Example, ImageTextProcessor, SampleProcessor
from openblip.data.config import Augmentation, DataConfig, Preprocessing
from openblip.data.sample import Sample
from openblip.data.tokenizer import Tokenizer
from openblip.errors import ImageError, SourceError
from openblip.tasks.catalog import TASKS
from openblip.tasks.language_model import (
    InstructionProcessor,
    PromptedBatch,
    PromptedCaptionProcessor,
    PromptedQuestionProcessor,
    TextProcessor,
)
from openblip.tasks.nlvr import StatementProcessor, pair_pixels, swap_sides
from openblip.tasks.question_answering import QuestionProcessor
from openblip.tasks.visdial import DialogProcessor

WORDS = "what color is the dog? yes no red blue how many left right one two three cats a picture of there are it big"
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


def process(processor: SampleProcessor, given: Sample, seed: int = 0) -> Example:
    return processor(given, view, np.random.default_rng(seed))


def collate(processor: Any, examples: list[Example], tokenizer: Tokenizer | None = TOKENIZER) -> Any:
    return processor.collate(examples, tokenizer)


def levels(pixels: np.ndarray | torch.Tensor) -> list[int]:
    """Of the images in (P, 3, S, S), which are of one grey."""
    return [int(image[0, 0, 0]) for image in pixels]


def texts(tokens: Any) -> list[str]:
    return [TOKENIZER.decode(row) for row in tokens.ids]


def test_a_caption_is_drawn_among_those_that_say_something() -> None:
    given = sample(("A red dog!", "...", "Two cats."))
    drawn = Counter(process(ImageTextProcessor(), given, seed).content[0] for seed in range(200))
    assert set(drawn) == {"a red dog", "two cats"}
    assert min(drawn.values()) > 70
    batch = collate(ImageTextProcessor(max_text_length=4), [process(ImageTextProcessor(), given)] * 2)
    assert batch.tokens.ids.shape == (2, 4)
    assert batch.pixels.shape == (2, 3, SIZE, SIZE)
    assert len(set(batch.image_ids.tolist())) == 1


def test_an_answers_weight_is_the_share_of_annotators_who_gave_it() -> None:
    answers = ["yes"] * 5 + ["Yes."] + ["no"] * 3 + ["red"]
    question, weighted = process(QuestionProcessor(), sample(question="Is the dog  red?", answers=answers)).content
    assert question == "is the dog red?"
    assert dict(weighted) == {"yes": pytest.approx(0.6), "no": pytest.approx(0.3), "red": pytest.approx(0.1)}
    genome = sample(question="what color?", answers=["red"], weight=0.2)  # as all questions of Visual Genome
    assert process(QuestionProcessor(), genome).content[1] == [("red", pytest.approx(0.2))]
    several = sample(question="what color?", answers=["red", "red", "blue", "!!!"], weight=3)
    assert dict(process(QuestionProcessor(), several).content[1]) == {
        "red": pytest.approx(2.0),
        "blue": pytest.approx(1.0),
    }


def test_a_batch_of_questions_says_whose_answer_each_is() -> None:
    processor = QuestionProcessor(max_text_length=7)
    questions = [
        sample(question="is the dog red?", answers=["yes", "no", "yes"]),
        sample(question="how many cats", answers=["one two three cats on dogs"], weight=0.2),
    ]
    batch = collate(processor, [process(processor, given) for given in questions])
    assert len(batch) == 2
    assert texts(batch.questions) == ["is the dog red?", "how many cats"]
    assert texts(batch.answers) == ["yes", "no", "one two three cats on"]  # cut: seven tokens with [CLS] and [SEP]
    assert (batch.owners.tolist(), batch.owners.dtype) == ([0, 0, 1], torch.int64)
    assert batch.weights.tolist() == pytest.approx([2 / 3, 1 / 3, 0.2])
    assert batch.weights.dtype == torch.float32


def test_two_images_change_sides_in_half_of_the_draws_and_so_do_the_words() -> None:
    given = sample(statement="The LEFT picture, right of one dog.", label=True)
    plain = ([10, 200], "the left picture, right of one dog")
    swapped = ([200, 10], "the right picture, left of one dog")
    drawn = [process(StatementProcessor(), given, seed) for seed in range(400)]
    found = [(levels(example.pixels), example.content[0]) for example in drawn]
    assert all(each in (plain, swapped) for each in found)
    assert 160 < found.count(swapped) < 240
    assert {example.content[1] for example in drawn} == {1}


def test_a_batch_of_statements() -> None:
    processor = StatementProcessor(max_text_length=5)
    statements = [sample(statement="there are two", label=True), sample(statement="a dog", label=False)]
    batch = collate(processor, [process(processor, given) for given in statements])
    assert batch.pixels.shape == (2, 2, 3, SIZE, SIZE)
    assert texts(batch.statements) == ["there are two", "a dog"]
    assert (batch.labels.tolist(), batch.labels.dtype) == ([1, 0], torch.int64)
    long = sample(statement=" ".join(["two"] * 60), label=True)
    assert len(process(processor, long).content[0].split()) == 60, "tokens are limited, and no words"


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
    known = {"question": f"Question {number}?", "answer": f"answer {number}", "options": options, "answer_index": 0}
    return known | changes


def dialog(*rounds: dict[str, Any]) -> Sample:
    return sample(caption="A Picture.", dialog=list(rounds))


def test_a_round_is_drawn_with_the_rounds_before_it() -> None:
    processor = DialogProcessor(num_negatives=2, max_text_length=60)
    drawn = [process(processor, dialog(turn(0), turn(1), turn(2)), seed).content for seed in range(90)]
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
    processor = DialogProcessor(num_negatives=5, max_text_length=60)
    options = ["Yes.", "yes", "YES!", "yes ", "no"]
    given = dialog(turn(0, options=options, answer="yes", answer_index=1))
    for seed in range(20):
        right, *wrong = process(processor, given, seed).content[1]
        assert right == ["question 0? yes"]
        assert wrong == [["question 0? no"]] * 5  # there is but one


def test_rounds_without_a_known_answer_are_not_trained_on() -> None:
    processor = DialogProcessor(num_negatives=1, max_text_length=60)
    given = dialog(turn(0, options=[]), turn(1), turn(2, answer_index=None), turn(3, answer=None))
    lengths = {len(process(processor, given, seed).content[1][0]) for seed in range(60)}
    assert lengths == {2, 4}  # rounds 1 and 3: the last has no text of its answer, but its number
    with pytest.raises(SourceError, match="no round with options and their right one"):
        process(processor, dialog(turn(0, answer_index=None)))
    with pytest.raises(SourceError, match="round 0 has no wrong answer"):
        process(processor, dialog(turn(0, options=["yes", "Yes."], answer="yes")))


def test_a_batch_of_dialogs() -> None:
    processor = DialogProcessor(num_negatives=2, max_text_length=12)
    batch = collate(processor, [process(processor, dialog(turn(i)), i) for i in range(3)])
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


HOSTILE: list[Any] = [
    None, True, False, 0, -1, 7, 2.5, math.nan, math.inf, -math.inf, 10**400, "", "  ", "!!!", "nan",
    "\ud800", "text", b"bytes", [], ["a"], ["a", "b"], [None], [1, 2], [[]], [math.nan] * 6, ["0.5"] * 6,
    [-1.0] * 6, [10**400] * 6, {}, {"a": 1}, {"question": "q"}, [{}], [{"question": None}],
    [{"question": "q", "options": 3}], (), object(),
]  # fmt: skip
PROCESSORS: dict[str, tuple[SampleProcessor, Mapping[str, Any]]] = {
    "question": (QuestionProcessor(), {"question": "what", "answers": ["red", "blue"], "weight": 1.0}),
    "statement": (StatementProcessor(), {"statement": "a dog", "label": True}),
    "dialog": (
        DialogProcessor(num_negatives=2, max_text_length=40),
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
    processor, info = PROCESSORS[kind]
    refused = 0
    for value, seed in itertools.product(HOSTILE, range(2)):
        try:
            example = process(processor, sample(**changed(info, place, value)), seed)
        except SourceError:
            refused += 1
            continue
        batch = collate(processor, [example, process(processor, sample(**info))])
        if kind == "question":
            assert torch.isfinite(batch.weights).all()
    assert refused >= 20


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_missing_field_is_named(kind: str) -> None:
    processor, info = PROCESSORS[kind]
    for name in info.keys() - {"weight"}:
        left = {key: value for key, value in info.items() if key != name}
        with pytest.raises(SourceError, match=f"no {name.removesuffix('s')}"):
            process(processor, sample(**left))


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
    processor, info = PROCESSORS[kind]
    with pytest.raises(SourceError, match=message):
        process(processor, sample(**changed(info, place, value)))


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def random_view(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    return Augmentation(num_ops=0)(image, rng, 16)


def test_each_image_of_a_pair_has_a_view_of_its_own() -> None:
    assert levels(pair_pixels(sample(), view, rng())) == [10, 200]  # the left and the right one
    buffer = io.BytesIO()
    Image.fromarray(rng().integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
    twice = Sample("k", "s", buffer.getvalue(), (), "source#1", {}, buffer.getvalue())
    pixels = pair_pixels(twice, random_view, rng())
    assert not np.array_equal(pixels[0], pixels[1])
    assert np.array_equal(pixels, pair_pixels(twice, random_view, rng()))


@pytest.mark.parametrize(("side", "images"), [("left", (b"x", png(1))), ("right", (png(1), b"x"))])
def test_the_damaged_image_of_a_pair_is_named(side: str, images: tuple[bytes, bytes]) -> None:
    with pytest.raises(ImageError, match=rf"s/k \({side}\)"):
        pair_pixels(Sample("k", "s", images[0], (), "source#1", {}, images[1]), view, rng())
    with pytest.raises(SourceError, match="no second image"):
        process(StatementProcessor(), Sample("k", "s", LEFT, (), "source#1", {"statement": "a dog", "label": True}))


TEXT = "A small Dog.\nQuestion: what is it?  Answer: dog"


def no_view(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    raise AssertionError("an image was decoded")


@pytest.mark.parametrize("info", [{}, {"text": ""}, {"text": 7}])
def test_a_text_is_given_as_it_is_and_no_image_is_decoded(info: dict[str, Any]) -> None:
    examples = [TextProcessor()(sample(text=text), no_view, rng()) for text in (TEXT, "b")]
    batch = TextProcessor().collate(examples, None)
    assert batch.pixels.shape == (2, 0)
    assert batch.texts == [TEXT, "b"]
    assert batch.prompts == ["", ""]
    assert (batch.keys, batch.shards) == (["k", "k"], ["s", "s"])
    with pytest.raises(SourceError, match="no text"):
        TextProcessor()(sample(**info), no_view, rng())


@pytest.mark.slow
def test_processors_unpickle_in_spawned_workers_without_transformers() -> None:
    """A worker that is spawned imports no more than it needs: transformers alone takes seconds."""
    data = DataConfig(source="", num_frames=2)
    processors = [task.sample_processor(config(), data, question_prompt="{}") for config, task in TASKS.items()]
    code = (
        "import pickle, sys\n"
        "processors = pickle.load(sys.stdin.buffer)\n"
        "assert 'transformers' not in sys.modules\n"
        "print(pickle.dumps(processors).hex())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(processors), capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr.decode()
    assert repr(pickle.loads(bytes.fromhex(result.stdout.decode()))) == repr(processors)


# --- Prompts for a language model

ASKED = "Question: {} Answer:"


def test_captions_are_drawn_after_one_prompt() -> None:
    processor = PromptedCaptionProcessor(prompt="a photo of")
    given = sample(("A red dog.", "Two cats!"))
    texts = {process(processor, given, seed).content[0].text for seed in range(20)}
    assert texts == {"A red dog.", "Two cats!"}, "a language model reads texts as they are written"
    batch = collate(processor, [process(processor, given), process(processor, given, 3)], None)
    assert isinstance(batch, PromptedBatch)
    assert batch.prompts == ["a photo of"] * 2
    with pytest.raises(SourceError, match="no caption"):
        process(processor, sample(("...",)))


def test_a_question_has_its_distinct_answers_by_their_shares() -> None:
    processor = PromptedQuestionProcessor(question_prompt=ASKED, instruction_tokens=None)
    first = sample(question="What color is the Dog?", answers=["Red", "red.", "blue", "red"])
    second = sample(question="How many {cats}?", answers=["two"], weight=0.2)
    batch = collate(processor, [process(processor, first), process(processor, second)], None)
    assert isinstance(batch, PromptedBatch)
    assert len(batch) == 2
    assert batch.prompts == ["Question: What color is the Dog? Answer:"] * 2 + ["Question: How many {cats}? Answer:"]
    assert batch.texts == ["Red", "blue", "two"]
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


def test_a_question_among_instructions_has_one_of_its_answers() -> None:
    as_it_is = InstructionProcessor(question_prompt="{}", instruction_tokens=None)
    content = process(as_it_is, sample(instruction="Describe it.", output="A dog.")).content
    assert [(row.prompt, row.text) for row in content] == [("Describe it.", "A dog.")]
    processor = InstructionProcessor(question_prompt=ASKED, instruction_tokens=None)
    asked = sample(question="Is it?", answers=["yes", "yes", "yes", "no"])
    drawn = [process(processor, asked, seed).content[0].text for seed in range(200)]
    assert drawn.count("yes") == pytest.approx(150, abs=25)
    with pytest.raises(SourceError, match="no answer"):
        process(processor, sample(question="Is it?", answers=[" "]))
    told = sample(question="Is it?", answers=["yes"], turns=[{"question": "Why?", "answer": "so"}])
    assert [row.text for row in process(processor, told).content] == ["so"]
