"""Tiny checkpoints with random weights, images, and a way to run commands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from openblip.checkpoints.checkpoint import save_native
from openblip.cli.main import main
from openblip.models.config import Head
from openblip.predictor import BlipPredictor
from shared_files import json_lines
from tiny_blip import tiny_checkpoint


def saved(*heads: Head) -> Any:
    """A fixture: the folder of a whole checkpoint of a few thousand random weights."""

    @pytest.fixture(scope="session")
    def save(tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("_".join(heads))
        save_native(folder, tiny_checkpoint(heads))
        return folder

    return save


checkpoint = saved("itc", "itm", "lm")
captioner, matcher, embedder, answerer = saved("lm"), saved("itm"), saved("itc"), saved("vqa")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder with a.png, b.jpg and, one level down, c.webp."""
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "deeper/c.webp"):
        Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / name)
    return folder


class Printed(NamedTuple):
    """What a command wrote."""

    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        """The JSON lines on standard output."""
        return json_lines(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """Runs the command of the words, which is to end with `code`."""

    def run(*words: object, code: int = 0) -> Printed:
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        return Printed(*capsys.readouterr())

    return run


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[int]]:
    """Notes from then on how many images (of `caption`) or questions (of `answer`) a call of the predictor is given."""

    def watch(name: str) -> list[int]:
        counts: list[int] = []
        call = getattr(BlipPredictor, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            counts.append(len(arguments[2 if name == "answer" else 1]))
            return call(*arguments, **options)

        monkeypatch.setattr(BlipPredictor, name, counting)
        return counts

    return watch


@pytest.fixture
def refusal(run: Callable[..., Printed]) -> Callable[..., str]:
    """Runs a command that has to end with code 2, and nothing but one line on standard error, which is returned."""

    def refusal(*words: object) -> str:
        printed = run(*words, code=2)
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        return printed.err

    return refusal
