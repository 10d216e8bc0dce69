"""`caption`, `match` and `answer` over a Ray cluster on this machine: the lines of this process, whoever dies."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import openblip.cli.lines
from openblip.cli.lines import LineUnit
from openblip.cli.main import main
from openblip.cluster import WorkerPool
from shared_files import as_json, json_lines, write_tar

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
RAY = ("--engine", "ray", "--max-workers", "1", "--cpus-per-worker", "1", "--num-workers", "1")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    memory = 80 * 2**20
    quiet = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    ray.init(address="local", num_cpus=4, object_store_memory=memory, **quiet)
    yield
    ray.shutdown()


def photo(number: int) -> bytes:
    encoded, random = io.BytesIO(), np.random.default_rng(number)
    Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(encoded, "PNG")
    return encoded.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, whose samples have texts and questions; a sample of the first cannot be read."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        members = []
        for number in range(5):
            image = b"no image" if (shard, number) == (0, 3) else photo(10 * shard + number)
            texts = as_json(captions=["a red dog", "two cats"][: 1 + number % 2], question=f"how many, {number}?")
            members += [(f"{number}.png", image), (f"{number}.json", texts)]
        write_tar(folder / f"{shard}.tar", members)
    return folder


@pytest.fixture(scope="module")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(photo(number))
    return folder


def assert_same_lines(ours: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(ours) == len(expected) > 0
    for line, other in zip(ours, expected, strict=True):
        assert list(line) == list(other)
        for name, value in other.items():
            assert line[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value)


@pytest.mark.parametrize("command", ["caption", "match", "answer"])
def test_lines_are_those_of_this_process(
    command: str, shards: Path, checkpoint: Path, answerer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = answerer if command == "answer" else checkpoint
    words = [command, str(shards), "--model", str(model), "--batch-size", "2", "--dtype", "float32"]
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    assert main([*words, "--out", str(here)]) == 1
    capsys.readouterr()
    assert main([*words, "--out", str(there), *RAY]) == 1
    assert "skipped 0/3" in capsys.readouterr().err
    expected = json_lines(here.read_text())
    assert_same_lines(json_lines(there.read_text()), expected)
    settings = [json.loads(path.with_name(f"{path.name}.settings.json").read_text()) for path in (here, there)]
    assert settings[0] == settings[1]


def test_files_are_divided_and_a_stopped_run_goes_on(
    many_images: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of the lines is there, the last of them half-written."""
    words = ["caption", str(many_images), "--model", str(checkpoint), "--batch-size", "2", "--dtype", "float32"]
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    assert main([*words, "--out", str(here)]) == 0
    text = here.read_text()
    there.write_text(text[: len(text) // 3])
    there.with_name("there.jsonl.settings.json").write_bytes(here.with_name("here.jsonl.settings.json").read_bytes())
    monkeypatch.setattr(openblip.cli.lines, "BATCHES_OF_UNIT", 2)
    num_units: list[int] = []
    run: Callable[..., Any] = WorkerPool.run

    def counting(pool: Any, job: Any, units: list[LineUnit], **options: Any) -> Any:
        num_units.append(len(units))
        return run(pool, job, units, **options)

    monkeypatch.setattr(WorkerPool, "run", counting)
    assert main([*words, "--out", str(there), *RAY]) == 0
    assert num_units == [7]  # of four images each
    assert_same_lines(json_lines(there.read_text()), json_lines(text))
