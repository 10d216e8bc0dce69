"""The filter measured against numbers worked out by hand."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from listed_source import ListSource, numbers, sample
from openblip.data.sample import Sample
from openblip.errors import SourceError
from openblip.evaluation.filtering import evaluate_filter, filter_report


@dataclass
class Scorer:
    probabilities: list[float]

    def match(self, images: Any, texts: Any, batch_size: int | None) -> Tensor:
        assert len(images) == len(texts)
        return torch.tensor([self.probabilities[number] for number in numbers(images)])


KINDS = [None, None, "wrong_object", "file_name"]


def test_the_filter_is_measured_over_all_and_each_kind_of_noise() -> None:
    report = filter_report(np.array([0.9, 0.6, 0.7, 0.1]), KINDS, 0.5)
    assert report["auc"] == pytest.approx(3 / 4)
    assert report["auc_by_kind"] == {"wrong_object": pytest.approx(1 / 2), "file_name": 1.0}
    assert report["precision"] == pytest.approx(2 / 3)
    assert report["recall"] == 1.0
    assert report["noise_before"] == pytest.approx(1 / 2)
    assert report["noise_after"] == pytest.approx(1 / 3)
    nothing_kept = filter_report(np.array([0.1, 0.2]), [None, "truncated"], 0.5)
    assert nothing_kept["precision"] is None  # JSON has no NaN


def test_a_source_that_knows_the_truth_measures_the_filter() -> None:
    source = ListSource([sample(i, f"text {i}", noise=kind) for i, kind in enumerate(KINDS)])
    scores = evaluate_filter(Scorer([0.9, 0.6, 0.7, 0.1]), source, threshold=0.65)
    assert scores["num_pairs"] == 4
    assert scores["auc"] == pytest.approx(3 / 4)
    assert scores["precision"] == pytest.approx(1 / 2)
    assert scores["recall"] == pytest.approx(1 / 2)
    assert scores["threshold"] == 0.65
    assert evaluate_filter(Scorer([0.9, 0.6]), source, limit=2)["num_pairs"] == 2


def test_what_cannot_be_used_is_skipped_and_named() -> None:
    broken = Sample("bad", "s0", b"x", ("a",), "list/bad", {"noise": None})
    source = ListSource(
        [sample(0, "a", noise=None), broken, sample(1, noise=None), sample(2, "a", noise=3), sample(3, "a")]
    )
    scores = evaluate_filter(Scorer([0.9]), source)
    assert scores["num_pairs"] == 1
    assert {reject["key"]: reject["reason"][:9] for reject in scores["rejects"]} == {
        "bad": "b'x' is n",
        "001": "no captio",
        "002": "`noise` m",
        "003": "no `noise",
    }


def test_without_the_truth_a_filter_cannot_be_measured() -> None:
    with pytest.raises(SourceError, match="s0/000: no `noise` field"):
        evaluate_filter(Scorer([0.9]), ListSource([sample(0, "a")]))
