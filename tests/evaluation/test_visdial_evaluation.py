"""Rankings of answers measured against ranks worked out by hand."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from listed_source import ListSource, Numbered, NumberEncoder, sample
from openblip.data.sample import Sample
from openblip.evaluation.visdial import evaluate_visdial


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
    source = ListSource(
        [
            dialog(0, turn(0, 0.1, 0.9, 0.5, answer_index=1), turn(1, 0.9, 0.1, 0.5, answer_index=2)),
            dialog(1, turn(0, 0.3, 0.6, 0.5, 0.4, answer_index=0)),
        ]
    )
    model = Ranker()
    scores = evaluate_visdial(model, source)
    assert (scores["num_dialogs"], scores["num_rounds"]) == (2, 3)
    assert scores["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)
    assert scores["r1"] == pytest.approx(1 / 3)
    assert scores["r5"] == scores["r10"] == 1.0
    assert scores["mean_rank"] == pytest.approx((1 + 2 + 4) / 3)
    assert "ndcg" not in scores
    assert model.asked == [(0, "caption 0", ["q0"]), (0, "caption 0", [("q0", "a0"), "q1"]), (1, "caption 1", ["q0"])]


def test_relevance_of_all_candidates_is_measured_where_annotators_judged_it() -> None:
    source = ListSource(
        [
            dialog(
                0,
                turn(0, 0.1, 0.9, 0.5, answer_index=1),
                turn(1, 0.9, 0.1, 0.5, 0.4, answer_index=0, relevance=[0.0, 1.0, 0.5, 0.0]),
                turn(2, 0.9, 0.1, answer_index=0, relevance=[0.0, 0.0]),  # nothing is relevant: not counted
            )
        ]
    )
    scores = evaluate_visdial(Ranker(), source)
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


def test_what_cannot_be_used_is_skipped_and_named() -> None:
    fine = dialog(0, turn(0, 0.9, 0.1, answer_index=0))
    broken = Sample("bad", "s0", b"x", (), "list/bad", dict(fine.info))
    source = ListSource(
        [
            broken,
            fine,
            sample(1, dialog=[turn(0, 0.5)]),
            sample(2, caption="a image"),
            dialog(3, {"question": "q"}),
            dialog(4, turn(0, 0.9, answer_index=5)),
            dialog(5, turn(0, 0.9, answer_index=0, relevance=[0.5, 0.5])),
            dialog(6, turn(0, 0.9, answer_index=0, relevance=7)),
        ]
    )
    scores = evaluate_visdial(Ranker(), source)
    assert (scores["num_dialogs"], scores["r1"]) == (1, 1.0)
    reasons = {reject["key"]: reject["reason"] for reject in scores["rejects"]}
    assert list(reasons) == ["bad", "001", "002", "003", "004", "005", "006"]
    for key, part in zip(
        reasons,
        ["no number", "no caption", "no dialog", "no round", "answer is number 5", "relevance", "relevance"],
        strict=True,
    ):
        assert part in reasons[key], key


def test_a_limit_takes_the_first_dialogs() -> None:
    source = ListSource([dialog(i, turn(0, 0.9, 0.1, answer_index=0)) for i in range(5)])
    assert evaluate_visdial(Ranker(), source, limit=3)["num_dialogs"] == 3
