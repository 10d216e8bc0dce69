import json
from pathlib import Path

import pytest

from openblip.errors import ConfigError
from openblip.metrics.vqa import direct_answer_accuracy, normalise_answer, single_answer_accuracy, vqa_accuracy

OFFICIAL = json.loads((Path(__file__).parent / "vqa_official.json").read_text(encoding="utf-8"))
DOGS = ["dog"] * 3 + ["cat"] * 7


def test_normal_forms_are_the_official_ones() -> None:
    wrong = [
        (text, expected, normalise_answer(text))
        for text, expected in OFFICIAL["normal_forms"]
        if normalise_answer(text) != expected
    ]
    assert wrong == []


def test_scores_are_the_official_ones() -> None:
    predictions, answers, scores = zip(*OFFICIAL["questions"], strict=True)
    assert vqa_accuracy(predictions, answers) == pytest.approx(list(scores), abs=1e-8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Red, white & blue!", "red white & blue"),
        ("black-and-white", "black and white"),
        ("left-hand - side", "lefthand side"),  # one - stands beside a blank, so none becomes one
        ("1,000-2,000", "10002000"),
        ("1, 2-3", "1 2 3"),
        ("2.5 p.m.", "2.5 pm"),
        ("None of the two", "0 of 2"),
        ("dont, couldnt've lets", "don't couldn't've lets"),
        ("a", ""),
        ("." * 40, "." * 8),
    ],
)
def test_normalisation_by_hand(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


def test_accuracy_by_hand() -> None:
    # 3 of 10 said dog: each of them sees 2 others (2/3), the other seven see 3 (1).
    expected = [0.0, (3 * 2 / 3 + 7 * 1) / 10, 1.0]
    assert vqa_accuracy(["Dogs", "A dog.", "cat"], [DOGS] * 3) == pytest.approx(expected)
    # 1 of 10: the one sees none (0), nine see one (1/3).
    assert vqa_accuracy(["two"], [["2"] + ["3"] * 9]) == pytest.approx([9 * (1 / 3) / 10])


def test_nothing_is_normalised_where_annotators_agree() -> None:
    answers = [["yes"] * 10, ["yes"] * 9 + ["yes "], ["yes"] * 9 + ["no"]]
    assert vqa_accuracy(["Yes", " yes\n", "Yes"], answers) == [0.0, 1.0, 1.0]


def test_direct_answers_by_hand() -> None:
    answers = ["dog", "dog", "Dog", *["cat"] * 7]
    # Nobody is left out, and Dog is another answer.
    assert direct_answer_accuracy(["dog"], [answers]) == pytest.approx(2 / 3)
    assert direct_answer_accuracy(["cat", "Dog", "a dog"], [answers] * 3) == pytest.approx((1 + 1 / 3 + 0) / 3)


def test_single_answers_by_hand() -> None:
    predictions, answers = ["The man", "2", "guitar", ""], ["man", "two", "piano", "piano"]
    assert single_answer_accuracy(predictions, answers) == 0.5


@pytest.mark.parametrize("metric", [vqa_accuracy, direct_answer_accuracy])
@pytest.mark.parametrize(
    ("predictions", "answers", "message"),
    [
        ([], [], "0 predictions"),
        (["a"], [DOGS, DOGS], "1 predictions and 2 lists of answers"),
        (["a", "b"], [DOGS, []], "question 1 has no answers; leave it out"),
        ("a", [DOGS], "give a list of predictions"),
        (["a"], "a", "a list of answers for each"),
        (["a"], ["dog"], "a list of answers for each"),
        ([None], [DOGS], "question 0 needs"),
        (["a"], [["dog", 2]], "question 0 needs"),
    ],
)
def test_questions_that_cannot_be_scored_are_refused(
    metric: object, predictions: object, answers: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        metric(predictions, answers)  # type: ignore[operator]


def test_one_answer_is_not_left_out_of_one() -> None:
    with pytest.raises(ConfigError, match=r"question 0 has 1 answers.*single_answer_accuracy"):
        vqa_accuracy(["dog"], [["dog"]])


def test_single_answers_are_a_list_of_the_predictions_length() -> None:
    with pytest.raises(ConfigError, match="list of answers"):
        single_answer_accuracy(["d"], "d")
    with pytest.raises(ConfigError, match="2 predictions and 1 lists of answers"):
        single_answer_accuracy(["d", "e"], ["d"])
