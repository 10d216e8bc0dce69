"""The folder of a CapFilt run: where its files are, and how they get there without ever being half written.

```
DIR/manifest.json                  what was run; written first
DIR/captions/<shard>.parquet       one row per text
DIR/captions/<shard>.rejects.jsonl samples that could not be read
DIR/captions/<shard>.report.json   written last: the shard is done
DIR/captions/<shard>.failure.json  why the shard could not be finished; gone once it is
DIR/report.html
```
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openblip.data.captions import finished_shards
from openblip.errors import ConfigError

TEMPORARY = ".tmp"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary file beside `path`, flushes it to the disk and renames it: readers see
    the old file or the whole new one, also after a crash or a kill at any moment."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8, atomically. A lone surrogate (a file name that is no UTF-8) is kept as `\\udcxx`."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))

    write_atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """One JSON object per line, atomically."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


@dataclass(frozen=True)
class CapFiltFolder:
    """Paths of a run's files, and what they say about its state."""

    root: Path

    @property
    def captions_dir(self) -> Path:
        return self.root / "captions"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def report_page(self) -> Path:
        return self.root / "report.html"

    def captions(self, shard: str) -> Path:
        return self._of(shard, ".parquet")

    def rejects(self, shard: str) -> Path:
        return self._of(shard, ".rejects.jsonl")

    def report(self, shard: str) -> Path:
        return self._of(shard, ".report.json")

    def failure(self, shard: str) -> Path:
        return self._of(shard, ".failure.json")

    def _of(self, shard: str, suffix: str) -> Path:
        return self.captions_dir / f"{shard}{suffix}"

    def is_done(self, shard: str) -> bool:
        """The report is written last, so it means done; a caption file removed by hand is made again."""
        return self.report(shard).is_file() and self.captions(shard).is_file()

    def done_shards(self) -> list[str]:
        """Names of the finished shards, sorted."""
        return [shard for shard in finished_shards(self.root) if self.is_done(shard)]

    def failures(self) -> list[dict[str, Any]]:
        """The records of shards that could not be finished, by shard."""
        return [read_json(path) for path in sorted(self.captions_dir.glob("*.failure.json"))]

    def remove_leftovers(self) -> None:
        """Removes the temporary files of a run that was killed."""
        for folder in (self.root, self.captions_dir):
            for path in folder.glob(f"*{TEMPORARY}"):
                path.unlink(missing_ok=True)

    def read_manifest(self) -> dict[str, Any]:
        """The manifest. Raises `ConfigError` when the folder is no CapFilt run."""
        if not self.manifest.is_file():
            raise ConfigError(
                f"{self.root} has no manifest.json, so it is not the output of a CapFilt run; "
                "give the folder that was --out of `openblip capfilt`"
            )
        return read_json(self.manifest)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `ConfigError` that names the file when it is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); remove it and run the command again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object; remove it and run the command again")
    return value
