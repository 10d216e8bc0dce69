"""95 % confidence intervals of shares and of areas under ROC curves, as functions of counts and values.

Both are intervals of scores (Wilson's): the values that the observation does not contradict. They do not shrink to a
point where all of a few answers are right, as the usual value plus or minus two standard errors does.
"""

from collections.abc import Callable
from math import sqrt
from typing import NamedTuple

NORMAL_QUANTILE = 1.959964  # of 97.5 %


class Interval(NamedTuple):
    """An observed value, and the lower and upper end of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def share_interval(count: float, total: float) -> Interval | None:
    """The share of `count` in `total` independent observations, with Wilson's interval; None of no observation.

    The numbers need not be whole: of weighted observations they are the effective ones.
    """
    if total <= 0:
        return None
    share = count / total
    return _interval(share, lambda value: value * (1 - value) / total)


def auc_interval(auc: float, num_clean: int, num_noisy: int) -> Interval:
    """An area under the ROC curve of so many clean and noisy texts, with Newcombe's interval (2006, method 5).

    It is made of the variance that Hanley and McNeil give (1982), in which both numbers are replaced by their mean
    where they stand for the spread of either side.
    """
    extra = (num_clean + num_noisy) / 2 - 1

    def variance(value: float) -> float:
        spread = (1 - value) / (2 - value) + value / (1 + value)
        return value * (1 - value) * (1 + extra * spread) / (num_clean * num_noisy)

    return _interval(auc, variance)


def _interval(observed: float, variance: Callable[[float], float]) -> Interval:
    """The values from which the observation is at most `NORMAL_QUANTILE` standard deviations away, by bisection.

    variance: of an observation, where this is the true value; it is 0 at 0 and at 1.
    """

    def end(outer: float) -> float:
        inner = observed  # not contradicted, and `outer` is
        for _ in range(60):
            middle = (inner + outer) / 2
            if abs(middle - observed) <= NORMAL_QUANTILE * sqrt(max(variance(middle), 0.0)):
                inner = middle
            else:
                outer = middle
        return inner

    return Interval(observed, min(end(0.0), observed), max(end(1.0), observed))
