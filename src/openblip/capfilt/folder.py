"""The folder of a CapFilt run: its files, what the run was made with, and whether a command continues it.

```
DIR/manifest.json                  what was run; written first
DIR/captions/<shard>.parquet       one row per text
DIR/captions/<shard>.rejects.jsonl samples that could not be read
DIR/captions/<shard>.report.json   written last: the shard is done
DIR/captions/<shard>.failure.json  why the shard could not be finished; removed once it is
DIR/report.html
```
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openblip.capfilt.config import CapFiltConfig
from openblip.data.captions import finished_shards
from openblip.errors import ConfigError
from openblip.files import read_json, remove_partials, write_json
from openblip.predictor import BasePredictor


@dataclass(frozen=True)
class CapFiltFolder:
    """Paths of a run's files, and what they say about its state."""

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def report_page(self) -> Path:
        return self.root / "report.html"

    def captions(self, shard: str) -> Path:
        return self.root / "captions" / f"{shard}.parquet"

    def rejects(self, shard: str) -> Path:
        return self.captions(shard).with_name(f"{shard}.rejects.jsonl")

    def report(self, shard: str) -> Path:
        return self.captions(shard).with_name(f"{shard}.report.json")

    def failure(self, shard: str) -> Path:
        return self.captions(shard).with_name(f"{shard}.failure.json")

    def is_done(self, shard: str) -> bool:
        """Whether a shard is done: its report is written last. A caption file removed by hand is made again."""
        return self.report(shard).is_file() and self.captions(shard).is_file()

    def done_shards(self) -> list[str]:
        """Names of the finished shards, sorted."""
        return [shard for shard in finished_shards(self.root) if self.is_done(shard)]

    def failures(self) -> list[dict[str, Any]]:
        """The records of shards that could not be finished, by shard."""
        return [read_json(path) for path in sorted(self.root.glob("captions/*.failure.json"))]

    def read_manifest(self) -> dict[str, Any]:
        """The manifest. Raises `ConfigError` when the folder is not the output of a CapFilt run."""
        if not self.manifest.is_file():
            raise ConfigError(
                f"{self.root} has no manifest.json, so it is not the output of a CapFilt run; "
                "give the folder that was --out of `openblip capfilt`"
            )
        return read_json(self.manifest)

    def start_or_resume(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest of a new run, or check that the folder holds the same run; remove leftovers.

        Raises `ConfigError` with the difference, field by field, when the folder holds another run.
        """
        remove_partials(self.root)
        remove_partials(self.root / "captions")
        if not self.manifest.exists():
            if finished_shards(self.root):
                raise ConfigError(
                    f"{self.root} holds caption files but no manifest.json that says how they were made; "
                    "restore it or choose another --out"
                )
            (self.root / "captions").mkdir(parents=True, exist_ok=True)
            write_json(self.manifest, manifest)
            return
        earlier = self.read_manifest()
        before = _identity(earlier) | {"threshold": earlier.get("threshold")}
        now = _identity(manifest) | {"threshold": manifest["threshold"]}
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if changed:
            lines = "; ".join(f"{name} was {before.get(name)!r}, is now {now.get(name)!r}" for name in changed)
            advice = (
                f"To change the threshold run `openblip capfilt-select {self.root} --threshold "
                f"{manifest['threshold']}`, which needs no model"
                if changed == ["threshold"]
                else "Repeat the earlier settings to resume it, or choose another --out"
            )
            raise ConfigError(f"{self.root} holds a CapFilt run with other settings: {lines}. {advice}.")
        if earlier.get("num_shards") != manifest["num_shards"]:  # the source has grown by new shards
            write_json(self.manifest, {**earlier, "num_shards": manifest["num_shards"]})


def build_manifest(
    config: CapFiltConfig, captioner: BasePredictor, filter_: BasePredictor, num_shards: int
) -> dict[str, Any]:
    """The content of manifest.json.

    Paths are absolute, so that `capfilt:DIR` finds the original shards from any working directory. A model's hash is
    of everything that decides its output.
    """
    return {
        "openblip": version("openblip"),
        "source": _absolute(config.source),
        "images": _absolute(config.images),
        "num_shards": num_shards,
        "threshold": config.threshold,
        **{
            role: {"checkpoint": checkpoint, "parameters": model.num_parameters, "sha256": model.fingerprint()}
            for role, checkpoint, model in (
                ("captioner", config.captioner, captioner),
                ("filter", config.filter, filter_),
            )
        },
        "config": config.row_settings(),
    }


def config_hash(manifest: Mapping[str, Any]) -> str:
    """A short hash of everything that decides the rows."""
    identity = _identity(manifest)
    if identity["dtype"] == "float32":  # so that the hash of a run without it stays
        del identity["dtype"]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the rows, as one flat mapping; a model counts by its hash, not by its path."""
    return {
        "source": manifest.get("source"),
        "images": manifest.get("images"),
        "captioner": manifest.get("captioner", {}).get("sha256"),
        "filter": manifest.get("filter", {}).get("sha256"),
        "dtype": "float32",  # of runs that do not name it
        **manifest.get("config", {}),
    }


def _absolute(path: str | None) -> str | None:
    """A local path made independent of the working directory; URLs and None do not change."""
    if path is None or "://" in path:
        return path
    prefix = "capfilt:" if path.startswith("capfilt:") else ""
    return prefix + os.path.abspath(os.path.expanduser(path.removeprefix(prefix)))
