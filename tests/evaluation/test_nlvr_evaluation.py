"""Judgements of statements measured against accuracies worked out by hand."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from listed_source import ListSource, numbers, sample
from openblip.data.sample import Sample
from openblip.errors import SourceError
from openblip.evaluation.nlvr import evaluate_nlvr


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
    assert scores["predictions"][1] == {
        "shard": "s0",
        "key": "001",
        "statement": "statement 1",
        "probability": pytest.approx(0.4),
        "label": True,
    }
    assert evaluate_nlvr(Judge([0.9, 0.4]), source, limit=2)["accuracy"] == pytest.approx(1 / 2)


def test_statements_without_a_label_are_judged_and_not_scored() -> None:
    some = evaluate_nlvr(Judge([0.9, 0.4]), ListSource([stated(0, label=True), stated(1)]))
    assert some["accuracy"] == 1.0
    assert len(some["predictions"]) == 2
    assert "accuracy" not in evaluate_nlvr(Judge([0.9]), ListSource([stated(0)]))


def test_what_cannot_be_used_is_skipped_and_named() -> None:
    broken = Sample("bad", "s0", b"x", (), "list/bad", {"statement": "a", "label": True}, b"100")
    source = ListSource(
        [
            stated(0, label=True),
            broken,
            sample(1, statement="a", label=True),
            sample(2, second=b"102", label=True),
            stated(3, label="True"),
            stated(4, label=1),
        ]
    )
    scores = evaluate_nlvr(Judge([0.9]), source)
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
