"""Recall, ranks of answers, accuracy of classes and quality of filters, against brute force and by hand."""

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openblip.errors import ConfigError
from openblip.metrics.ranking import (
    answer_ranking,
    auc,
    average_precision,
    classification_accuracy,
    filter_curve,
    filter_quality,
    ndcg,
    precision_at_r,
    recall_at_k,
    retrieval_precision,
    retrieval_recall,
)


def orders(scores: list[float]) -> list[tuple[int, ...]]:
    """Every order of the candidates that their scores allow."""
    return [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]


def test_two_texts_per_image_by_hand() -> None:
    scores = np.array(
        [
            [0.9, 0.1, 0.8, 0.2, 0.3, 0.0],  # image 0: text 0 first
            [0.5, 0.6, 0.4, 0.3, 0.2, 0.1],  # image 1: texts 2, 3 third and fourth
            [0.9, 0.8, 0.7, 0.6, 0.4, 0.5],  # image 2: texts 4, 5 sixth and fifth
        ]
    )
    recall = retrieval_recall(scores, [0, 1, 2], [0, 0, 1, 1, 2, 2], ks=(1, 3, 5))
    assert recall["tr_r1"] == pytest.approx(1 / 3)
    assert recall["tr_r3"] == pytest.approx(2 / 3)
    assert recall["tr_r5"] == 1.0
    # Texts 4 (.3 .2 .4) and 5 (.0 .1 .5) find image 2 first; text 0 (.9 .5 .9) ties images 0 and 2: half.
    assert recall["ir_r1"] == pytest.approx(2.5 / 6)
    assert recall["ir_r3"] == 1.0
    assert recall["ir_r5"] == 1.0, "five of three images are all of them"
    assert recall["tr_mean"] == pytest.approx((1 / 3 + 2 / 3 + 1) / 3)
    assert recall["ir_mean"] == pytest.approx((2.5 / 6 + 1 + 1) / 3)
    assert recall["r_mean"] == pytest.approx((recall["tr_mean"] + recall["ir_mean"]) / 2)


def test_texts_may_rank_by_scores_of_their_own() -> None:
    ids = np.arange(3)
    recall = retrieval_recall(np.eye(3), ids, ids, ks=(1,), text_to_image=1 - np.eye(3))
    assert recall == {"tr_r1": 1.0, "ir_r1": 0.0, "tr_mean": 1.0, "ir_mean": 0.0, "r_mean": 0.5}
    one_image = retrieval_recall([[0.1, 0.2]], [0], [0, 0], text_to_image=[[0.3], [0.4]])
    assert set(one_image.values()) == {1.0}
    with pytest.raises(ConfigError, match="do not fit 2 queries and 1 entries"):
        retrieval_recall([[0.1, 0.2]], [0], [0, 0], text_to_image=[[0.3, 0.4]])


def test_a_constant_matrix_scores_what_guessing_does() -> None:
    ids = np.arange(20)
    recall = retrieval_recall(np.full((20, 20), 0.3), ids, ids)
    for name in ("tr", "ir"):
        assert [recall[f"{name}_r{k}"] for k in (1, 5, 10)] == pytest.approx([0.05, 0.25, 0.5])


def test_perfect_reversed_and_small_sets() -> None:
    ids = np.arange(4)
    assert set(retrieval_recall(np.eye(4), ids, ids).values()) == {1.0}
    worst = recall_at_k(1 - np.eye(4), ids, ids, ks=(1, 3, 4, 10))
    assert worst == {1: 0.0, 3: 0.0, 4: 1.0, 10: 1.0}
    assert retrieval_recall([[0.1]], ["a"], ["a"])["tr_r10"] == 1.0


def test_images_of_one_id_are_all_right_answers() -> None:
    scores = [[0.1, 0.9], [0.9, 0.1]]  # both images show scene 7, so that no pair is wrong
    assert set(retrieval_recall(scores, [7, 7], [7, 7]).values()) == {1.0}


