import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openblip.errors import ConfigError
from openblip.metrics.filtering import auc, filter_quality

SCORES = [0.9, 0.8, 0.5, 0.4, 0.1]
CLEAN = [True, False, True, True, False]


def test_one_threshold_by_hand() -> None:
    expected = {"precision": 2 / 3, "recall": 2 / 3, "noise_before": 2 / 5, "noise_after": 1 / 3}
    assert filter_quality(SCORES, CLEAN, 0.45) == pytest.approx(expected)


def test_a_score_at_the_threshold_is_not_kept() -> None:
    assert filter_quality([0.5, 0.6], [True, True], 0.5)["recall"] == 0.5


def test_shares_of_nothing_are_none() -> None:
    none_kept = filter_quality(SCORES, CLEAN, 1.0)
    assert (none_kept["precision"], none_kept["noise_after"], none_kept["recall"]) == (None, None, 0.0)
    assert filter_quality([0.9], [False], 0.5)["recall"] is None
    assert filter_quality([], [], 0.5)["noise_before"] is None


SCORED = st.lists(st.tuples(st.integers(0, 6).map(lambda n: n / 4), st.booleans()), max_size=30)


@settings(deadline=None)
@given(texts=SCORED, threshold=st.sampled_from([-1.0, 0.0, 0.3, 0.5, 1.0, 1.5, 2.0]))
def test_shares_are_counted(texts: list[tuple[float, bool]], threshold: float) -> None:
    quality = filter_quality([s for s, _ in texts], [c for _, c in texts], threshold)
    kept, clean = [c for s, c in texts if s > threshold], [c for _, c in texts]
    precision = sum(kept) / len(kept) if kept else None
    assert quality == pytest.approx(
        {
            "precision": precision,
            "recall": sum(kept) / sum(clean) if any(clean) else None,
            "noise_before": 1 - sum(clean) / len(clean) if clean else None,
            "noise_after": None if precision is None else 1 - precision,
        }
    )


@settings(deadline=None)
@given(texts=SCORED)
def test_auc_is_the_share_of_pairs_in_order(texts: list[tuple[float, bool]]) -> None:
    pairs = [(c > n) + 0.5 * (c == n) for c, is_clean in texts if is_clean for n, other in texts if not other]
    expected = sum(pairs) / len(pairs) if pairs else None
    assert auc([s for s, _ in texts], [c for _, c in texts]) == pytest.approx(expected)


def test_auc_of_no_separation_and_full_separation() -> None:
    clean = np.arange(100) % 3 == 0
    assert auc(np.full(100, 0.7, dtype=np.float32), clean) == 0.5
    assert auc(clean.astype(np.float32), clean) == 1.0
    assert auc(-clean.astype(np.float32), clean) == 0.0


@pytest.mark.parametrize("metric", [auc, lambda s, c: filter_quality(s, c, 0.5)])
def test_unequal_lists_and_missing_scores_are_refused(metric: object) -> None:
    with pytest.raises(ConfigError, match="one length"):
        metric([0.1, 0.2], [True])  # type: ignore[operator]
    with pytest.raises(ConfigError, match="score 1 is not a number"):
        metric([0.1, float("nan")], [True, False])  # type: ignore[operator]
