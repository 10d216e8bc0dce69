"""A tiny checkpoint with random weights, and images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.checkpoints.native import save_native
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig, Head, TextConfig, VisionConfig


def save_tiny(folder: Path, heads: tuple[Head, ...]) -> Path:
    """A whole checkpoint of a few thousand random weights."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a red dog beside two blue cars", "the small cat below a big tree"], vocab_size=150)
    config = BlipConfig(
        vision=VisionConfig(image_size=16, patch_size=8, hidden_dim=16, num_layers=1, num_heads=2, mlp_dim=32),
        text=TextConfig(
            vocab_size=tokenizer.vocab_size, hidden_dim=16, num_layers=1, num_heads=2, mlp_dim=32, max_positions=48
        ),
        embed_dim=8,
        heads=heads,
    )
    save_native(folder, BlipCheckpoint(Blip(config), tokenizer, Preprocessing(image_size=16)))
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