def test_entries_left_out_by_a_first_stage_may_have_minus_infinity() -> None:
    scores = np.array([[-np.inf, -np.inf, 1.0], [2.0, 1.0, -np.inf], [0.0, 1.0, 2.0]])
    assert recall_at_k(scores, [0, 1, 2], [0, 1, 2], ks=(1, 2, 3)) == pytest.approx({1: 1 / 3, 2: 5 / 6, 3: 1.0})


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6).filter(
        lambda pairs: any(right for _, right in pairs)
    ),
    k=st.integers(1, 7),
)
def test_ties_of_entries_count_by_their_expected_value(entries: list[tuple[int, bool]], k: int) -> None:
    scores, right = [float(s) for s, _ in entries], [r for _, r in entries]
    recall = recall_at_k([scores], [1], [1 if r else 0 for r in right], ks=(k,))
    assert recall[k] == pytest.approx(np.mean([any(right[i] for i in order[:k]) for order in orders(scores)]))


def test_more_queries_than_are_compared_at_once() -> None:
    rng = np.random.default_rng(0)
    scores, ids = rng.normal(size=(1100, 300)), rng.integers(0, 40, size=300)
    queries = rng.choice(ids, size=1100)
    slow = np.mean([ids[np.argsort(-row)[:5]].tolist().count(q) > 0 for row, q in zip(scores, queries, strict=True)])
    assert recall_at_k(scores, queries, ids, ks=(5,))[5] == pytest.approx(slow)


def test_the_order_of_the_gallery_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    scores, ids = rng.integers(0, 3, size=(30, 30)).astype(np.float32), np.arange(30)
    order = np.array(random.Random(0).sample(range(30), 30))
    assert recall_at_k(scores, ids, ids) == pytest.approx(recall_at_k(scores[:, order], ids, ids[order]))


# Right candidates: first of four, third of four, and last.
RANKED = [[0.9, 0.1, 0.2, 0.3], [0.4, 0.3, 0.2, 0.1], [5.0, 6.0, 7.0, 1.0]]
ANSWERS = [0, 2, 3]


def gain(order: tuple[int, ...], relevance: list[float]) -> float:
    num_relevant = sum(value != 0 for value in relevance)
    return sum(relevance[c] / math.log2(rank + 2) for rank, c in enumerate(order[:num_relevant]))


def test_ranks_by_hand() -> None:
    ranking = answer_ranking(RANKED, ANSWERS, ks=(1, 3, 10))
    assert ranking == pytest.approx(
        {"mrr": (1 + 1 / 3 + 1 / 4) / 3, "r1": 1 / 3, "r3": 2 / 3, "r10": 1.0, "mean_rank": (1 + 3 + 4) / 3}
    )
    assert list(answer_ranking(RANKED, ANSWERS)) == ["mrr", "r1", "r5", "r10", "mean_rank"]


def test_constant_scores_rank_as_guessing_does() -> None:
    ranking = answer_ranking(np.zeros((3, 100), dtype=np.float32), [0, 50, 99])
    harmonic = sum(1 / rank for rank in range(1, 101)) / 100
    assert ranking == pytest.approx({"mrr": harmonic, "r1": 0.01, "r5": 0.05, "r10": 0.1, "mean_rank": 50.5})


CANDIDATES = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.0, 0.5, 1.0])), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(candidates=CANDIDATES, place=st.integers(0, 5), k=st.integers(1, 7))
def test_ties_count_by_their_expected_value(candidates: list[tuple[int, float]], place: int, k: int) -> None:
    scores, relevance = [float(s) for s, _ in candidates], [r for _, r in candidates]
    right = place % len(scores)
    ranks = [order.index(right) + 1 for order in orders(scores)]
    ranking = answer_ranking([scores], [right], ks=(k,))
    assert ranking == pytest.approx(
        {
            "mrr": np.mean([1 / rank for rank in ranks]),
            f"r{k}": np.mean([rank <= k for rank in ranks]),
            "mean_rank": np.mean(ranks),
        }
    )
    if any(relevance):
        best = max(gain(order, relevance) for order in itertools.permutations(range(len(scores))))
        expected = np.mean([gain(order, relevance) for order in orders(scores)]) / best
        assert ndcg([scores], [relevance]) == pytest.approx(expected)


def test_ndcg_by_hand() -> None:
    relevance = [[0.0, 1.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]]
    scores = [[4.0, 1.0, 3.0, 2.0], [4.0, 3.0, 2.0, 1.0]]
    # Two are relevant, so two ranks count: 0 at rank 1 and .5 at rank 2; the best order has 1 and .5.
    first = (0.5 / math.log2(3)) / (1 + 0.5 / math.log2(3))
    assert ndcg(scores[:1], relevance[:1]) == pytest.approx(first)
    assert ndcg(scores, relevance) == pytest.approx((first + 1) / 2), "the mean over rounds"


