import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openblip.errors import ConfigError
from openblip.metrics.ranking import answer_ranking, classification_accuracy, ndcg

# Right candidates: first of four, third of four, and last.
SCORES = [[0.9, 0.1, 0.2, 0.3], [0.4, 0.3, 0.2, 0.1], [5.0, 6.0, 7.0, 1.0]]
ANSWERS = [0, 2, 3]


def orders(scores: list[float]) -> list[tuple[int, ...]]:
    """Every order of the candidates that their scores allow."""
    return [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]


def gain(order: tuple[int, ...], relevance: list[float]) -> float:
    num_relevant = sum(value != 0 for value in relevance)
    return sum(relevance[c] / math.log2(rank + 2) for rank, c in enumerate(order[:num_relevant]))


def test_ranks_by_hand() -> None:
    ranking = answer_ranking(SCORES, ANSWERS, ks=(1, 3, 10))
    assert ranking == pytest.approx(
        {"mrr": (1 + 1 / 3 + 1 / 4) / 3, "r1": 1 / 3, "r3": 2 / 3, "r10": 1.0, "mean_rank": (1 + 3 + 4) / 3}
    )
    assert list(answer_ranking(SCORES, ANSWERS)) == ["mrr", "r1", "r5", "r10", "mean_rank"]


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


@pytest.mark.parametrize(
    ("scores", "answers", "message"),
    [
        ([], [], r"scores \(0,\)"),
        (np.zeros((0, 4)), [], r"scores \(0, 4\)"),
        ([[0.1, 0.2], [0.1]], [0, 0], "scores must be a matrix of numbers"),
        ([0.1, 0.2], [0], r"scores \(2,\)"),
        ([[0.1, 0.2]], [0, 1], "one whole number per row"),
        ([[0.1, 0.2]], [0.0], "one whole number per row"),
        ([[0.1, 0.2], [0.1, 0.2]], [0, 2], r"row 1 has a right one outside 0\.\.1"),
        ([[0.1, 0.2]], [-1], "row 0 has a right one outside"),
        ([[0.1, 0.2], [float("nan"), 0.2]], [0, 1], "row 1 has scores with a value that is not a number"),
    ],
)
def test_rounds_that_cannot_be_ranked_are_refused(scores: object, answers: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"answer_ranking: .*{message}"):
        answer_ranking(scores, answers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scores", "relevance", "message"),
    [
        ([[0.1, 0.2]], [[1.0]], "differ in shape"),
        ([[0.1, 0.2]], [[0.0, 0.0]], "row 0 has no relevant candidate"),
        ([[0.1, 0.2]], [[1.0, -0.5]], "row 0 has a relevance below 0"),
        ([[0.1, 0.2]], [[1.0, float("inf")]], "infinite"),
        ([[0.1, 0.2]], [[1.0, float("nan")]], "relevance with a value that is not a number"),
        ([[0.1, float("nan")]], [[1.0, 1.0]], "scores with a value that is not a number"),
        ([], [], "scores"),
    ],
)
def test_relevance_that_cannot_be_counted_is_refused(scores: object, relevance: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"ndcg: .*{message}"):
        ndcg(scores, relevance)  # type: ignore[arg-type]


def test_a_k_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="ks"):
        answer_ranking(SCORES, ANSWERS, ks=(0, 1))


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


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([], [], "scores"),
        ([[0.1, 0.2]], [0, 0], "one whole number per row"),
        ([[0.1, 0.2]], ["dog"], "one whole number per row"),
        ([[0.1, 0.2]], [2], "row 0 has a right one outside"),
        ([[0.1, float("nan")]], [0], "row 0 has scores with a value that is not a number"),
    ],
)
def test_classes_that_cannot_be_scored_are_refused(scores: object, labels: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"classification_accuracy: .*{message}"):
        classification_accuracy(scores, labels)  # type: ignore[arg-type]
