"""Which tests only the whole suite runs; `pytest -m "not slow"` leaves them out."""

from typing import Any

import pytest


def slow(*cases: Any) -> list[Any]:
    """Cases of a parametrised test, a tuple being one case of several values."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]