def test_rounds_with_fewer_candidates_are_filled_up_with_minus_infinity() -> None:
    padded = [[1.0, 2.0, -np.inf, -np.inf], [1.0, 2.0, 3.0, 4.0]]
    assert answer_ranking(padded, [0, 2])["mean_rank"] == 2.0
    assert ndcg(padded[:1], [[1.0, 0.5, 0.0, 0.0]]) == pytest.approx(ndcg([[1.0, 2.0]], [[1.0, 0.5]]))


def test_accuracies_of_classes_by_hand() -> None:
    scores = np.array(
        [
            [6, 5, 4, 3, 2, 1, 0],  # class 0, first
            [6, 5, 4, 3, 2, 1, 0],  # class 0, first
            [1, 2, 3, 4, 5, 6, 0],  # class 0, sixth
            [6, 5, 4, 3, 2, 1, 0],  # class 4, fifth
        ]
    )
    accuracy = classification_accuracy(scores, [0, 0, 0, 4])
    # Class 0 has 2 of 3, class 4 none of 1; the other five have no images.
    assert accuracy == pytest.approx({"top1": 2 / 4, "top5": 3 / 4, "mean_per_class": (2 / 3 + 0) / 2})


def test_constant_scores_of_classes_count_as_guessing_does() -> None:
    accuracy = classification_accuracy(np.full((6, 10), 0.5, dtype=np.float16), [0, 1, 2, 3, 3, 3])
    assert accuracy == pytest.approx({"top1": 0.1, "top5": 0.5, "mean_per_class": 0.1})


def test_few_classes_are_all_among_the_first_five() -> None:
    assert classification_accuracy([[0.0, 1.0], [0.0, 1.0]], [0, 1]) == {
        "top1": 0.5,
        "top5": 1.0,
        "mean_per_class": 0.5,
    }


FILTER_SCORES = [0.9, 0.8, 0.5, 0.4, 0.1]
CLEAN = [True, False, True, True, False]


def test_one_threshold_by_hand() -> None:
    expected = {"precision": 2 / 3, "recall": 2 / 3, "noise_before": 2 / 5, "noise_after": 1 / 3}
    assert filter_quality(FILTER_SCORES, CLEAN, 0.45) == pytest.approx(expected)


def test_a_score_at_the_threshold_is_not_kept() -> None:
    assert filter_quality([0.5, 0.6], [True, True], 0.5)["recall"] == 0.5


def test_shares_of_nothing_are_none() -> None:
    none_kept = filter_quality(FILTER_SCORES, CLEAN, 1.0)
    assert (none_kept["precision"], none_kept["noise_after"], none_kept["recall"]) == (None, None, 0.0)
    assert filter_quality([0.9], [False], 0.5)["recall"] is None
    assert filter_quality([], [], 0.5)["noise_before"] is None


SCORED = st.lists(st.tuples(st.integers(0, 6).map(lambda n: n / 4), st.booleans()), max_size=30)


@settings(deadline=None)
@given(texts=SCORED, threshold=st.sampled_from([-1.0, 0.0, 0.3, 0.5, 1.0, 1.5, 2.0]))
def test_shares_are_counted(texts: list[tuple[float, bool]], threshold: float) -> None:
    quality = filter_quality([s for s, _ in texts], [c for _, c in texts], threshold)
    kept, clean = [c for s, c in texts if s > threshold], [c for _, c in texts]
    precision = sum(kept) / len(kept) if kept else None
    assert quality == pytest.approx(
        {
            "precision": precision,
            "recall": sum(kept) / sum(clean) if any(clean) else None,
            "noise_before": 1 - sum(clean) / len(clean) if clean else None,
            "noise_after": None if precision is None else 1 - precision,
        }
    )


@settings(deadline=None)
@given(texts=SCORED)
def test_auc_is_the_share_of_pairs_in_order(texts: list[tuple[float, bool]]) -> None:
    pairs = [(c > n) + 0.5 * (c == n) for c, is_clean in texts if is_clean for n, other in texts if not other]
    expected = sum(pairs) / len(pairs) if pairs else None
    assert auc([s for s, _ in texts], [c for _, c in texts]) == pytest.approx(expected)


def test_auc_of_no_separation_and_full_separation() -> None:
    clean = np.arange(100) % 3 == 0
    assert auc(np.full(100, 0.7, dtype=np.float32), clean) == 0.5
    assert auc(clean.astype(np.float32), clean) == 1.0
    assert auc(-clean.astype(np.float32), clean) == 0.0


