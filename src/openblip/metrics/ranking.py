"""Metrics of scores that rank: recall and precision of retrieval, where a right answer stands (VisDial,
classification), filters.

Scores are the higher the better. Equal scores count by their expected value under a random order, so that constant
scores rank as guessing does. VisDial's code takes whatever order its sort leaves, and sorting favours what comes first,
which is why these metrics are written here. All raise `ConfigError` for shapes that do not fit and values that are not
numbers.

I images, T texts, Q queries, G gallery entries, R rounds, C candidates or classes, N texts of a filter.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openblip.errors import ConfigError

Counts = NDArray[np.int64]
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

    Also the means that papers print: `tr_mean` and `ir_mean` over `ks`, and `r_mean` of these two. Papers that print
    the sum of the six recalls in percent (RSUM) print 600 times `r_mean`. Raises as `recall_at_k`.

    Args:
        scores: (I, T).
        image_ids: (I,), and `text_ids` (T,): an image and a text belong together where their ids are equal;
            several texts of an image and several images with one id are all right answers.
        ks: a k above the number of texts, or of images, means all of them.
        text_to_image: (T, I), what a text ranks the images by, where re-ranking made that another matrix than
            the transpose of `scores`.
    """
    to_text = recall_at_k(scores, image_ids, text_ids, ks)
    to_image = recall_at_k(np.asarray(scores).T if text_to_image is None else text_to_image, text_ids, image_ids, ks)
    tr_mean, ir_mean = (sum(recall.values()) / len(recall) for recall in (to_text, to_image))
    recalls = {f"tr_r{k}": r for k, r in to_text.items()} | {f"ir_r{k}": r for k, r in to_image.items()}
    return recalls | {"tr_mean": tr_mean, "ir_mean": ir_mean, "r_mean": (tr_mean + ir_mean) / 2}


