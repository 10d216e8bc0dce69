import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openblip.errors import ConfigError
from openblip.metrics.retrieval import recall_at_k, retrieval_recall


def recall_over_all_orders(scores: list[float], right: list[bool], k: int) -> float:
    """One query by brute force: every order of the gallery that the scores allow, equally likely."""
    hits, orders = 0, 0
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            orders += 1
            hits += any(right[i] for i in order[:k])
    return hits / orders


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
def test_ties_count_by_their_expected_value(entries: list[tuple[int, bool]], k: int) -> None:
    scores, right = [float(s) for s, _ in entries], [r for _, r in entries]
    recall = recall_at_k([scores], [1], [1 if r else 0 for r in right], ks=(k,))
    assert recall[k] == pytest.approx(recall_over_all_orders(scores, right, k))


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


@pytest.mark.parametrize(
    ("scores", "queries", "gallery", "message"),
    [
        ([[1.0, 2.0]], [0], [0], "do not fit"),
        ([[1.0, 2.0], [1.0, 2.0]], [0, 5], [0, 1], r"query 1 \(id 5\)"),
        ([[1.0, float("nan")]], [0], [0, 1], "not a number"),
        (np.zeros((0, 0)), [], [], "do not fit"),
    ],
)
def test_what_cannot_be_scored_is_refused(scores: object, queries: object, gallery: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recall_at_k(scores, queries, gallery)  # type: ignore[arg-type]


def test_a_k_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="ks"):
        recall_at_k([[1.0]], [0], [0], ks=(0,))
