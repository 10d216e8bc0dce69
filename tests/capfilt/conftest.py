"""A small noisy set, two real checkpoints with random weights, and a finished run over it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from capfilt_world import WORDS, sample_members, write_checkpoint

from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.local import run_capfilt
from shared_files import write_tar


@pytest.fixture(scope="session")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("captioner"), seed=1, image_size=32, heads=("lm",))


@pytest.fixture(scope="session")
def filter_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("filter"), seed=2, image_size=24, heads=("itc", "itm"))


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of six images, of which some have no web text, or two; keys repeat between the shards."""
    folder = tmp_path_factory.mktemp("web")
    for shard in range(3):
        members = []
        for number in range(6):
            rng = np.random.default_rng([shard, number])
            texts = [" ".join(rng.choice(WORDS, 5)) for _ in range((1, 1, 2, 1, 0, 3)[number])]
            members += sample_members(f"{number:04d}", 100 * shard + number, texts)
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


@pytest.fixture
def config(web: Path, captioner: str, filter_model: str) -> CapFiltConfig:
    """In float32, so that numbers can be compared on a GPU too."""
    models = {"captioner": captioner, "filter": filter_model, "dtype": "float32"}
    return CapFiltConfig(source=str(web), **models, batch_size=4, num_workers=2)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, web: Path, captioner: str, filter_model: str) -> Path:
    """A whole run over `web`, for tests that only read it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    models = {"captioner": captioner, "filter": filter_model, "dtype": "float32"}
    run_capfilt(CapFiltConfig(source=str(web), **models, batch_size=4), out)
    return out


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return shutil.copytree(finished_run, tmp_path / "run")
