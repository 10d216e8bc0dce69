"""Answers (VQA), rankings of answers (VisDial) and judgements (NLVR2) measured against numbers worked out by hand."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from listed_source import ListSource, Numbered, NumberEncoder, numbers, sample, scored
from openblip.data.sample import Sample
from openblip.errors import ConfigError, SourceError
from openblip.evaluation.nlvr import evaluate_nlvr
from openblip.evaluation.question_answering import evaluate_question_answering
from openblip.evaluation.visdial import evaluate_visdial
from openblip.generation.decoding import Beam


@dataclass
class Answerer(NumberEncoder):
    """Writes an answer for each image; of choices it takes the one that it is told to."""

    written: list[str]
    chosen: dict[int, str] = field(default_factory=dict)
    calls: list[tuple[list[int], Any, Any]] = field(default_factory=list)
    examples: list[Any] = field(default_factory=list)

    def answer(
        self,
        images: Numbered,
        questions: Any,
        candidates: Any = None,
        *,
        decoding: Any,
        batch_size: int | None,
        return_scores: bool = False,
        examples: Any = (),
    ) -> list[Any]:
        self.examples = list(examples)
        shown = images.numbers.tolist()
        assert len(shown) == len(questions)
        self.calls.append((shown, candidates, decoding))
        if candidates is not None and not isinstance(candidates[0], str):
            assert all(self.chosen[n] in own for n, own in zip(shown, candidates, strict=True))
            return [self.chosen[number] for number in shown]
        assert return_scores
        return [scored(self.written[number], 0.5, 0.8) for number in shown]  # with a probability of 0.4


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
    samples = [
        asked(0, TEN, answer_type="yes/no"),
        asked(1, TEN, answer_type="yes/no"),
        asked(2, ["2"] * 10, question_kind="count"),
        asked(3, ["red"] * 10),
    ]
    scores = evaluate_question_answering(Answerer(["no", "maybe", "2", "red"]), ListSource(samples))
    assert scores["by_type"] == {"yes/no": pytest.approx(0.5), "count": 1.0, "other": 1.0}


def test_a_single_answer_is_right_or_wrong() -> None:
    """MSRVTT-QA, MSVD-QA."""
    source = ListSource([asked(0, ["dog"]), asked(1, ["cat"]), asked(2, ["a bird"])])
    scores = evaluate_question_answering(Answerer(["dog", "cow", "the bird"]), source)
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["calibration"]["ece"] == pytest.approx(2 / 3 - 0.4)
    assert "vqa_accuracy" not in scores


def test_offered_choices_are_scored_as_a_okvqas() -> None:
    """Direct answers over all annotators, the difficult ones left out; and the best of the choices."""
    choices = ["red", "blue", "green", "grey"]
    samples = [
        asked(0, ["red"] * 2 + ["blue"] * 8, choices=choices, correct_choice=1),
        asked(1, ["x"] * 10, choices=choices[::-1], correct_choice=0, difficult_direct_answer=True),
        asked(2, choices=choices),  # of a test split
        asked(3, TEN),
    ]
    model = Answerer(["red", "y", "z", "no"], {0: "blue", 1: "red", 2: "green"})
    scores = evaluate_question_answering(model, ListSource(samples))
    assert scores["direct_answer_accuracy"] == pytest.approx(2 / 3)
    assert scores["multiple_choice_accuracy"] == pytest.approx(1 / 2)
    assert scores["vqa_accuracy"] == 1.0  # of the one without choices
    written, chosen = model.calls
    assert written == ([0, 1, 2, 3], None, None)
    assert chosen == ([0, 1, 2], [choices, choices[::-1], choices], None)


def test_results_are_what_vqas_server_takes() -> None:
    unnamed = Sample("k7", "s0", b"1", (), "list/1", {"question": "what?"})
    scores = evaluate_question_answering(Answerer(["yes", "red"]), ListSource([asked(0, TEN), unnamed]))
    assert scores["results"] == [{"question_id": 900, "answer": "yes"}, {"question_id": "k7", "answer": "red"}]
    named = {"shard": "s0", "key": "000", "question": "Question 0?", "question_id": 900, "answer": "yes"}
    assert scores["predictions"][0] == named | {"probability": pytest.approx(0.4)}


def test_questions_without_answers_are_answered_and_not_scored() -> None:
    scores = evaluate_question_answering(Answerer(["yes", "no"]), ListSource([asked(0, ["yes"]), asked(1, [])]))
    assert scores["num_questions"] == len(scores["results"]) == 2
    assert scores["num_scored"] == scores["accuracy"] == 1


def test_candidates_and_decoding_are_passed_on() -> None:
    model, source = Answerer(["yes"] * 3), ListSource([asked(i, TEN) for i in range(3)])
    decoding = Beam(num_beams=2, max_new_tokens=4)
    evaluate_question_answering(model, source, candidates=["yes", "no"], decoding=decoding, limit=2)
    assert model.calls == [([0, 1], ["yes", "no"], decoding)]


def test_examples_are_the_first_questions_with_answers_and_are_not_scored() -> None:
    source = ListSource([asked(0), asked(1, ["no", "two", "two"]), asked(2, ["cat"]), asked(3, ["dog"]), asked(4)])
    model = Answerer(["yes", "no", "cat", "cow", "x"])
    scores = evaluate_question_answering(model, source, num_examples=2)
    assert model.examples == [(b"1", "Question 1?", "two"), (b"2", "Question 2?", "cat")]
    assert (scores["num_questions"], scores["num_scored"], scores["accuracy"]) == (3, 1, 0.0)
    with pytest.raises(ConfigError, match="3 questions with answers, fewer than 4"):
        evaluate_question_answering(model, source, num_examples=4)
    assert evaluate_question_answering(model, source)["num_scored"] == 3
    assert model.examples == []


def test_questions_about_clips_read_their_frames_also_with_choices() -> None:
    seen: list[int] = []

    class OfClips(Answerer):
        def answer(self, images: Numbered, *words: Any, **options: Any) -> list[Any]:
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
def test_questions_that_cannot_be_used_are_skipped_and_named(info: dict[str, Any], reason: str) -> None:
    bad = Sample("bad", "s0", b"0", (), "list/0", info)
    image = Sample("image", "s0", b"x", (), "list/9", {"question": "what"})
    source = ListSource([bad, asked(1, TEN), image])
    scores = evaluate_question_answering(Answerer(["", "no"]), source)
    assert scores["num_questions"] == 1
    assert scores["vqa_accuracy"] == 1.0
    assert [reject["key"] for reject in scores["rejects"]] == ["bad", "image"]
    assert reason in scores["rejects"][0]["reason"]


@dataclass
class Ranker(NumberEncoder):
    """A candidate's score is the number in its text, "c0.7"."""

    asked: list[tuple[int, str, Any]] = field(default_factory=list)

    def rank_answers(
        self, images: Numbered, captions: Any, dialogs: Any, candidates: Any, *, batch_size: int | None
    ) -> list[Tensor]:
        self.asked += zip(images.numbers.tolist(), captions, dialogs, strict=True)
        assert len(candidates) == len(dialogs)
        return [torch.tensor([float(text[1:]) for text in own]) for own in candidates]