def recall_at_k(
    scores: ArrayLike, query_ids: ArrayLike, gallery_ids: ArrayLike, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Return the share of queries with a right answer among their k best gallery entries, for every k of `ks`.

    `scores` (Q, G). Right answers are the entries with the query's id. A k above G means all of G. Raises `ConfigError`
    also for a query without a right answer, and for a k below 1.
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
        values, ids = matrix[start : start + ROWS_PER_BLOCK], queries[start : start + ROWS_PER_BLOCK]  # (B, G), (B,)
        if np.isnan(values).any():
            row = int(np.isnan(values).any(axis=1).argmax()) + start
            raise ConfigError(f"recall_at_k: query {row} has a score that is not a number")
        right = ids[:, None] == gallery[None, :]  # (B, G)
        if not right.any(axis=1).all():
            row = int((~right.any(axis=1)).argmax())
            raise ConfigError(f"recall_at_k: query {row + start} (id {ids[row]}) has no right answer; leave it out")
        best = np.where(right, values, -np.inf).max(axis=1, keepdims=True)  # (B, 1)
        above, tied = (values > best).sum(axis=1), values == best
        tied_right, tied_wrong = (tied & right).sum(axis=1), (tied & ~right).sum(axis=1)
        for k in ks:
            # A miss fills all of the k - above places with wrong entries of the tied ones, drawn without replacement.
            miss = np.ones(len(values))
            for drawn in range(k):
                share = np.maximum(tied_wrong - drawn, 0) / np.maximum(tied_wrong + tied_right - drawn, 1)
                miss = np.where(drawn < k - above, miss * share, miss)
            hits[k] += float((1.0 - miss).sum())
    return {k: hit / len(queries) for k, hit in hits.items()}


def retrieval_precision(
    scores: ArrayLike, image_ids: ArrayLike, text_ids: ArrayLike, *, text_to_image: ArrayLike | None = None
) -> dict[str, float]:
    """Return mAP@R and R-Precision of text retrieval (`tr_map_at_r`, `tr_r_precision`) and image retrieval (`ir_...`).

    Arguments as for `retrieval_recall`, metrics as `precision_at_r` computes them.
    """
    images, texts = np.asarray(image_ids), np.asarray(text_ids)
    right = images[:, None] == texts[None, :]  # (I, T)
    to_text = precision_at_r(scores, right)
    to_image = precision_at_r(np.asarray(scores).T if text_to_image is None else text_to_image, right.T)
    return {f"tr_{name}": value for name, value in to_text.items()} | {f"ir_{n}": v for n, v in to_image.items()}


def precision_at_r(scores: ArrayLike, right: ArrayLike) -> dict[str, float]:
    """Return `map_at_r` and `r_precision` in [0, 1], as ECCV Caption defines them (arXiv 2204.03359, section 4).

    With R the number of right answers of a query, its R-Precision is the share of right ones among its R best gallery
    entries, and its mAP@R the mean over the ranks k up to R of the precision among the k best where the entry of rank k
    is right, and of 0 where it is not. Both are means over queries, and recall@1 where every query has one right
    answer.

    Args:
        scores: (Q, G).
        right: (Q, G) bool, which entries are right answers; at least one of every query.
    """
    matrix, truth = np.asarray(scores), np.asarray(right, dtype=bool)
    if matrix.ndim != 2 or truth.shape != matrix.shape or matrix.size == 0:
        raise ConfigError(f"precision_at_r: scores {matrix.shape} do not fit right answers {truth.shape}")
    _raise_on("precision_at_r", np.isnan(matrix).any(axis=1), "a score that is not a number")
    _raise_on("precision_at_r", ~truth.any(axis=1), "no right answer; leave it out")
    sums = np.zeros(2)
    for values, is_right in zip(matrix, truth, strict=True):
        count = int(is_right.sum())  # R
        best = values >= np.partition(values, -count)[-count]  # the R best, and those tied with the last of them
        _, group, sizes = np.unique(-values[best], return_inverse=True, return_counts=True)
        right_in = np.bincount(group, weights=is_right[best])  # of each group of tied entries
        before, right_before = (np.cumsum(each) - each for each in (sizes, right_in))
        rank = np.arange(1, count + 1)
        of = np.repeat(np.arange(len(sizes)), sizes)[:count]  # the group of every rank
        chance = right_in[of] / sizes[of]  # that the entry of the rank is right, and if so how many up to it are
        within = (rank - before[of] - 1) * (right_in[of] - 1) / np.maximum(sizes[of] - 1, 1)
        sums += (chance * (right_before[of] + within + 1) / rank).mean(), chance.mean()
    return dict(zip(("map_at_r", "r_precision"), (sums / len(matrix)).tolist(), strict=True))


def answer_ranking(scores: ArrayLike, answer_index: ArrayLike, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Return the answers' `mrr` (mean reciprocal rank), `r1`, ... (share of ranks up to k) and `mean_rank` (from 1).

    `scores` (R, C); shorter lists of candidates are filled up with minus infinity. `answer_index` (R,) int: the right
    candidate of every round. A k above C means all of C. Raises `ConfigError` also for no rounds, an answer that is not
    among the candidates, and a k below 1.
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

    `scores` as for `answer_ranking`; `relevance` (R, C), from 0 on: the share of annotators who took the candidate for
    right. A round's gain is the sum over its K best candidates of relevance / log2(rank + 1), with K the number of
    candidates whose relevance is not 0, divided by the gain of the best order. Raises `ConfigError` also for a negative
    relevance, and for a round without a relevant candidate.
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
    gained = np.empty_like(gains)  # relevance at every rank; tied candidates share their mean relevance
    for row in range(len(values)):
        order = np.argsort(-values[row], kind="stable")
        _, group, sizes = np.unique(-values[row][order], return_inverse=True, return_counts=True)
        gained[row] = (np.bincount(group, weights=gains[row][order]) / sizes)[group]
    return float(((gained * discounts).sum(axis=1) / (best * discounts).sum(axis=1)).mean())


def classification_accuracy(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Return `top1`, `top5` and `mean_per_class`, in [0, 1].

    `scores` (I, C); `labels` (I,) int, the right class of every image. `mean_per_class` is the mean over classes of
    their images' top-1 accuracy; a class without images does not count. With five classes or fewer `top5` is 1. Raises
    `ConfigError` also for no images, and a label that is not a class.
    """
    above, tied = _count_above_and_tied("classification_accuracy", scores, labels)
    first = _share_of_first(above, tied, 1)
    _, group, sizes = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    return {
        "top1": float(first.mean()),
        "top5": float(_share_of_first(above, tied, 5).mean()),
        "mean_per_class": float((np.bincount(group, weights=first) / sizes).mean()),
    }


def filter_quality(scores: ArrayLike, clean: ArrayLike, threshold: float) -> dict[str, float | None]:
    """Return the shares of a filter that keeps texts with scores (N,) above `threshold` (BLIP section 3.3).

    `clean` (N,) bool is the truth. `precision`: kept texts that are clean; `recall`: clean texts that are kept;
    `noise_before` and `noise_after`: noisy texts among all and among the kept. A share of nothing is None.
    """
    values, truth = _check_filtering(scores, clean)
    kept = values > threshold
    parts = {"precision": truth[kept], "recall": kept[truth], "noise_before": ~truth, "noise_after": ~truth[kept]}
    return {name: int(part.sum()) / len(part) if len(part) else None for name, part in parts.items()}


def auc(scores: ArrayLike, clean: ArrayLike) -> float | None:
    """Return the area under the ROC curve: how probably a clean text (N,) scores above a noisy one.

    A tie counts half. Computed from ranks (Mann-Whitney), in O(N log N). None unless there are both clean and
    noisy texts.
    """
    values, truth = _check_filtering(scores, clean)
    num_clean, num_noisy = int(truth.sum()), int((~truth).sum())
    if num_clean == 0 or num_noisy == 0:
        return None
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(sizes) - (sizes - 1) / 2  # ranks from 1; equal scores share their mean rank
    rank_sum = float(mean_rank[group][truth].sum())
    return (rank_sum - num_clean * (num_clean + 1) / 2) / (num_clean * num_noisy)


class FilterCurve(NamedTuple):
    """What a filter does at each of P thresholds, from the highest to the lowest, as float arrays (P,)."""

    threshold: NDArray[np.float64]
    """The lowest score that is kept."""
    recall: NDArray[np.float64]
    """The share of clean texts that are kept."""
    false_positive_rate: NDArray[np.float64]
    """The share of noisy texts that are kept."""
    precision: NDArray[np.float64]
    """The share of kept texts that are clean."""

    def points(self) -> list[dict[str, float]]:
        """The thresholds one by one, as JSON has them."""
        rows = zip(*(np.round(values, 6).tolist() for values in self), strict=True)
        return [dict(zip(self._fields, row, strict=True)) for row in rows]


def filter_curve(scores: ArrayLike, clean: ArrayLike, most: int | None = 200) -> FilterCurve | None:
    """Return ROC and precision-recall curve of a filter: a point for each score (N,) that occurs, or `most` of them.

    A share of nothing is 0. None of no text.
    """
    values, truth = _check_filtering(scores, clean)
    if not len(values):
        return None
    order = np.argsort(-values, kind="stable")
    last = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))  # the last of equal scores
    if most is not None:
        last = last[np.unique(np.linspace(0, len(last) - 1, most).astype(int))]
    true, false = np.cumsum(truth[order])[last], np.cumsum(~truth[order])[last]
    rates = (true / max(int(truth.sum()), 1), false / max(int((~truth).sum()), 1), true / (true + false))
    return FilterCurve(values[order][last], *rates)


def average_precision(scores: ArrayLike, clean: ArrayLike) -> float | None:
    """Return the area under the precision-recall curve as a sum over its steps; equal scores (N,) are one step.

    That of a filter that knows nothing is the share of clean texts. None without a clean text.
    """
    curve = filter_curve(scores, clean, most=None)
    if curve is None or curve.recall[-1] == 0:
        return None
    return float((np.diff(curve.recall, prepend=0.0) * curve.precision).sum())


def _count_above_and_tied(metric: str, scores: ArrayLike, answer_index: ArrayLike) -> tuple[Counts, Counts]:
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


def _share_of_first(above: Counts, tied: Counts, k: int) -> NDArray[np.float64]:
    """The probability (R,) that the right one is among the first k, when tied ones come in random order."""
    return np.clip((k - above) / tied, 0.0, 1.0)


def _check_filtering(scores: ArrayLike, clean: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(clean, dtype=bool)
    if values.ndim != 1 or values.shape != truth.shape:
        raise ConfigError(f"filtering: scores {values.shape} and clean {truth.shape} must be two lists of one length")
    if np.isnan(values).any():
        raise ConfigError(f"filtering: score {int(np.isnan(values).argmax())} is not a number")
    return values, truth


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
