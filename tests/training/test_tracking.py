"""Trackers get every number of a record under its step, and say what to install when they are missing."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from openblip.errors import MissingExtraError
from openblip.training.config import TrainingConfig
from openblip.training.run_folder import Trackers

RECORD = {"step": 7, "lm": 1.5, "rejects": 2, "note": "no number"}


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


@pytest.mark.parametrize("settings", [{"tensorboard": True}, {"wandb_project": "blip"}])
def test_numbers_are_logged_under_their_step(recorder: Recorder, tmp_path: Path, settings: dict[str, Any]) -> None:
    trackers = Trackers(TrainingConfig(steps=9, batch_size=1, **settings), tmp_path)
    trackers.log(RECORD)
    trackers.close()
    assert recorder.calls == [("lm", (1.5, 7)), ("rejects", (2, 7)), ("closed", None)]


def test_without_trackers_nothing_is_imported(recorder: Recorder, tmp_path: Path) -> None:
    trackers = Trackers(TrainingConfig(steps=9, batch_size=1), tmp_path)
    trackers.log(RECORD)
    trackers.close()
    assert recorder.calls == []


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
