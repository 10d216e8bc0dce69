"""Answers measured against accuracies worked out by hand."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from listed_source import ListSource, Numbered, NumberEncoder, sample
from openblip.data.sample import Sample
from openblip.evaluation.question_answering import ANSWER_DECODING, evaluate_question_answering
from openblip.generation.decoding import Beam


@dataclass
class Answerer(NumberEncoder):
    """Writes an answer for each image; of choices it takes the one that it is told to."""

    written: list[str]
    chosen: dict[int, str] = field(default_factory=dict)
    calls: list[tuple[list[int], Any, Any]] = field(default_factory=list)

    def answer(
        self, images: Numbered, questions: Any, candidates: Any = None, *, decoding: Any, batch_size: int | None
    ) -> list[str]:
        shown = images.numbers.tolist()
        assert len(shown) == len(questions)
        self.calls.append((shown, candidates, decoding))
        if candidates is not None and not isinstance(candidates[0], str):
            assert all(self.chosen[n] in own for n, own in zip(shown, candidates, strict=True))
            return [self.chosen[number] for number in shown]
        return [self.written[number] for number in shown]


def asked(number: int, answers: list[str] | None = None, **info: Any) -> Sample:
    given = {} if answers is None else {"answers": answers}
    return sample(number, question=f"Question {number}?", question_id=900 + number, **given, **info)


TEN = ["yes"] * 3 + ["no"] * 7


def test_several_annotators_are_scored_officially() -> None:
    """Three of ten said yes: the nine others than one of those three hold two, the rest three."""
    source = ListSource([asked(0, TEN), asked(1, TEN), asked(2, ["two dogs"] * 10)])
    scores = evaluate_question_answering(Answerer(["yes", "no", "2 dogs"]), source)
    by_hand = (3 * (2 / 3) + 7 * 1) / 10
    assert scores["vqa_accuracy"] == pytest.approx((by_hand + 1 + 0) / 3)  # all alike: compared as written
    assert scores["num_questions"] == 3
    assert "by_type" not in scores
    assert "accuracy" not in scores


def test_types_of_questions_are_scored_apart() -> None:
    source = ListSource(
        [
            asked(0, TEN, answer_type="yes/no"),
            asked(1, TEN, answer_type="yes/no"),
            asked(2, ["2"] * 10, question_kind="count"),
            asked(3, ["red"] * 10),
        ]
    )
    scores = evaluate_question_answering(Answerer(["no", "maybe", "2", "red"]), source)
    assert scores["by_type"] == {"yes/no": pytest.approx(0.5), "count": 1.0, "other": 1.0}


def test_a_single_answer_is_right_or_wrong() -> None:
    """MSRVTT-QA, MSVD-QA."""
    source = ListSource([asked(0, ["dog"]), asked(1, ["cat"]), asked(2, ["a bird"])])
    scores = evaluate_question_answering(Answerer(["dog", "cow", "the bird"]), source)
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert "vqa_accuracy" not in scores


def test_offered_choices_are_scored_as_a_okvqas() -> None:
    """Direct answers over all annotators, the difficult ones left out; and the best of the choices."""
    choices = ["red", "blue", "green", "grey"]
    source = ListSource(
        [
            asked(0, ["red"] * 2 + ["blue"] * 8, choices=choices, correct_choice=1),
            asked(1, ["x"] * 10, choices=choices[::-1], correct_choice=0, difficult_direct_answer=True),
            asked(2, choices=choices),  # of a test split
            asked(3, TEN),
        ]
    )
    model = Answerer(["red", "y", "z", "no"], {0: "blue", 1: "red", 2: "green"})
    scores = evaluate_question_answering(model, source)
    assert scores["direct_answer_accuracy"] == pytest.approx(2 / 3)
    assert scores["multiple_choice_accuracy"] == pytest.approx(1 / 2)
    assert scores["vqa_accuracy"] == 1.0  # of the one without choices
    written, chosen = model.calls
    assert written == ([0, 1, 2, 3], None, ANSWER_DECODING)
    assert chosen == ([0, 1, 2], [choices, choices[::-1], choices], ANSWER_DECODING)


def test_results_are_what_vqas_server_takes() -> None:
    unnamed = Sample("k7", "s0", b"1", (), "list/1", {"question": "what?"})
    scores = evaluate_question_answering(Answerer(["yes", "red"]), ListSource([asked(0, TEN), unnamed]))
    assert scores["results"] == [{"question_id": 900, "answer": "yes"}, {"question_id": "k7", "answer": "red"}]
    assert scores["predictions"][0] == {
        "shard": "s0",
        "key": "000",
        "question": "Question 0?",
        "question_id": 900,
        "answer": "yes",
    }


def test_questions_without_answers_are_answered_and_not_scored() -> None:
    scores = evaluate_question_answering(Answerer(["yes", "no"]), ListSource([asked(0), asked(1, [])]))
    assert scores["num_questions"] == len(scores["results"]) == 2
    assert not [name for name in scores if "accuracy" in name]


def test_candidates_and_decoding_are_passed_on() -> None:
    model, source = Answerer(["yes"] * 3), ListSource([asked(i, TEN) for i in range(3)])
    decoding = Beam(num_beams=2, max_new_tokens=4)
    evaluate_question_answering(model, source, candidates=["yes", "no"], decoding=decoding, limit=2)
    assert model.calls == [([0, 1], ["yes", "no"], decoding)]
    assert Beam(num_beams=3, max_new_tokens=10, min_new_tokens=1) == ANSWER_DECODING


def test_questions_about_clips_read_their_frames_also_with_choices() -> None:
    seen: list[int] = []

    class OfClips(Answerer):
        def answer(self, images: Numbered, *words: Any, **options: Any) -> list[str]:
            seen.append(images.num_frames)
            return super().answer(images, *words, **options)

    source = ListSource([asked(0, ["dog"]), asked(1, ["cat"], choices=["cat", "dog"], correct_choice=0)])
    scores = evaluate_question_answering(OfClips(["dog", "cow"], {1: "cat"}), source, num_frames=16)
    assert seen == [16, 16]
    assert scores["accuracy"] == scores["multiple_choice_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({"question": None}, "no question"),
        ({"question": "what", "answers": "red"}, "answers must be a list of strings"),
        ({"question": "what", "answers": [1]}, "answers must be a list of strings"),
        ({"question": "what", "choices": "red"}, "choices must be a list of strings"),
        ({"question": "what", "choices": ["a", 2]}, "choices must be a list of strings"),
        ({"question": "what", "choices": ["a"], "correct_choice": 1}, "the correct one is number 1"),
        ({"question": "what", "choices": ["a"], "correct_choice": "a"}, "the correct one is number 'a'"),
        ({"question": "what", "choices": ["a"], "correct_choice": True}, "the correct one is number True"),
    ],
)
def test_what_cannot_be_used_is_skipped_and_named(info: dict[str, Any], reason: str) -> None:
    bad = Sample("bad", "s0", b"0", (), "list/0", info)
    image = Sample("image", "s0", b"x", (), "list/9", {"question": "what"})
    source = ListSource([bad, asked(1, TEN), image])
    scores = evaluate_question_answering(Answerer(["", "no"]), source)
    assert scores["num_questions"] == 1
    assert scores["vqa_accuracy"] == 1.0
    assert [reject["key"] for reject in scores["rejects"]] == ["bad", "image"]
    assert reason in scores["rejects"][0]["reason"]
