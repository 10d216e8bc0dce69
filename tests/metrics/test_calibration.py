"""Calibration by hand, and intervals that hold what they should."""

import numpy as np
import pytest

from openblip.errors import ConfigError
from openblip.metrics.calibration import calibration_report, expected_calibration_error, reliability_curve


def test_bins_and_error_by_hand() -> None:
    confidence, is_right = [0.0, 0.05, 0.62, 0.68, 1.0], [0.0, 1.0, 0.5, 1.0, 1.0]
    first, middle, last = reliability_curve(confidence, is_right)
    assert (first.low, first.high, first.count, first.confidence) == (0.0, 0.1, 2, 0.025)
    assert first.accuracy.value == 0.5
    assert (middle.low, middle.count, middle.accuracy.value) == (0.6, 2, 0.75)
    assert middle.confidence == pytest.approx(0.65)
    assert (last.high, last.count, last.accuracy.value) == (1.0, 1, 1.0)
    assert last.accuracy.low < 0.3  # of one
    error = expected_calibration_error(confidence, is_right)
    assert error.value == pytest.approx((2 * 0.475 + 2 * 0.1 + 0) / 5)
    assert 0 <= error.low <= error.value <= error.high
    report = calibration_report(confidence, is_right)
    assert report["ece"] == error.value
    assert report["accuracy"] == pytest.approx(0.7)
    assert report["reliability"][1]["accuracy"]["value"] == 0.75


def test_the_interval_holds_the_true_error() -> None:
    rng, held = np.random.default_rng(0), 0
    for seed in range(40):
        confidence = rng.choice([0.25, 0.65, 0.95], size=300)
        is_right = rng.random(300) < confidence - 0.15  # an error of 0.15
        error = expected_calibration_error(confidence, is_right, seed=seed)
        held += error.low <= 0.15 <= error.high
    assert held >= 34  # of 40, where 38 are expected
    # Few predictions that are calibrated have an error by chance, and the interval reaches down from it.
    by_chance = []
    for seed in range(20):
        confidence = rng.random(80)
        by_chance.append(expected_calibration_error(confidence, rng.random(80) < confidence, seed=seed))
    assert np.mean([error.value for error in by_chance]) > 0.08
    assert np.mean([error.low for error in by_chance]) < 0.03
    calm = expected_calibration_error([0.5] * 100, [True, False] * 50)
    assert (calm.value, calm.low) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("confidence", "is_right"), [([], []), ([0.5], [1, 0]), ([1.5], [1]), ([0.5], [2]), ([float("nan")], [1])]
)
def test_what_are_no_probabilities_is_refused(confidence: list[float], is_right: list[float]) -> None:
    with pytest.raises(ConfigError, match="reliability_curve"):
        reliability_curve(confidence, is_right)
    with pytest.raises(ConfigError, match="num_bins"):
        expected_calibration_error([0.5], [1], num_bins=0)
