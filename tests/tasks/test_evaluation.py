"""Evaluation against numbers worked out by hand, with models whose answers are written down.

I images, T texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openblip.data.sample import Record, Sample, ShardIndex
from openblip.errors import SourceError
from openblip.tasks.evaluation import (
    evaluate_captioning,
    evaluate_filter,
    evaluate_retrieval,
    filter_report,
    references,
    rerank_best,
)


@dataclass(frozen=True)
class Written:
    """A record that is there already."""

    sample: Sample

    @property
    def key(self) -> str:
        return self.sample.key

    @property
    def shard(self) -> str:
        return self.sample.shard

    def read(self) -> Sample:
        return self.sample


@dataclass
class ListSource:
    samples: list[Sample]
    name: str = "list"

    def shards(self) -> Sequence[str]:
        return ["s"]

    def index(self, shard: str) -> ShardIndex:
        records: list[Record] = [Written(sample) for sample in self.samples]
        return ShardIndex(records, [])


@dataclass(frozen=True)
class Numbered:
    """Images as a model encodes them; here by their number."""

    numbers: Tensor

    def select(self, index: Tensor) -> "Numbered":
        return Numbered(self.numbers[index])


@dataclass
class Oracle:
    """Captions, similarities (I, T) and match probabilities (I, T) as given; an image is its number."""

    captions: list[str] = field(default_factory=list)
    similarities: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    probabilities: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    texts: list[str] = field(default_factory=list)

    def caption(self, images: Any, **_: Any) -> list[str]:
        return [self.captions[int(image)] for image in images]

    def encode(self, images: Any, batch_size: int | None) -> Numbered:
        return Numbered(torch.tensor([int(image) for image in images]))

    def embed_images(self, images: Any, batch_size: int | None) -> Tensor:
        return self.similarities[images.numbers]

    def embed_texts(self, texts: Any, batch_size: int | None) -> Tensor:
        return torch.eye(len(self.texts))[[self.texts.index(text) for text in texts]]

    def match(self, images: Any, texts: Any, batch_size: int | None) -> Tensor:
        return self.probabilities[images.numbers, [self.texts.index(text) for text in texts]]


def sample(number: int, caption: str, **info: Any) -> Sample:
    return Sample(f"{number:03d}", "s", str(number).encode(), (caption,), f"list/{number}", info)


def test_a_caption_counts_when_it_is_one_of_the_references() -> None:
    source = ListSource(
        [
            sample(0, "a dog", references=["A dog.", "one dog"]),
            sample(1, "a cat", references=["a cat"]),
            sample(2, "a bird"),  # without references its caption is the reference
        ]
    )
    scores = evaluate_captioning(Oracle(captions=["one dog", "a cow", "a bird"]), source)
    assert scores["exact_match"] == pytest.approx(2 / 3)
    assert [row["caption"] for row in scores["predictions"]] == ["one dog", "a cow", "a bird"]
    assert scores["bleu_1"] == pytest.approx(5 / 6)  # five of six words


def test_references_are_what_training_reads() -> None:
    assert references(sample(0, "x", references=["A big  Dog!", "two"])) == ["a big dog", "two"]


def test_reranking_changes_the_order_of_the_best_only() -> None:
    texts = ["t0", "t1", "t2"]
    similarities = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.9, 0.8], [0.3, 0.9, 0.5]])
    probabilities = torch.tensor([[0.1, 0.9, 1.0], [0.9, 0.3, 0.2], [0.5, 0.1, 0.9]])
    oracle = Oracle(similarities=similarities, probabilities=probabilities, texts=texts)
    source = ListSource([sample(i, text) for i, text in enumerate(texts)])
    scores = evaluate_retrieval(oracle, source, rerank=2)
    # By similarity: image 0 -> t0 (right), 1 -> t1 (right), 2 -> t1 (wrong).
    assert scores["itc"]["tr_r1"] == pytest.approx(2 / 3)
    # Of the two best: image 0 prefers t1 (.8 + .9), 1 keeps t1 (.9 + .3), 2 now finds t2 (.5 + .9).
    assert scores["itm"]["tr_r1"] == pytest.approx(2 / 3)
    # Texts: t0 has images 0, 2 -> 0: .9 + .1, 2: .3 + .5; t1 has 1, 2 -> 1; t2 has 1, 2 -> 2.
    assert scores["itm"]["ir_r1"] == pytest.approx(1.0)
    matrix = rerank_best(oracle, oracle.encode([0, 1, 2], None), texts, similarities, 2, None)
    assert matrix.argmin(dim=1).tolist() == [2, 0, 0]  # what was not among the best stays behind


def test_more_reranked_than_there_are_is_all_of_them() -> None:
    oracle = Oracle(similarities=torch.eye(2), probabilities=torch.eye(2), texts=["a", "b"])
    scores = evaluate_retrieval(oracle, ListSource([sample(0, "a"), sample(1, "b")]), rerank=100)
    assert scores["reranked"] == 2
    assert scores["itm"]["ir_r1"] == 1.0


def test_the_filter_is_measured_over_all_and_each_kind_of_noise() -> None:
    report = filter_report(np.array([0.9, 0.6, 0.7, 0.1]), [None, None, "wrong_object", "file_name"], 0.5)
    assert report["auc"] == pytest.approx(3 / 4)
    assert report["auc_by_kind"] == {"wrong_object": pytest.approx(1 / 2), "file_name": 1.0}
    assert report["precision"] == pytest.approx(2 / 3)
    assert report["recall"] == 1.0
    assert report["noise_before"] == pytest.approx(1 / 2)
    assert report["noise_after"] == pytest.approx(1 / 3)
    nothing_kept = filter_report(np.array([0.1, 0.2]), [None, "truncated"], 0.5)
    assert nothing_kept["precision"] is None  # JSON has no NaN


def test_without_the_truth_a_filter_cannot_be_measured() -> None:
    with pytest.raises(SourceError, match="s/000 has no `noise` field"):
        evaluate_filter(Oracle(texts=["a"]), ListSource([sample(0, "a")]))


def test_an_empty_source_is_an_error() -> None:
    with pytest.raises(SourceError, match="no sample with a caption"):
        evaluate_captioning(Oracle(), ListSource([]))
