"""Images of noise, of different sizes."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (50 + 9 * i, 64, 3), dtype=np.uint8)) for i in range(3)]
