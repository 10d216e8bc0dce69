"""The folder of a run: config.json, changes.jsonl, metrics.jsonl, rejects.jsonl, checkpoints/step_*/, model/ and best/.

Also the trackers, TensorBoard, Weights & Biases and trackio, which receive the same records.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from openblip.errors import ConfigError, MissingExtraError
from openblip.files import name_full_disk, read_json, read_jsonl, remove_partials, write_json, write_text
from openblip.training.config import PRECISIONS, TrainingConfig

METRICS, REJECTS, CHANGES, CHECKPOINTS = "metrics.jsonl", "rejects.jsonl", "changes.jsonl", "checkpoints"


class Change(NamedTuple):
    """A setting of a run that is another one when the run is resumed; `setting` is its path in config.json."""

    setting: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.setting} was {json.dumps(self.was)}, is now {json.dumps(self.now)}"

    def why_refused(self) -> str | None:
        """Why the setting must stay as it was; None when a resumed run may change it."""
        *outer, part, name = ["", *self.setting.split(".")]
        if self.setting in ("out", "rounds", "device"):
            return None
        if part == "data" and name in ("num_workers", "validation", "validation_limit"):
            return None
        if "data" in (*outer, part) or (part, name) == ("training", "seed"):
            return "it decides which samples come, and how"
        if part != "training":
            return "what is trained already depends on it"
        if name == "steps" and any(outer):
            return "later stages of a bootstrap begin with what was trained"
        if name == "layer_decay" or (name == "muon_learning_rate" and None in (self.was, self.now)):
            return "the optimizer's state in the checkpoints depends on it"
        return None


class RunFolder:
    """Paths and files of one run.

    metrics.jsonl has a line per logged step. rejects.jsonl names every sample that was skipped: the step that would
    have used it, shard, key, reason. config.json has the settings, and changes.jsonl a line for every setting that was
    changed at a resume, with the step after which the change holds. model/ has the final weights and exists when the
    run is finished, best/ those with the best validation score, and models/step_*/ those of `training.model_every`,
    and the final ones of a run that was then trained longer.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.model, self.best = self.path / "model", self.path / "best"

    def read_config(self) -> dict[str, Any] | None:
        """The settings of the run, or of the bootstrap, that the folder holds, as the present version names them.

        None for a folder in which nothing was trained yet, here or in a folder below: a new run may have it. Raises
        ConfigError for a config.json of something else.
        """
        file = self.path / "config.json"
        if not file.exists():
            return None
        config = read_json(file)
        if not {"recipe", "out"} <= config.keys():
            raise ConfigError(f"{file} is that of something else than a run; choose another --out.")
        traces = ("metrics.jsonl", "checkpoints/step_????????", "model/config.json")
        trained = (path for trace in traces for path in self.path.glob(f"**/{trace}"))
        return _renamed(config) if any(path.stat().st_size for path in trained) else None

    def compare(self, before: Mapping[str, Any] | None, config: Mapping[str, Any], resume: bool) -> list[Change]:
        """The settings that a resumed run changes; before: what `read_config` gave.

        Raises ConfigError when a new run would overwrite one, and for changes that a resumed run cannot make; it says
        why.
        """
        if before is None:
            return []
        if not resume:
            raise ConfigError(f"{self.path} already holds a run; add --resume or choose another --out.")
        changes = list(differences(before, config))
        if refused := [f"{change} ({reason})" for change in changes if (reason := change.why_refused())]:
            raise ConfigError(
                f"{self.path} was begun with other settings: {'; '.join(refused)}. Take the earlier ones, or choose "
                "another --out.",
                page="train.md#go-on-with-a-training",
            )
        return [change for change in changes if change.setting != "out"]

    def begin(self, config: Mapping[str, Any], changes: Sequence[Change] = (), step: int = 0) -> None:
        """Write config.json, and the changes that hold after `step` to changes.jsonl.

        What a finished run has in model/, from which it is trained longer, moves to models/step_*/.
        """
        if self.is_finished:
            earlier = self.path / "models" / f"step_{step:08d}"
            shutil.rmtree(earlier, ignore_errors=True)  # the same weights, of `training.model_every`
            earlier.parent.mkdir(exist_ok=True)
            self.model.rename(earlier)
        for change in changes:
            self.log({"step": step, **change._asdict()}, CHANGES)
        write_json(self.path / "config.json", config)

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its last step: model/ is written then."""
        return (self.model / "config.json").is_file()

    def log(self, record: dict[str, Any], name: str = METRICS) -> None:
        """Append a line to metrics.jsonl, to changes.jsonl, or to rejects.jsonl, where every process may."""
        file = self.path / name
        with name_full_disk(file), file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(record) + "\n")

    def forget_after(self, step: int) -> int:
        """Remove metrics and rejects after `step`, which a resumed run writes again; the number of rejects up to it."""
        kept: list[str] = []
        for file in (self.path / METRICS, self.path / REJECTS):
            kept = []
            for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
                try:
                    record = json.loads(line)
                except ValueError:  # the line that was being written when the run was killed
                    continue
                if record["step"] <= step:
                    kept.append(line + "\n")
            if file.exists():
                write_text(file, "".join(kept))
        return len(kept)

    def best_score(self) -> float | None:
        """The highest score in metrics.jsonl since the samples of the validation changed; None when there is none."""
        changes = [line.value for line in read_jsonl(self.path / CHANGES)]
        since = max((c["step"] for c in changes if c["setting"].startswith("data.validation")), default=-1)
        lines = [line.value for line in read_jsonl(self.path / METRICS)]
        scores = (line["validation/score"] for line in lines if line["step"] > since and "validation/score" in line)
        return max(scores, default=None)

    def checkpoint(self, step: int) -> Path:
        """The folder of the exact state after `step` steps."""
        return self.path / CHECKPOINTS / f"step_{step:08d}"

    def last_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the newest checkpoint; None when there is none."""
        folders = sorted((self.path / CHECKPOINTS).glob("step_????????"))
        return (int(folders[-1].name.removeprefix("step_")), folders[-1]) if folders else None

    def keep_last(self, count: int) -> None:
        """Remove all but the newest `count` checkpoints, and what killed writers left."""
        folder = self.path / CHECKPOINTS
        for old in sorted(folder.glob("step_????????"))[:-count]:
            shutil.rmtree(old)
        remove_partials(folder)


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version under their present names."""
    renamed = {name: _renamed(value) if isinstance(value, dict) else value for name, value in config.items()}
    if isinstance(precision := renamed.get("precision"), str):
        renamed["dtype"] = PRECISIONS[precision]
        del renamed["precision"]
    if isinstance(language := renamed.get("language"), dict) and "lora" in language:
        renamed["lora"] = language.pop("lora") or {}
    return renamed


def differences(old: Any, new: Any, path: str = "") -> Iterator[Change]:
    """The differences of two values as JSON has them, by field."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif json.loads(json.dumps(old)) != json.loads(json.dumps(new)):
        yield Change(path, old, new)


