"""Recall of image-text retrieval.

Written here because equal scores count by their expected value, where sorting them favours what comes first.

I images, T texts, Q queries, G gallery entries.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openblip.errors import ConfigError

ROWS_PER_BLOCK = 512  # bounds the memory of the comparisons at ROWS_PER_BLOCK x G


def retrieval_recall(
    scores: ArrayLike,
    image_ids: ArrayLike,
    text_ids: ArrayLike,
    ks: Sequence[int] = (1, 5, 10),
    *,
    text_to_image: ArrayLike | None = None,
) -> dict[str, float]:
    """Return the recall in [0, 1] of text retrieval (`tr_r1`, ...) and of image retrieval (`ir_r1`, ...).

    Also the means that papers print: `tr_mean` and `ir_mean` over `ks`, and `r_mean` of these two. Papers that
    print the sum of the six recalls in percent (RSUM) print 600 times `r_mean`.

    Args:
        scores: (I, T), the higher the better.
        image_ids: (I,), and `text_ids` (T,): an image and a text belong together where their ids are equal;
            several texts of an image and several images with one id are all right answers.
        ks: a k above the number of texts, or of images, means all of them.
        text_to_image: (T, I), what a text ranks the images by, where re-ranking made that another matrix than
            the transpose of `scores`.

    Raises:
        ConfigError: shapes that do not fit, a score that is not a number, or a query without a right answer.
    """
    to_text = recall_at_k(scores, image_ids, text_ids, ks)
    to_image = recall_at_k(np.asarray(scores).T if text_to_image is None else text_to_image, text_ids, image_ids, ks)
    tr_mean, ir_mean = (sum(recall.values()) / len(recall) for recall in (to_text, to_image))
    return {
        **{f"tr_r{k}": r for k, r in to_text.items()},
        **{f"ir_r{k}": r for k, r in to_image.items()},
        "tr_mean": tr_mean,
        "ir_mean": ir_mean,
        "r_mean": (tr_mean + ir_mean) / 2,
    }


def recall_at_k(
    scores: ArrayLike, query_ids: ArrayLike, gallery_ids: ArrayLike, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Return the share of queries with a right answer among their k best gallery entries, for every k of `ks`.

    `scores` (Q, G). Right answers are the entries with the query's id. Equal scores count by their expected
    value under a random order, so a constant matrix scores what guessing does. A k above G means all of G.
    Raises `ConfigError` as `retrieval_recall`, and for a k below 1.
    """
    matrix, queries, gallery = np.asarray(scores), np.asarray(query_ids), np.asarray(gallery_ids)
    if matrix.shape != (len(queries), len(gallery)) or matrix.size == 0:
        raise ConfigError(
            f"recall_at_k: scores {matrix.shape} do not fit {len(queries)} queries and {len(gallery)} entries"
        )
    if min(ks, default=0) < 1:
        raise ConfigError(f"recall_at_k: ks is {list(ks)}; give numbers from 1 on")
    hits = dict.fromkeys(ks, 0.0)
    for start in range(0, len(queries), ROWS_PER_BLOCK):
        rows = slice(start, start + ROWS_PER_BLOCK)
        above, tied_right, tied_wrong = _count_around_best(matrix[rows], queries[rows], gallery, start)
        for k in ks:
            hits[k] += float(_hit_probability(above, tied_right, tied_wrong, k).sum())
    return {k: hit / len(queries) for k, hit in hits.items()}


def _count_around_best(
    scores: NDArray[np.generic], queries: NDArray[np.generic], gallery: NDArray[np.generic], start: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Three counts (Q,): entries above the query's best right answer, right and wrong ones tied with it."""
    if np.isnan(scores).any():
        row = int(np.isnan(scores).any(axis=1).argmax()) + start
        raise ConfigError(f"recall_at_k: query {row} has a score that is not a number")
    right = queries[:, None] == gallery[None, :]  # (Q, G)
    if not right.any(axis=1).all():
        row = int((~right.any(axis=1)).argmax())
        raise ConfigError(f"recall_at_k: query {row + start} (id {queries[row]}) has no right answer; leave it out")
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)  # (Q, 1)
    tied = scores == best
    return (scores > best).sum(axis=1), (tied & right).sum(axis=1), (tied & ~right).sum(axis=1)


def _hit_probability(
    above: NDArray[np.int64], tied_right: NDArray[np.int64], tied_wrong: NDArray[np.int64], k: int
) -> NDArray[np.float64]:
    """Probability (Q,) that a right answer is in the first k, when tied entries come in random order.

    A miss fills all of the k - above places with wrong entries, drawn without replacement.
    """
    miss = np.ones(len(above))
    for drawn in range(k):
        wrong = np.maximum(tied_wrong - drawn, 0)
        share = wrong / np.maximum(tied_wrong + tied_right - drawn, 1)
        miss = np.where(drawn < k - above, miss * share, miss)
    return 1.0 - miss
