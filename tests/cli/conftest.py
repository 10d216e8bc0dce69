"""A tiny checkpoint with random weights, and images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openblip.checkpoints.checkpoint import save_native
from openblip.models.config import Head
from tiny_blip import tiny_checkpoint


def save_tiny(folder: Path, heads: tuple[Head, ...]) -> Path:
    """A whole checkpoint of a few thousand random weights."""
    save_native(folder, tiny_checkpoint(heads))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It can do everything."""
    return save_tiny(tmp_path_factory.mktemp("tiny"), ("itc", "itm", "lm"))


@pytest.fixture(scope="session")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It can only caption."""
    return save_tiny(tmp_path_factory.mktemp("captioner"), ("lm",))


@pytest.fixture(scope="session")
def matcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It has only the head for matching."""
    return save_tiny(tmp_path_factory.mktemp("matcher"), ("itm",))


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It can only embed."""
    return save_tiny(tmp_path_factory.mktemp("embedder"), ("itc",))


@pytest.fixture(scope="session")
def answerer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It can only answer questions."""
    return save_tiny(tmp_path_factory.mktemp("answerer"), ("vqa",))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder with a.png, b.jpg and, one level down, c.webp."""
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "deeper/c.webp"):
        Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / name)
    return folder
