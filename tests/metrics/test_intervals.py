"""Intervals hold the true value as often as they say, and never shrink to a point."""

import numpy as np
import pytest

from openblip.metrics.intervals import auc_interval, share_interval
from openblip.metrics.ranking import auc


@pytest.mark.parametrize(
    ("count", "total", "low", "high"), [(10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (81, 263, 0.2553, 0.3662)]
)
def test_a_share_has_the_interval_of_newcombes_tables(count: int, total: int, low: float, high: float) -> None:
    interval = share_interval(count, total)
    assert interval is not None
    assert interval == pytest.approx((count / total, low, high), abs=1e-4)
    assert share_interval(0, 0) is None


@pytest.mark.parametrize("shift", [0.0, 1.5, 3.0])
def test_an_auc_is_within_its_interval_in_19_of_20_draws(shift: float) -> None:
    rng = np.random.default_rng(0)
    clean = np.repeat([True, False], [60, 100])
    true = float((rng.normal(shift, size=10**6) > rng.normal(size=10**6)).mean())
    hits = 0
    for _ in range(400):
        value = auc(rng.normal(size=160) + shift * clean, clean)
        assert value is not None
        _, low, high = auc_interval(value, 60, 100)
        hits += low <= true <= high
    assert 0.92 <= hits / 400 <= 0.995
    assert auc_interval(1.0, 60, 100).low < 0.98  # 160 texts in the right order do not make an AUC of 1 certain