def options(*scores: float) -> list[str]:
    return [f"c{score}" for score in scores]


def turn(number: int, *scores: float, **info: Any) -> dict[str, Any]:
    return {"question": f"q{number}", "answer": f"a{number}", "options": options(*scores)} | info


def dialog(number: int, *turns: dict[str, Any], **info: Any) -> Sample:
    return sample(number, caption=f"caption {number}", dialog=list(turns), **info)


def test_ranks_of_the_right_answers() -> None:
    samples = [
        dialog(0, turn(0, 0.1, 0.9, 0.5, answer_index=1), turn(1, 0.9, 0.1, 0.5, answer_index=2)),
        dialog(1, turn(0, 0.3, 0.6, 0.5, 0.4, answer_index=0)),
    ]
    model = Ranker()
    scores = evaluate_visdial(model, ListSource(samples))
    assert (scores["num_dialogs"], scores["num_rounds"]) == (2, 3)
    assert scores["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)
    assert scores["r1"] == pytest.approx(1 / 3)
    assert scores["r5"] == scores["r10"] == 1.0
    assert scores["mean_rank"] == pytest.approx((1 + 2 + 4) / 3)
    assert "ndcg" not in scores
    assert model.asked == [(0, "caption 0", ["q0"]), (0, "caption 0", [("q0", "a0"), "q1"]), (1, "caption 1", ["q0"])]


def test_relevance_of_all_candidates_is_measured_where_annotators_judged_it() -> None:
    samples = [
        dialog(
            0,
            turn(0, 0.1, 0.9, 0.5, answer_index=1),
            turn(1, 0.9, 0.1, 0.5, 0.4, answer_index=0, relevance=[0.0, 1.0, 0.5, 0.0]),
            turn(2, 0.9, 0.1, answer_index=0, relevance=[0.0, 0.0]),  # nothing is relevant: not counted
        )
    ]
    scores = evaluate_visdial(Ranker(), ListSource(samples))
    # Two candidates are relevant; the two best places hold the first (0) and the third (0.5).
    found, ideal = 0.5 / math.log2(3), 1.0 / math.log2(2) + 0.5 / math.log2(3)
    assert scores["ndcg"] == pytest.approx(found / ideal)


def test_results_are_what_visdials_server_takes() -> None:
    plain = dialog(1, turn(0, 0.2, 0.8))
    known = Sample("000", "s0", b"0", (), "list#185565", dict(plain.info) | {"image_id": 185565})
    unanswered = dialog(2, turn(0, 0.9, 0.1), turn(1, 0.5, 0.7, 0.6, answer=None), turn(2, 0.1, 0.2))
    scores = evaluate_visdial(Ranker(), ListSource([known, unanswered]))
    assert scores["results"] == [
        {"image_id": 185565, "round_id": 1, "ranks": [2, 1]},
        {"image_id": "002", "round_id": 1, "ranks": [1, 2]},
        {"image_id": "002", "round_id": 2, "ranks": [3, 1, 2]},
    ]
    for row in scores["results"]:
        assert sorted(row["ranks"]) == list(range(1, len(row["ranks"]) + 1))
        assert all(type(rank) is int for rank in row["ranks"])
    assert "mrr" not in scores


def test_tied_candidates_get_ranks_of_their_own() -> None:
    scores = evaluate_visdial(Ranker(), ListSource([dialog(0, turn(0, 0.5, 0.5, 0.9, 0.5, answer_index=0))]))
    assert scores["results"][0]["ranks"] == [2, 3, 1, 4]
    assert scores["mean_rank"] == pytest.approx(3.0)  # places 2, 3 and 4 are equally likely


def test_rounds_with_fewer_candidates_are_measured_among_their_own() -> None:
    source = ListSource(
        [dialog(0, turn(0, 0.1, 0.2, answer_index=0), turn(1, *[0.5 - i / 100 for i in range(12)], answer_index=11))]
    )
    scores = evaluate_visdial(Ranker(), source)
    assert scores["mean_rank"] == pytest.approx((2 + 12) / 2)
    assert scores["r10"] == pytest.approx(1 / 2)


def test_dialogs_that_cannot_be_used_are_skipped_and_named() -> None:
    fine = dialog(0, turn(0, 0.9, 0.1, answer_index=0))
    broken = Sample("bad", "s0", b"x", (), "list/bad", dict(fine.info))
    samples = [
        broken,
        fine,
        sample(1, dialog=[turn(0, 0.5)]),
        sample(2, caption="a image"),
        dialog(3, {"question": "q"}),
        dialog(4, turn(0, 0.9, answer_index=5)),
        dialog(5, turn(0, 0.9, answer_index=0, relevance=[0.5, 0.5])),
        dialog(6, turn(0, 0.9, answer_index=0, relevance=7)),
    ]
    scores = evaluate_visdial(Ranker(), ListSource(samples))
    assert (scores["num_dialogs"], scores["r1"]) == (1, 1.0)
    reasons = {reject["key"]: reject["reason"] for reject in scores["rejects"]}
    assert list(reasons) == ["bad", "001", "002", "003", "004", "005", "006"]
    parts = ["no number", "no caption", "no dialog", "no round", "answer is number 5", "relevance", "relevance"]
    for key, part in zip(reasons, parts, strict=True):
        assert part in reasons[key], key


def test_a_limit_takes_the_first_dialogs() -> None:
    source = ListSource([dialog(i, turn(0, 0.9, 0.1, answer_index=0)) for i in range(5)])
    assert evaluate_visdial(Ranker(), source, limit=3)["num_dialogs"] == 3


@dataclass
class Judge:
    """P(true) by the number of the left image."""

    probabilities: list[float]

    def judge(self, images: Any, statements: Any, *, batch_size: int | None) -> Tensor:
        left, right = zip(*images, strict=True)
        assert numbers(right) == [100 + number for number in numbers(left)]
        assert len(statements) == len(images)
        return torch.tensor([self.probabilities[number] for number in numbers(left)])


def stated(number: int, **info: Any) -> Sample:
    return sample(number, second=str(100 + number).encode(), statement=f"statement {number}", **info)


def test_more_than_one_half_is_true() -> None:
    labels = [True, True, False, False, False]
    source = ListSource([stated(i, label=label) for i, label in enumerate(labels)])
    scores = evaluate_nlvr(Judge([0.9, 0.4, 0.2, 0.7, 0.5]), source)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["num_statements"] == 5
    judged = {"statement": "statement 1", "probability": pytest.approx(0.4), "label": True}
    assert scores["predictions"][1] == {"shard": "s0", "key": "001", **judged}
    assert evaluate_nlvr(Judge([0.9, 0.4]), source, limit=2)["accuracy"] == pytest.approx(1 / 2)


def test_statements_without_a_label_are_judged_and_not_scored() -> None:
    some = evaluate_nlvr(Judge([0.9, 0.4]), ListSource([stated(0, label=True), stated(1)]))
    assert some["accuracy"] == 1.0
    assert len(some["predictions"]) == 2
    assert "accuracy" not in evaluate_nlvr(Judge([0.9]), ListSource([stated(0)]))


def test_statements_that_cannot_be_used_are_skipped_and_named() -> None:
    broken = Sample("bad", "s0", b"x", (), "list/bad", {"statement": "a", "label": True}, b"100")
    samples = [
        stated(0, label=True),
        broken,
        sample(1, statement="a", label=True),
        sample(2, second=b"102", label=True),
        stated(3, label="True"),
        stated(4, label=1),
    ]
    scores = evaluate_nlvr(Judge([0.9]), ListSource(samples))
    assert (scores["num_statements"], scores["accuracy"]) == (1, 1.0)
    assert {reject["key"]: reject["reason"] for reject in scores["rejects"]} == {
        "bad": "b'x' is no number",
        "001": "no second image",
        "002": "no statement",
        "003": "the label must be true or false, not 'True'",
        "004": "the label must be true or false, not 1",
    }
    with pytest.raises(SourceError, match="no sample that can be used; s0/000: no second image"):
        evaluate_nlvr(Judge([]), ListSource([sample(0, statement="a")]))
