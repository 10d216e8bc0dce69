"""The run folder: what it refuses, and what it drops when a run goes on from an earlier step; trackers."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from openblip.errors import ConfigError, MissingExtraError
from openblip.training.config import TrainingConfig
from openblip.training.run_folder import RunFolder, Trackers

CONFIG = {"training": {"steps": 10, "betas": (0.9, 0.98)}, "out": "x", "init": None}


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start(CONFIG, resume=False)
    with pytest.raises(ConfigError, match=r"already holds a run; add --resume"):
        folder.start(CONFIG, resume=False)
    folder.start(CONFIG, resume=True)  # tuples come back from JSON as lists
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["steps"] == 10


def test_a_changed_config_is_refused_with_every_difference(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(CONFIG, resume=True)
    changed = {"training": {"steps": 20, "betas": (0.9, 0.98), "seed": 3}, "out": "x", "init": "model"}
    with pytest.raises(ConfigError) as error:
        folder.start(changed, resume=True)
    for part in ("training.steps was 10, now 20", "training.seed was null, now 3", 'init was null, now "model"'):
        assert part in str(error.value)
    assert "betas" not in str(error.value)
    assert json.loads((tmp_path / "config.json").read_text())["training"]["steps"] == 10


def test_metrics_after_a_step_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(1, 6):
        folder.log({"step": step, "lm": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "l')  # killed while writing
    folder.forget_after(3)
    folder.log({"step": 4})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.last_checkpoint() is None
    for step in (5, 900, 1000):
        folder.checkpoint(step).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00002000.partial").mkdir()
    assert folder.last_checkpoint() == (1000, tmp_path / "checkpoints" / "step_00001000")


class Recorder:
    """Stands for a tracker's own object and keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.calls.append((name, (value, step)))

    def log(self, scalars: dict[str, float], step: int) -> None:
        self.calls += [(name, (value, step)) for name, value in scalars.items()]

    def close(self) -> None:
        self.calls.append(("closed", None))

    finish = close


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    tensorboard, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    tensorboard.SummaryWriter = lambda folder: recorder  # type: ignore[attr-defined]
    wandb.init = lambda **settings: recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return recorder


@pytest.mark.parametrize("settings", [{"tensorboard": True}, {"wandb_project": "blip"}, {}])
def test_numbers_are_logged_under_their_step(recorder: Recorder, tmp_path: Path, settings: dict[str, Any]) -> None:
    trackers = Trackers(TrainingConfig(steps=9, batch_size=1, **settings), tmp_path)
    trackers.log({"step": 7, "lm": 1.5, "rejects": 2, "note": "no number"})
    trackers.close()
    assert recorder.calls == ([("lm", (1.5, 7)), ("rejects", (2, 7)), ("closed", None)] if settings else [])


@pytest.mark.parametrize(
    ("settings", "module", "name"),
    [({"tensorboard": True}, "torch.utils.tensorboard", "TensorBoard"), ({"wandb_project": "blip"}, "wandb", "wandb")],
)
def test_a_missing_tracker_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, Any], module: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{name} is not installed.*openblip\[track\]"):
        Trackers(TrainingConfig(steps=9, batch_size=1, **settings), tmp_path)