NAN = float("nan")
TWO = [[0.1, 0.2]]


@pytest.mark.parametrize(
    ("metric", "arguments", "message"),
    [
        (recall_at_k, ([[1.0, 2.0]], [0], [0]), "do not fit"),
        (recall_at_k, ([[1.0, 2.0], [1.0, 2.0]], [0, 5], [0, 1]), r"query 1 \(id 5\)"),
        (recall_at_k, ([[1.0, NAN]], [0], [0, 1]), "not a number"),
        (recall_at_k, (np.zeros((0, 0)), [], []), "do not fit"),
        (recall_at_k, ([[1.0]], [0], [0], (0,)), "ks"),
        (answer_ranking, (RANKED, ANSWERS, (0, 1)), "ks"),
        (answer_ranking, ([], []), r"scores \(0,\)"),
        (answer_ranking, (np.zeros((0, 4)), []), r"scores \(0, 4\)"),
        (answer_ranking, ([[0.1, 0.2], [0.1]], [0, 0]), "scores must be a matrix of numbers"),
        (answer_ranking, ([0.1, 0.2], [0]), r"scores \(2,\)"),
        (answer_ranking, (TWO, [0, 1]), "one whole number per row"),
        (answer_ranking, (TWO, [0.0]), "one whole number per row"),
        (answer_ranking, (TWO * 2, [0, 2]), r"row 1 has a right one outside 0\.\.1"),
        (answer_ranking, (TWO, [-1]), "row 0 has a right one outside"),
        (answer_ranking, ([[0.1, 0.2], [NAN, 0.2]], [0, 1]), "row 1 has scores with a value that is not a number"),
        (ndcg, (TWO, [[1.0]]), "differ in shape"),
        (ndcg, (TWO, [[0.0, 0.0]]), "row 0 has no relevant candidate"),
        (ndcg, (TWO, [[1.0, -0.5]]), "row 0 has a relevance below 0"),
        (ndcg, (TWO, [[1.0, float("inf")]]), "infinite"),
        (ndcg, (TWO, [[1.0, NAN]]), "relevance with a value that is not a number"),
        (ndcg, ([[0.1, NAN]], [[1.0, 1.0]]), "scores with a value that is not a number"),
        (ndcg, ([], []), "scores"),
        (classification_accuracy, ([], []), "scores"),
        (classification_accuracy, (TWO, [0, 0]), "one whole number per row"),
        (classification_accuracy, (TWO, ["dog"]), "one whole number per row"),
        (classification_accuracy, (TWO, [2]), "row 0 has a right one outside"),
        (classification_accuracy, ([[0.1, NAN]], [0]), "row 0 has scores with a value that is not a number"),
        (auc, ([0.1, 0.2], [True]), "one length"),
        (auc, ([0.1, NAN], [True, False]), "score 1 is not a number"),
        (filter_quality, ([0.1, 0.2], [True], 0.5), "one length"),
        (filter_quality, ([0.1, NAN], [True, False], 0.5), "score 1 is not a number"),
    ],
)
def test_what_cannot_be_scored_is_refused(metric: Any, arguments: Any, message: str) -> None:
    name = "filtering" if metric in (auc, filter_quality) else metric.__name__
    with pytest.raises(ConfigError, match=f"{name}: .*{message}"):
        metric(*arguments)


# Four images of ECCV Caption and the captions that are right for them, by COCO's ids, with places in a ranking of all.
ECCV_RIGHT = {
    173391: [171522, 430122, 431724, 428439, 434328, 426171],
    70351: [664675, 266027, 251627, 256115, 224342, 243260],
    28532: [226056, 153708, 504974, 228498, 237396, 426749, 231294],
    540280: [778785, 637715, 775896, 776922, 648155, 778236, 778302],
}
ECCV_RANKED = {
    173391: [16, 1, 13, 17, 14, 10, 19, 22, 0, 18, 11, 6, 21, 23, 9, 15, 4, 8, 24, 2, 5, 20, 7, 12, 3, 25],
    70351: [2, 7, 10, 23, 3, 19, 16, 5, 8, 12, 24, 13, 1, 21, 15, 20, 4, 25, 0, 11, 18, 9, 6, 17, 22, 14],
    28532: [3, 6, 10, 12, 25, 5, 8, 24, 21, 20, 11, 14, 17, 16, 7, 9, 2, 22, 13, 4, 15, 0, 1, 18, 19, 23],
    540280: [23, 18, 25, 16, 12, 22, 0, 3, 17, 2, 10, 9, 1, 8, 21, 6, 15, 20, 11, 13, 24, 4, 14, 5, 19, 7],
}


