"""Calibration: whether what is said with confidence p is right in a share p of cases (Guo et al., arXiv 1706.04599).

N predictions, B bins.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from openblip.errors import ConfigError
from openblip.metrics.intervals import Interval, share_interval

_RESAMPLES = 500


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The predictions whose confidence lies between `low` and `high`: a point of the reliability curve."""

    low: float
    high: float
    count: int
    confidence: float
    """Their mean."""
    accuracy: Interval
    """The share that is right."""


def reliability_curve(confidence: ArrayLike, is_right: ArrayLike, num_bins: int = 10) -> list[ReliabilityBin]:
    """Return the equal bins of [0, 1] in which there are predictions (N,), from the lowest.

    `confidence` is the probability that a prediction is right, in [0, 1], and `is_right` whether it is, also as a share
    in [0, 1] (VQA accuracy). Raises `ConfigError` for anything else, and for no prediction.
    """
    values, truth, numbers = _binned("reliability_curve", confidence, is_right, num_bins)
    bins = []
    for number in np.unique(numbers).tolist():
        within = numbers == number
        accuracy = share_interval(float(truth[within].sum()), int(within.sum()))
        assert accuracy is not None
        ends = (number / num_bins, (number + 1) / num_bins)
        bins.append(ReliabilityBin(*ends, int(within.sum()), float(values[within].mean()), accuracy))
    return bins


def expected_calibration_error(
    confidence: ArrayLike, is_right: ArrayLike, num_bins: int = 10, seed: int = 0
) -> Interval:
    """Return the mean over predictions (N,) of the distance between a bin's confidence and its accuracy.

    The interval is that of the basic bootstrap, which is drawn from `seed`: few predictions have an error by chance,
    and resamples have more of it, so that it reaches further down than up. Raises as `reliability_curve`.
    """
    values, truth, numbers = _binned("expected_calibration_error", confidence, is_right, num_bins)
    gaps = values - truth

    def error(rows: Any) -> float:
        return float(np.abs(np.bincount(numbers[rows], weights=gaps[rows])).sum() / len(gaps))

    observed, rng = error(slice(None)), np.random.default_rng(seed)
    resampled = [error(rng.integers(len(gaps), size=len(gaps))) for _ in range(_RESAMPLES)]
    low, high = (2 * observed - np.quantile(resampled, [0.975, 0.025])).tolist()
    return Interval(observed, min(max(low, 0.0), observed), max(high, observed))


def calibration_report(confidence: Sequence[float], is_right: Sequence[float]) -> dict[str, Any]:
    """Return `ece` with its interval, the mean `confidence` and `accuracy`, and the `reliability` curve, as JSON."""
    error = expected_calibration_error(confidence, is_right)
    curve = reliability_curve(confidence, is_right)
    return {
        "ece": error.value,
        "ece_interval": [error.low, error.high],
        "confidence": float(np.mean(confidence)),
        "accuracy": float(np.mean(is_right)),
        "reliability": [{**asdict(each), "accuracy": each.accuracy._asdict()} for each in curve],
    }


def _binned(
    metric: str, confidence: ArrayLike, is_right: ArrayLike, num_bins: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    values, truth = np.asarray(confidence, dtype=np.float64), np.asarray(is_right, dtype=np.float64)
    if values.ndim != 1 or values.shape != truth.shape or not len(values):
        raise ConfigError(f"{metric}: {values.shape} confidences and {truth.shape} truths must be lists of one length")
    if num_bins < 1:
        raise ConfigError(f"{metric}: num_bins is {num_bins}; give a number from 1 on")
    for name, each in (("confidence", values), ("truth", truth)):
        if not ((each >= 0) & (each <= 1)).all():
            raise ConfigError(f"{metric}: a {name} is not within 0 and 1")
    return values, truth, np.minimum((values * num_bins).astype(np.int64), num_bins - 1)