class Trackers:
    """Sends scalars to the trackers that the config names; without any it does nothing."""

    def __init__(self, config: TrainingConfig, folder: Path) -> None:
        self._tensorboard: Any = None
        self._others: list[Any] = []  # a run of wandb, and the module of trackio: both have log and finish
        # It finds the run again when it is resumed; the trainings of a bootstrap differ in the folders above them.
        run = "-".join(folder.resolve().parts[-3:])
        name = "TensorBoard"
        try:
            if config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
            name = "wandb"
            if config.wandb_project:
                import wandb

                self._others.append(wandb.init(project=config.wandb_project, dir=str(folder), id=run, resume="allow"))
            name = "trackio"
            if config.trackio_project:
                import trackio

                trackio.init(project=config.trackio_project, name=run, resume="allow")
                self._others.append(trackio)
        except ImportError as error:
            raise MissingExtraError(f'{name} is not installed: pip install "openblip[track]"') from error

    def log(self, record: dict[str, Any]) -> None:
        """Log a record of metrics.jsonl."""
        scalars = {name: value for name, value in record.items() if isinstance(value, int | float)}
        step = int(scalars.pop("step"))
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        for tracker in self._others:
            tracker.log(scalars, step=step)

    def close(self) -> None:
        """Flush and close the trackers."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        for tracker in self._others:
            tracker.finish()
