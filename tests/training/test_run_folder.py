"""The run folder: what it refuses, and what it drops when a run goes on from an earlier step; trackers."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from openblip.errors import ConfigError, MissingExtraError
from openblip.training.config import TrainingConfig
from openblip.training.run_folder import Change, RunFolder, Trackers
from shared_files import read_lines

CONFIG: dict[str, Any] = {
    "recipe": "blip-mini",
    "vocab_size": 100,
    "data": {"source": "x", "num_workers": 1, "augmentation": {"crop_scale": (0.5, 1.0)}},
    "training": {"steps": 10, "learning_rate": 0.1, "muon_learning_rate": None, "seed": 0, "layer_decay": None},
    "out": "x",
    "init": None,
}


def changed(settings: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The settings with another value at a path."""
    first, _, rest = path.partition(".")
    return {**settings, first: changed(settings[first], rest, value) if rest else value}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """The folder of a run that has done a step."""
    folder = RunFolder(tmp_path / "run")
    folder.begin(CONFIG)
    folder.log({"step": 1})
    return folder


def test_a_run_is_not_overwritten(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match=r"already holds a run; add --resume"):
        folder.compare(folder.read_config(), CONFIG, resume=False)
    assert folder.compare(folder.read_config(), CONFIG, resume=True) == []  # tuples come back from JSON as lists


def test_a_folder_in_which_nothing_was_trained_is_free(folder: RunFolder) -> None:
    (folder.path / "metrics.jsonl").unlink()
    assert folder.read_config() is None
    folder.checkpoint(3).mkdir(parents=True)
    assert folder.read_config() is not None
    (folder.path / "config.json").write_text('{"format": "openblip", "model": {}}')  # --out names a model
    with pytest.raises(ConfigError, match="something else than a run"):
        folder.read_config()


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("training.steps", 20, None),
        ("training.learning_rate", 0.2, None),
        ("data.num_workers", 4, None),
        ("data.source", "y", "which samples come"),
        ("data.augmentation.crop_scale", (0.2, 1.0), "which samples come"),
        ("training.seed", 1, "which samples come"),
        ("training.muon_learning_rate", 0.1, "optimizer's state"),
        ("training.layer_decay", 0.9, "optimizer's state"),
        ("vocab_size", 50, "depends on it"),
        ("init", "m", "depends on it"),
    ],
)
def test_a_resumed_run_changes_what_may_change(folder: RunFolder, path: str, value: Any, reason: str | None) -> None:
    config = changed(CONFIG, path, value)
    if reason is not None:
        with pytest.raises(ConfigError, match=rf"{path} was .*, is now .*{reason}"):
            folder.compare(folder.read_config(), config, resume=True)
        return
    changes = folder.compare(folder.read_config(), config, resume=True)
    folder.begin(config, changes, step=1)
    assert folder.read_config() == json.loads(json.dumps(config))
    (line,) = read_lines(folder.path / "changes.jsonl")
    assert (line["step"], line["setting"], line["now"]) == (1, path, value)


def test_scores_on_other_samples_are_not_compared(folder: RunFolder) -> None:
    folder.log({"step": 1, "validation/score": 0.9})
    folder.begin(CONFIG, [Change("data.validation", "a", "b")], step=1)
    assert folder.best_score() is None
    folder.log({"step": 2, "validation/score": 0.4})
    assert folder.best_score() == 0.4


def test_settings_of_earlier_versions_are_read_under_their_present_names(folder: RunFolder) -> None:
    old = {**CONFIG, "training": {**CONFIG["training"], "precision": "bf16"}, "language": {"lora": {"rank": 4}}}
    folder.begin(old)
    config = folder.read_config()
    assert config is not None
    assert config["training"]["dtype"] == "bfloat16"
    assert config["lora"] == {"rank": 4}
    assert config["language"] == {}
    assert "precision" not in config["training"]


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
        self.begun: list[tuple[str, ...]] = []

    def begin(self, *settings: str) -> "Recorder":
        self.begun.append(settings)
        return self

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
    modules = {name: cast(Any, ModuleType(name)) for name in ("torch.utils.tensorboard", "wandb", "trackio")}
    tensorboard, wandb, trackio = modules.values()
    tensorboard.SummaryWriter = lambda folder: recorder
    wandb.init = lambda project, dir, id, resume: recorder.begin(project, id, resume)
    trackio.init = lambda project, name, resume: recorder.begin(project, name, resume)
    trackio.log, trackio.finish = recorder.log, recorder.finish
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return recorder


@pytest.mark.parametrize("settings", [{"wandb_project": "blip"}, {"trackio_project": "blip"}])
def test_each_training_of_a_bootstrap_is_a_run_of_its_own(
    recorder: Recorder, tmp_path: Path, settings: dict[str, Any]
) -> None:
    for name in ("round_0", "round_1", "round_1"):
        Trackers(TrainingConfig(steps=9, batch_size=1, **settings), tmp_path / name / "pretrain")
    first, second, resumed = recorder.begun
    assert first != second == resumed
    assert second == ("blip", f"{tmp_path.name}-round_1-pretrain", "allow")


@pytest.mark.parametrize(
    "settings", [{"tensorboard": True}, {"wandb_project": "blip"}, {"trackio_project": "blip"}, {}]
)
def test_numbers_are_logged_under_their_step(recorder: Recorder, tmp_path: Path, settings: dict[str, Any]) -> None:
    trackers = Trackers(TrainingConfig(steps=9, batch_size=1, **settings), tmp_path)
    trackers.log({"step": 7, "lm": 1.5, "rejects": 2, "note": "no number"})
    trackers.close()
    assert recorder.calls == ([("lm", (1.5, 7)), ("rejects", (2, 7)), ("closed", None)] if settings else [])


@pytest.mark.parametrize(
    ("settings", "module", "name"),
    [
        ({"tensorboard": True}, "torch.utils.tensorboard", "TensorBoard"),
        ({"wandb_project": "blip"}, "wandb", "wandb"),
        ({"trackio_project": "blip"}, "trackio", "trackio"),
    ],
)
def test_a_missing_tracker_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, Any], module: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{name} is not installed.*openblip\[track\]"):
        Trackers(TrainingConfig(steps=9, batch_size=1, **settings), tmp_path)
