"""The folder of a run: config.json, metrics.jsonl, checkpoints/step_*/ and model/."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openblip.data.sample import Reject
from openblip.errors import ConfigError

CONFIG, METRICS, CHECKPOINTS, MODEL = "config.json", "metrics.jsonl", "checkpoints", "model"
REJECTS = "rejects.jsonl"


class RunFolder:
    """Paths and files of one run. Everything that must not be seen half-written is renamed into place.

    rejects.jsonl names every sample that was skipped: the step that would have used it, shard, key, reason.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def model(self) -> Path:
        """The final weights; there when the run is finished."""
        return self.path / MODEL

    def start(self, config: dict[str, Any], resume: bool) -> None:
        """Write config.json, or with `resume` check that it says the same.

        Raises ConfigError when a new run would overwrite one, or when a resumed one differs; it lists how.
        """
        file = self.path / CONFIG
        if file.exists():
            if not resume:
                raise ConfigError(f"{self.path} holds a run already; add --resume or choose another --out.")
            differences = _differences(json.loads(file.read_text(encoding="utf-8")), config)
            if differences:
                raise ConfigError(f"{file} says otherwise than this command: {'; '.join(differences)}.")
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(config, indent=2) + "\n")

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        self._append(METRICS, [record])

    def log_rejects(self, step: int, rejects: Sequence[Reject]) -> None:
        """Append a line to rejects.jsonl for each; every process may call this."""
        self._append(REJECTS, [{"step": step, **asdict(reject)} for reject in rejects])

    def _append(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        if records:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))

    def forget_after(self, step: int) -> int:
        """Drop metrics and rejects of steps after `step`, which a resumed run makes again, and torn lines.

        Returns the number of rejects up to `step`.
        """
        self._keep_until(step, METRICS)
        return self._keep_until(step, REJECTS)

    def _keep_until(self, step: int, name: str) -> int:
        """Drop the lines of later steps from a file; returns how many stay."""
        file = self.path / name
        if not file.exists():
            return 0
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the line that was being written when the run was killed
                continue
            if record["step"] <= step:
                kept.append(line + "\n")
        write_atomically(file, "".join(kept))
        return len(kept)

    def model_at(self, step: int) -> Path:
        """Where the model of an earlier step is written, if it is."""
        return self.path / "models" / f"step_{step:08d}"

    def checkpoint(self, step: int) -> Path:
        return self.path / CHECKPOINTS / f"step_{step:08d}"

    def last_checkpoint(self) -> tuple[int, Path] | None:
        """The step and folder of the newest whole checkpoint."""
        folders = sorted((self.path / CHECKPOINTS).glob("step_????????"))
        return (int(folders[-1].name.removeprefix("step_")), folders[-1]) if folders else None

    def keep_last(self, count: int) -> None:
        """Remove all but the newest `count` checkpoints, and what killed writes left."""
        folder = self.path / CHECKPOINTS
        for old in sorted(folder.glob("step_????????"))[:-count]:
            shutil.rmtree(old)
        for partial in folder.glob("*.partial"):
            shutil.rmtree(partial)


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Human-readable differences of two JSON values, by field."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(key for key in new if key not in old)]:
            found += _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    plain = json.loads(json.dumps(new))
    return [] if old == plain else [f"{path} was {json.dumps(old)}, now {json.dumps(plain)}"]
