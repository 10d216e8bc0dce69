"""The folder of a run: config.json, metrics.jsonl, rejects.jsonl, checkpoints/step_*/, model/ and best/.

Also the trackers, TensorBoard and Weights & Biases, which receive the same records.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from openblip.errors import ConfigError, MissingExtraError
from openblip.files import name_full_disk, read_json, read_jsonl, remove_partials, write_json, write_text
from openblip.training.config import TrainingConfig

METRICS, REJECTS, CHECKPOINTS = "metrics.jsonl", "rejects.jsonl", "checkpoints"
MAY_CHANGE = ("training.batch_size ", "training.accumulation ", "training.num_threads ", "data.num_workers ")
"""Settings that a resumed run may change: how a step's samples are divided among processes and micro-batches."""


class RunFolder:
    """Paths and files of one run.

    metrics.jsonl has a line per logged step. rejects.jsonl names every sample that was skipped: the step that would
    have used it, shard, key, reason. model/ has the final weights and exists when the run is finished, best/ those with
    the best validation score, and models/step_*/ those of `training.model_every`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.model, self.best = self.path / "model", self.path / "best"

    def start(self, config: dict[str, Any], resume: bool) -> None:
        """Write config.json, or with `resume` check that it is the same but for `MAY_CHANGE`.

        Raises ConfigError when a new run would overwrite one, or when a resumed run differs; it lists the differences.
        """
        file = self.path / "config.json"
        if not file.exists():
            write_json(file, config)
            return
        if not resume:
            raise ConfigError(f"{self.path} already holds a run; add --resume or choose another --out.")
        differences = [line for line in _differences(read_json(file), config) if not line.startswith(MAY_CHANGE)]
        if differences:
            raise ConfigError(f"{file} differs from this command: {'; '.join(differences)}.")

    def log(self, record: dict[str, Any], name: str = METRICS) -> None:
        """Append a line to metrics.jsonl, or to rejects.jsonl, where every process may."""
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
        """The highest validation score in metrics.jsonl; None when there is none."""
        lines = (line.value for line in read_jsonl(self.path / METRICS))
        return max((line["validation/score"] for line in lines if "validation/score" in line), default=None)

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


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The differences of two JSON values in words, by field."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        inner = (_differences(old.get(name), new.get(name), f"{path}.{name}" if path else name) for name in names)
        return [line for lines in inner for line in lines]
    plain = json.loads(json.dumps(new))
    return [] if old == plain else [f"{path} was {json.dumps(old)}, now {json.dumps(plain)}"]


class Trackers:
    """Sends scalars to the trackers that the config names; without any it does nothing."""

    def __init__(self, config: TrainingConfig, folder: Path) -> None:
        self._tensorboard: Any = None
        self._wandb: Any = None
        name = "TensorBoard"
        try:
            if config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
            name = "wandb"
            if config.wandb_project:
                import wandb

                self._wandb = wandb.init(project=config.wandb_project, dir=str(folder), id=folder.name, resume="allow")
        except ImportError as error:
            raise MissingExtraError(f'{name} is not installed: pip install "openblip[track]"') from error

    def log(self, record: dict[str, Any]) -> None:
        """Log a record of metrics.jsonl."""
        scalars = {name: value for name, value in record.items() if isinstance(value, int | float)}
        step = int(scalars.pop("step"))
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        """Flush and close the trackers."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
