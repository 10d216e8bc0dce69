"""How well a filter separates clean texts from noisy ones, where the truth is known.

N texts. `clean` (N,) bool is the truth; a text is kept where its score is above the threshold (BLIP section 3.3).
A value that is not defined is None: the precision of a filter that keeps no text, the recall where none is clean.
Written here because it is a few lines, and scikit-learn is no dependency.
"""

from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openblip.errors import ConfigError


class FilterQuality(TypedDict):
    """A filter at one threshold, as shares in [0, 1]."""

    precision: float | None
    """Share of the kept texts that are clean."""
    recall: float | None
    """Share of the clean texts that are kept."""
    noise_before: float | None
    """Share of noisy texts among all."""
    noise_after: float | None
    """Share of noisy texts among the kept."""


def filter_quality(scores: ArrayLike, clean: ArrayLike, threshold: float) -> FilterQuality:
    """Return precision, recall and noise before and after keeping the texts with scores (N,) above `threshold`.

    Raises `ConfigError` when `scores` and `clean` differ in length, or a score is not a number.
    """
    values, truth = _checked(scores, clean)
    kept = values > threshold
    return {
        "precision": _share(truth[kept]),
        "recall": _share(kept[truth]),
        "noise_before": _share(~truth),
        "noise_after": _share(~truth[kept]),
    }


def auc(scores: ArrayLike, clean: ArrayLike) -> float | None:
    """Return the area under the ROC curve: how probably a clean text scores above a noisy one.

    A tie counts half. Computed from ranks (Mann-Whitney), in O(N log N). None unless there are both clean and
    noisy texts. Raises as `filter_quality`.
    """
    values, truth = _checked(scores, clean)
    num_clean, num_noisy = int(truth.sum()), int((~truth).sum())
    if num_clean == 0 or num_noisy == 0:
        return None
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(sizes) - (sizes - 1) / 2  # ranks from 1; equal scores share their mean rank
    rank_sum = float(mean_rank[group][truth].sum())
    return (rank_sum - num_clean * (num_clean + 1) / 2) / (num_clean * num_noisy)


def _checked(scores: ArrayLike, clean: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(clean, dtype=bool)
    if values.ndim != 1 or values.shape != truth.shape:
        raise ConfigError(f"filtering: scores {values.shape} and clean {truth.shape} must be two lists of one length")
    if np.isnan(values).any():
        raise ConfigError(f"filtering: score {int(np.isnan(values).argmax())} is not a number")
    return values, truth


def _share(condition: NDArray[np.bool_]) -> float | None:
    return int(condition.sum()) / len(condition) if len(condition) else None
