"""What a GPU computes, compared with the CPU. Without a GPU all of it is skipped.

With OPENBLIP_TEST_DEVICE=cpu the tests compare the CPU with itself, which tries them on a machine without a GPU. They
share helpers with the tests of other folders, which are put on the import path here.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

for folder in ("predictor", "recipes", "tasks"):
    sys.path.append(str(Path(__file__).parents[1] / folder))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or what OPENBLIP_TEST_DEVICE says instead."""
    chosen = torch.device(os.environ.get("OPENBLIP_TEST_DEVICE", "cuda"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return chosen


@pytest.fixture(autouse=True)
def _whole_float32() -> Iterator[None]:
    """Convolutions multiply whole float32 numbers, as those of the CPU do; by default a GPU rounds them to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
