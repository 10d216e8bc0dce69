"""Two processes under torchrun measure what one does."""

import json
from pathlib import Path
from typing import Any

import every_evaluation
import pytest

from two_processes_of import launch


def assert_alike(found: Any, expected: Any, where: str) -> None:
    """Equal, but for rounding: a image may be in another batch."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            assert_alike(found[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_alike(one, other, f"{where}[{place}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-5), where
    else:
        assert found == expected, where


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    """Scores, predictions and rejects, in the order of the source, on both processes."""
    finished = launch(Path(every_evaluation.__file__), str(tmp_path))
    assert finished.returncode == 0, finished.stderr[-3000:]
    expected = json.loads(json.dumps(every_evaluation.evaluate_everything()))
    assert all(scores["num_rejects"] == len(scores["rejects"]) == 2 for scores in expected.values())
    for rank in range(2):
        assert_alike(json.loads((tmp_path / f"scores-{rank}.json").read_text()), expected, "")
