"""Where one right answer stands among candidates: metrics of dialogs (VisDial) and of classification.

R rounds, I images, C candidates or classes. Scores (R, C) or (I, C), the higher the better. Equal scores
count by their expected value under a random order, so that constant scores rank as guessing does. VisDial's
code takes whatever order its sort leaves, which is why these metrics are written here.
Lists of candidates of unequal length are filled up with scores of minus infinity.

Each function raises `ConfigError` for no rows, shapes that do not fit, and values that are not numbers.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openblip.errors import ConfigError


def answer_ranking(scores: ArrayLike, answer_index: ArrayLike, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Return the answers' `mrr` (mean reciprocal rank), `r1`, ... (share of ranks up to k) and `mean_rank` (from 1).

    `answer_index` (R,) int: the right candidate of every round. A k above C means all of C. Raises `ConfigError` also
    for an answer that is not among the candidates, and for a k below 1.
    """
    if min(ks, default=0) < 1:
        raise ConfigError(f"answer_ranking: ks is {list(ks)}; give numbers from 1 on")
    above, tied = _count_above_and_tied("answer_ranking", scores, answer_index)
    # The rank is each of above + 1, ..., above + tied with the same probability.
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, int((above + tied).max()) + 1))])
    reciprocal = (harmonic[above + tied] - harmonic[above]) / tied
    return {
        "mrr": float(reciprocal.mean()),
        **{f"r{k}": float(_share_of_first(above, tied, k).mean()) for k in ks},
        "mean_rank": float((above + (tied + 1) / 2).mean()),
    }


def ndcg(scores: ArrayLike, relevance: ArrayLike) -> float:
    """Return the normalised discounted cumulative gain of the annotated rounds, in [0, 1], as the VisDial challenge's.

    `relevance` (R, C), from 0 on: the share of annotators who took the candidate for right. A round's gain is
    the sum over its K best candidates of relevance / log2(rank + 1), with K the number of candidates whose
    relevance is not 0, divided by the gain of the best order. Raises `ConfigError` also for a negative relevance, and
    for a round without a relevant candidate.
    """
    values, gains = _matrix("ndcg", "scores", scores), _matrix("ndcg", "relevance", relevance)
    if values.shape != gains.shape:
        raise ConfigError(f"ndcg: scores {values.shape} and relevance {gains.shape} differ in shape")
    _raise_on("ndcg", (np.isinf(gains) | (gains < 0)).any(axis=1), "a relevance below 0 or infinite")
    _raise_on("ndcg", (gains == 0).all(axis=1), "no relevant candidate; leave it out")
    num_relevant = (gains != 0).sum(axis=1, keepdims=True)
    rank = np.arange(1, values.shape[1] + 1)
    discounts = np.where(rank <= num_relevant, 1 / np.log2(rank + 1), 0.0)  # (R, C)
    best = -np.sort(-gains, axis=1)
    gained = np.stack([_expected_order(*round_) for round_ in zip(values, gains, strict=True)])
    return float(((gained * discounts).sum(axis=1) / (best * discounts).sum(axis=1)).mean())


def classification_accuracy(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Return `top1`, `top5` and `mean_per_class`, in [0, 1].

    `scores` (I, C), the higher the better; `labels` (I,) int, the right class of every image.
    `mean_per_class` is the mean over classes of their images' top-1 accuracy; a class without images does not
    count. With five classes or fewer `top5` is 1. Raises `ConfigError` also for a label that is not a class.
    """
    above, tied = _count_above_and_tied("classification_accuracy", scores, labels)
    first = _share_of_first(above, tied, 1)
    _, group, sizes = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    return {
        "top1": float(first.mean()),
        "top5": float(_share_of_first(above, tied, 5).mean()),
        "mean_per_class": float((np.bincount(group, weights=first) / sizes).mean()),
    }


def _count_above_and_tied(
    metric: str, scores: ArrayLike, answer_index: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two counts (R,): candidates above the right one, and those tied with it, itself included."""
    values, index = _matrix(metric, "scores", scores), np.asarray(answer_index)
    if index.shape != (len(values),) or not np.issubdtype(index.dtype, np.integer):
        raise ConfigError(
            f"{metric}: scores {values.shape} need one whole number per row for the right one, "
            f"not {index.dtype} {index.shape}"
        )
    _raise_on(metric, (index < 0) | (index >= values.shape[1]), f"a right one outside 0..{values.shape[1] - 1}")
    right = values[np.arange(len(values)), index][:, None]
    return (values > right).sum(axis=1), (values == right).sum(axis=1)


def _share_of_first(above: NDArray[np.int64], tied: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """The probability (R,) that the right one is among the first k, when tied ones come in random order."""
    return np.clip((k - above) / tied, 0.0, 1.0)


def _expected_order(scores: NDArray[np.float64], gains: NDArray[np.float64]) -> NDArray[np.float64]:
    """Relevance (C,) at every rank; tied candidates share their mean relevance."""
    order = np.argsort(-scores, kind="stable")
    _, group, sizes = np.unique(-scores[order], return_inverse=True, return_counts=True)
    return (np.bincount(group, weights=gains[order]) / sizes)[group]


def _matrix(metric: str, name: str, values: ArrayLike) -> NDArray[np.float64]:
    try:
        matrix = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{metric}: {name} must be a matrix of numbers; numpy says: {error}") from error
    if matrix.ndim != 2 or matrix.size == 0:
        raise ConfigError(f"{metric}: {name} {matrix.shape} must be a matrix with at least one row and column")
    _raise_on(metric, np.isnan(matrix).any(axis=1), f"{name} with a value that is not a number")
    return matrix


def _raise_on(metric: str, rows: NDArray[np.bool_] | np.bool_, what: str) -> None:
    if rows.any():
        raise ConfigError(f"{metric}: row {int(rows.argmax())} has {what}")
