"""The filter measured against numbers worked out by hand, and a CapFilt run against what its samples say is true."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from listed_source import ListSource, numbers, sample
from openblip.data.captions import CaptionRow, write_captions
from openblip.data.sample import Sample
from openblip.errors import SourceError
from openblip.evaluation.filtering import evaluate_filter, filter_report, has_ground_truth, measure_capfilt
from openblip.predictor.values import TextScore
from shared_files import as_json, write_tar


class Scorer:
    """ITM is as given, and ITC its opposite."""

    def __init__(self, *probabilities: float, tasks: frozenset[str] = frozenset({"match", "similarity"})) -> None:
        self.probabilities = probabilities
        self.tasks = tasks

    def match(self, images: Any, texts: Any, batch_size: int | None) -> torch.Tensor:
        assert len(images) == len(texts)
        return torch.tensor([self.probabilities[number] for number in numbers(images)], dtype=torch.float64)

    def score_texts(self, images: Any, texts: Any, batch_size: int | None) -> list[list[TextScore]]:
        assert "similarity" in self.tasks
        probabilities = self.match(images, texts, batch_size).tolist()
        return [[TextScore(each, -each)] for each in probabilities]


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
    scores = evaluate_filter(Scorer(0.9, 0.6, 0.7, 0.1), source, threshold=0.65)
    assert scores["num_pairs"] == 4
    assert scores["auc"] == pytest.approx(3 / 4)
    assert scores["precision"] == pytest.approx(1 / 2)
    assert scores["recall"] == pytest.approx(1 / 2)
    assert scores["threshold"] == 0.65
    assert scores["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert scores["scores"]["itm"] == {"auc": scores["auc"], "average_precision": scores["average_precision"]}
    assert scores["scores"]["itc"]["auc"] == pytest.approx(1 / 4)
    precision = [point["precision"] for point in scores["curves"]["itm"]]
    assert precision == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2], abs=1e-5)
    assert scores["calibration"]["ece"] == pytest.approx((0.1 + 0.4 + 0.7 + 0.1) / 4)
    of_itm = evaluate_filter(Scorer(0.9, 0.6, 0.7, 0.1, tasks=frozenset({"match"})), source)
    assert list(of_itm["curves"]) == ["itm"]
    assert evaluate_filter(Scorer(0.9, 0.6), source, limit=2)["num_pairs"] == 2


def test_what_cannot_be_used_is_skipped_and_named() -> None:
    broken = Sample("bad", "s0", b"x", ("a",), "list/bad", {"noise": None})
    source = ListSource(
        [sample(0, "a", noise=None), broken, sample(1, noise=None), sample(2, "a", noise=3), sample(3, "a")]
    )
    scores = evaluate_filter(Scorer(0.9), source)
    assert scores["num_pairs"] == 1
    assert {reject["key"]: reject["reason"][:9] for reject in scores["rejects"]} == {
        "bad": "b'x' is n",
        "001": "no captio",
        "002": "`noise` m",
        "003": "no `noise",
    }


def test_without_the_truth_a_filter_cannot_be_measured() -> None:
    with pytest.raises(SourceError, match="s0/000: no `noise` field"):
        evaluate_filter(Scorer(0.9), ListSource([sample(0, "a")]))


def write_run(folder: Path, rows: list[CaptionRow], infos: dict[str, dict[str, object]]) -> Path:
    (folder / "captions").mkdir(parents=True)
    members = [[(f"{key}.jpg", b"image"), (f"{key}.json", as_json(**info))] for key, info in infos.items()]
    write_tar(folder / "s.tar", chain.from_iterable(members))
    manifest = {"source": str(folder / "s.tar"), "images": None, "threshold": 0.5}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_captions(folder / "captions" / "s.parquet", rows)
    (folder / "captions" / "s.report.json").write_text("{}")
    return folder


def row(key: str, source: str, caption: str, itm: float) -> CaptionRow:
    logprob = None if source == "web" else -1.0
    return CaptionRow(key=key, shard="s", index=0, source=source, caption=caption, itm=itm, itc=0.0, logprob=logprob)


def test_noise_is_counted_over_both_sources(tmp_path: Path) -> None:
    infos: dict[str, dict[str, object]] = {
        "a": {"caption": "a dog", "references": ["a dog", "one dog"], "noise": None},
        "b": {"caption": "img 1", "references": ["a cat"], "noise": "file_name"},
        "c": {"caption": "a cow", "references": ["a fox"], "noise": "wrong_object"},
    }
    rows = [
        row("a", "web", "a dog", 0.9), row("a", "synthetic", "One dog.", 0.8),
        row("b", "web", "img 1", 0.2), row("b", "synthetic", "a cat", 0.4),
        row("c", "web", "a cow", 0.6), row("c", "synthetic", "a cow", 0.7),
    ]  # fmt: skip
    run = write_run(tmp_path, rows, infos)
    assert has_ground_truth(run)
    measured = measure_capfilt(run)
    assert measured["noise_before"] == pytest.approx(2 / 3)
    assert measured["num_kept"] == 4
    assert measured["noise_after"] == pytest.approx(2 / 4)  # both texts of c
    assert measured["web"]["auc"] == 1.0
    assert measured["synthetic"]["correct"] == pytest.approx(2 / 3)
    assert measured["synthetic"]["correct_kept"] == pytest.approx(1 / 2)


def test_samples_that_do_not_know_are_said_so(tmp_path: Path) -> None:
    run = write_run(tmp_path, [row("a", "web", "a dog", 0.9)], {"a": {"caption": "a dog"}})
    assert not has_ground_truth(run)
    with pytest.raises(SourceError, match="does not say what is true"):
        measure_capfilt(run)
