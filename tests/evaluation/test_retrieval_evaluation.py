"""Retrieval measured against ranks worked out by hand, before and after re-ranking.

I images, T texts.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from listed_source import ListSource, Numbered, NumberEncoder, sample
from openblip.data.sample import Sample
from openblip.errors import SourceError
from openblip.evaluation.retrieval import evaluate_retrieval, topk_mask
from openblip.predictor.reranking import rerank_scores
from openblip.predictor.values import CaptionScore


@dataclass
class Oracle(NumberEncoder):
    """Similarities (I, T) and match probabilities (I, T) as given; an image is its number."""

    similarities: Tensor
    probabilities: Tensor
    texts: list[str]
    matched: list[tuple[int, list[str]]] = field(default_factory=list)
    frames: set[int] = field(default_factory=set)
    retrieval_text_tokens = 35
    tasks = frozenset({"similarity", "match"})

    def embed_images(self, images: Any, batch_size: int | None) -> Tensor:
        encoded = self.encode(images)
        self.frames.add(encoded.num_frames)
        return self.similarities[encoded.numbers]

    def embed_texts(self, texts: Any, batch_size: int | None, max_text_length: int) -> Tensor:
        assert max_text_length == 35
        return torch.eye(len(self.texts))[[self.texts.index(text) for text in texts]]

    def match_matrix(self, images: Numbered, texts: Any, batch_size: int | None, max_text_length: int) -> Tensor:
        assert max_text_length == 35
        self.matched += [(image, list(texts)) for image in images.numbers.tolist()]
        self.frames.add(images.num_frames)
        return self.probabilities[images.numbers][:, [self.texts.index(text) for text in texts]]

    def score_captions(self, images: Numbered, texts: Any, batch_size: int | None) -> list[list[CaptionScore]]:
        rows = zip(images.numbers.tolist(), texts, strict=True)
        return [
            [CaptionScore(float(self.probabilities[image, self.texts.index(text)]), 1) for text in of_image]
            for image, of_image in rows
        ]


def three() -> Oracle:
    similarities = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.9, 0.8], [0.3, 0.9, 0.5]])
    probabilities = torch.tensor([[0.1, 0.9, 1.0], [0.9, 0.3, 0.2], [0.5, 0.1, 0.9]])
    return Oracle(similarities, probabilities, ["t0", "t1", "t2"])


def test_reranking_changes_the_order_of_the_best_only() -> None:
    oracle = three()
    scores = evaluate_retrieval(oracle, ListSource([sample(i, text) for i, text in enumerate(oracle.texts)]), rerank=2)
    # By similarity: image 0 -> t0 (right), 1 -> t1 (right), 2 -> t1 (wrong).
    assert scores["itc"]["tr_r1"] == pytest.approx(2 / 3)
    # t0 -> image 0 (right); t1 -> all three tied at .9 but image 0 (.8): a third of 1 and 2; t2 -> image 1.
    assert scores["itc"]["ir_r1"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    # Of the two best: image 0 prefers t1 (.8 + .9), 1 keeps t1 (.9 + .3), 2 now finds t2 (.5 + .9).
    assert scores["itm"]["tr_r1"] == pytest.approx(2 / 3)
    # Texts: t0 has images 0, 2 -> 0: .9 + .1, 2: .3 + .5; t1 has 1, 2 -> 1; t2 has 1, 2 -> 2.
    assert scores["itm"]["ir_r1"] == pytest.approx(1.0)
    assert scores["reranked"] == 2
    # Each image is read with its own two best texts, and those of which it is one of the two best.
    assert oracle.matched == [(0, ["t0", "t1"]), (1, ["t1", "t2"]), (2, ["t0", "t1", "t2"])]


def test_what_is_not_among_the_best_stays_behind_in_its_order() -> None:
    similarities = torch.tensor([[0.9, 0.8, 0.1, 0.3]])
    chosen = topk_mask(similarities, 2)
    assert chosen.tolist() == [[True, True, False, False]]
    ranked = rerank_scores(similarities, torch.tensor([[0.0, 0.5, 0.0, 0.0]]), chosen)
    assert ranked.argsort(descending=True).tolist() == [[1, 0, 3, 2]]
    lowest = rerank_scores(torch.tensor([[-0.9, 0.9, 0.8]]), torch.zeros(1, 3), torch.tensor([[True, False, False]]))
    assert lowest.argmax().item() == 0  # however unlike, it was chosen


def test_a_model_without_itm_is_ranked_by_itc_alone() -> None:
    oracle = three()
    source = ListSource([sample(i, text) for i, text in enumerate(oracle.texts)])
    expected = evaluate_retrieval(oracle, source)
    oracle.tasks, oracle.matched = frozenset({"similarity"}), []
    scores = evaluate_retrieval(oracle, source)
    assert scores == {name: value for name, value in expected.items() if name not in ("itm", "reranked")}
    assert oracle.matched == []


def test_a_model_without_itc_compares_all_pairs() -> None:
    """By P(match), or where it only writes by the log-probability of the texts."""
    oracle = three()
    source = ListSource([sample(i, text) for i, text in enumerate(oracle.texts)])
    expected = {"itm": evaluate_retrieval(oracle, source, rerank=3)["itm"]}
    oracle.similarities = oracle.probabilities
    by_probability = evaluate_retrieval(oracle, source)["itc"]
    oracle.matched = []
    for task, name in (("match", "itm"), ("caption", "lm")):
        oracle.tasks = frozenset({task})
        scores = evaluate_retrieval(oracle, source)
        assert scores[name] == by_probability
        assert scores[name] != expected["itm"]
        assert scores["num_texts"] == 3
        assert not {"itc", "reranked"} & scores.keys()
    assert oracle.matched == [(image, oracle.texts) for image in range(3)]  # by ITM


def test_all_captions_of_an_image_are_right_answers() -> None:
    texts = ["a0", "b0", "a1", "b1", "c1"]
    similarities = torch.tensor([[0.1, 0.9, 0.8, 0.2, 0.3], [0.7, 0.1, 0.2, 0.9, 0.6]])
    oracle = Oracle(similarities, torch.zeros(2, 5), texts)
    source = ListSource([sample(0, "a0", "b0"), sample(1, "a1", "b1", "c1")])
    scores = evaluate_retrieval(oracle, source, rerank=1)
    assert (scores["num_images"], scores["num_texts"]) == (2, 5)
    assert scores["itc"]["tr_r1"] == 1.0  # b0 and b1
    assert scores["itc"]["ir_r1"] == pytest.approx(3 / 5)  # a0 and a1 prefer the other image
    assert scores["itc"]["ir_r5"] == 1.0
    # Image 0: b0 first, a1 (wrong) second; image 1: b1, a0 (wrong), c1.
    assert scores["itc"]["tr_r_precision"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores["itc"]["tr_map_at_r"] == pytest.approx((1 / 2 + (1 + 2 / 3) / 3) / 2)
    assert scores["itc"]["ir_map_at_r"] == scores["itc"]["ir_r_precision"] == pytest.approx(3 / 5)
    assert scores["itc"]["r_mean"] == pytest.approx(((1 + 1 + 1) / 3 + (3 / 5 + 1 + 1) / 3) / 2)


def test_samples_of_one_image_are_right_answers_to_each_other() -> None:
    """Sources that give each caption of an image a sample of its own."""
    oracle = Oracle(torch.tensor([[0.1, 0.9, 0.2], [0.1, 0.9, 0.2], [0.0, 0.1, 0.3]]), torch.zeros(3, 3), list("abc"))
    source = ListSource([sample(0, "a", image_id="x"), sample(1, "b", image_id="x"), sample(2, "c", image_id="y")])
    scores = evaluate_retrieval(oracle, source, rerank=1)
    assert scores["itc"]["tr_r1"] == 1.0


def test_more_reranked_than_there_are_is_all_of_them() -> None:
    oracle = Oracle(torch.tensor([[0.5, 0.6], [0.6, 0.5]]), torch.eye(2), ["a", "b"])
    scores = evaluate_retrieval(oracle, ListSource([sample(0, "a"), sample(1, "b")]), rerank=100)
    assert scores["reranked"] == 2
    assert scores["itc"]["tr_r1"] == scores["itc"]["ir_r1"] == 0.0
    assert scores["itm"]["tr_r1"] == scores["itm"]["ir_r1"] == 1.0
    assert scores["itm"]["tr_r10"] == 1.0


def test_what_cannot_be_used_is_skipped_in_both_passes() -> None:
    oracle = three()
    broken = Sample("bad", "s0", b"x", ("t9",), "list/bad")
    source = ListSource([broken, sample(0, "t0"), sample(5), "gone", sample(1, "t1"), sample(2, "t2")])
    scores = evaluate_retrieval(oracle, source, rerank=2)
    assert (scores["num_images"], scores["num_texts"]) == (3, 3)
    assert [reject["key"] for reject in scores["rejects"]] == ["bad", "005", "gone"]
    assert scores["num_rejects"] == 3
    assert scores["itm"]["ir_r1"] == pytest.approx(1.0)
    with pytest.raises(SourceError, match="no caption"):
        evaluate_retrieval(oracle, ListSource([sample(5)]))


def test_a_limit_takes_the_first_samples() -> None:
    oracle = three()
    source = ListSource([sample(i, text) for i, text in enumerate(oracle.texts)])
    assert evaluate_retrieval(oracle, source, limit=2)["num_texts"] == 2


def test_clips_are_encoded_with_their_frames_in_both_passes() -> None:
    oracle = three()
    source = ListSource([sample(i, text) for i, text in enumerate(oracle.texts)])
    expected = evaluate_retrieval(three(), source, rerank=2)
    assert evaluate_retrieval(oracle, source, rerank=2, num_frames=8) == expected
    assert oracle.frames == {8}
