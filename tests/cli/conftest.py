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


@pytest.fixture
def clips(image_folder: Path) -> Path:
    """one.mp4 and two.mp4 of noise, beside an image and a clip that is none."""
    av = pytest.importorskip("av")
    folder = image_folder.parent / "clips"
    folder.mkdir()
    random = np.random.default_rng(1)
    for name in ("one.mp4", "two.mp4"):
        with av.open(str(folder / name), "w") as output:
            stream = output.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for _ in range(8):
                colour = random.integers(0, 256, (1, 1, 3), dtype=np.uint8)
                frame = av.VideoFrame.from_ndarray(np.tile(colour, (48, 64, 1)), format="rgb24")
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
    (folder / "bad.mp4").write_bytes((folder / "one.mp4").read_bytes()[:500])
    (folder / "photo.png").write_bytes((image_folder / "a.png").read_bytes())
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