def test_precision_of_retrieval_is_that_of_eccv_caption() -> None:
    """What compute_eccv_metrics of the reference code (naver-ai/eccv-caption) returns for these ids."""
    gallery = sorted(itertools.chain.from_iterable(ECCV_RIGHT.values()))
    scores = [[-float(ranked.index(place)) for place in range(len(gallery))] for ranked in ECCV_RANKED.values()]
    right = [[caption in captions for caption in gallery] for captions in ECCV_RIGHT.values()]
    measured = precision_at_r(scores, right)
    assert measured == {"map_at_r": pytest.approx(0.5363095238095238), "r_precision": pytest.approx(0.5773809523809523)}


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_precision_of_tied_scores_is_its_mean_over_their_orders(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 6))
    scores = data.draw(st.lists(st.integers(0, 2).map(float), min_size=size, max_size=size))
    right = data.draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
    count, maps, shares = sum(right), [], []
    for order in orders(scores):
        hits = [right[entry] for entry in order[:count]]
        shares.append(sum(hits) / count)
        maps.append(sum(sum(hits[: k + 1]) / (k + 1) * hits[k] for k in range(count)) / count)
    measured = precision_at_r([scores], [right])
    assert measured["map_at_r"] == pytest.approx(np.mean(maps))
    assert measured["r_precision"] == pytest.approx(np.mean(shares))


def test_precision_of_retrieval_goes_both_ways() -> None:
    scores = [[0.9, 0.1, 0.5], [0.2, 0.8, 0.7]]
    both = retrieval_precision(scores, [0, 1], [0, 1, 0])
    assert both == {"tr_map_at_r": 1.0, "tr_r_precision": 1.0, "ir_map_at_r": 2 / 3, "ir_r_precision": 2 / 3}
    own = retrieval_precision(scores, [0, 1], [0, 1, 0], text_to_image=[[1, 0], [0, 1], [1, 0]])
    assert own["ir_map_at_r"] == 1.0
    for hostile, message in (([[1.0, 2.0]], "fit"), ([[1.0, math.nan, 2.0]], "not a number")):
        with pytest.raises(ConfigError, match=message):
            precision_at_r(hostile, [[True, False, False]])
    with pytest.raises(ConfigError, match="row 0 has no right answer"):
        precision_at_r([[1.0, 2.0]], [[False, False]])


def test_curves_of_a_filter_by_hand() -> None:
    curve = filter_curve([0.9, 0.5, 0.5, 0.1], [True, True, False, False])
    assert curve is not None
    assert curve.threshold.tolist() == [0.9, 0.5, 0.1]
    assert curve.recall.tolist() == [0.5, 1.0, 1.0]
    assert curve.false_positive_rate.tolist() == [0.0, 0.5, 1.0]
    assert curve.precision.tolist() == pytest.approx([1, 2 / 3, 1 / 2])
    assert curve.points()[1] == {"threshold": 0.5, "recall": 1.0, "false_positive_rate": 0.5, "precision": 0.666667}
    assert average_precision([0.9, 0.5, 0.5, 0.1], [True, True, False, False]) == pytest.approx(1 / 2 + 1 / 3)
    assert average_precision([0.9], [False]) is None
    assert filter_curve([], []) is None


def test_areas_of_curves() -> None:
    rng = np.random.default_rng(1)
    clean = rng.random(5000) < 0.4
    scores = np.round(rng.normal(size=5000) + clean, 1)  # with ties
    curve = filter_curve(scores, clean, most=1000)
    assert curve is not None
    area = np.trapezoid(np.append(0, curve.recall), np.append(0, curve.false_positive_rate))
    assert area == pytest.approx(auc(scores, clean), abs=1e-9)
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    assert average_precision(scores, clean) == pytest.approx(sklearn_metrics.average_precision_score(clean, scores))
    assert average_precision(np.zeros(5000), clean) == pytest.approx(clean.mean())
    thinned = filter_curve(rng.random(5000), clean, most=50)
    assert thinned is not None
    assert len(thinned.recall) == 50
    assert thinned.recall[-1] == thinned.false_positive_rate[-1] == 1.0
