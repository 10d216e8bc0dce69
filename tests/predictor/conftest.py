"""The predictor that most tests ask: a BLIP with the heads of pre-training."""

import pytest
from tiny_predictor import make_predictor

from openblip.predictor import BlipPredictor


@pytest.fixture(scope="session")
def predictor() -> BlipPredictor:
    return make_predictor("itc", "itm", "lm")
