"""Files of JSON lines, one or several for each input, and how the file of a killed run is continued."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from openblip.cli.inputs import Identity, ImageInput
from openblip.errors import ConfigError

Row = Mapping[str, Any]

_PLACE = ("shard", "key")


@dataclass(frozen=True, kw_only=True)
class LineFormat:
    """The lines that a command writes for one input.

    `fields` are what they hold beside the place of the input. `num_lines` is None where inputs have different
    numbers of lines. `given` are the texts of the options in the first field, one for each line.
    """

    fields: tuple[str, ...]
    num_lines: int | None = 1
    given: tuple[str, ...] | None = None

    def lines(self, image: ImageInput, rows: Sequence[Row]) -> str:
        """The JSON lines of one input."""
        place = {"key": image.key} if image.shard is None else {"shard": image.shard, "key": image.key}
        return "".join(json.dumps({**place, **row}, ensure_ascii=False) + "\n" for row in rows)

    def is_whole(self, rows: Sequence[Row], where: str) -> bool:
        """Whether these are all the lines of an input; ConfigError when they are none of this format."""
        wrong = any(set(row) - set(_PLACE) != set(self.fields) for row in rows)
        if self.given is not None and not wrong:
            wrong = [row[self.fields[0]] for row in rows] != list(self.given[: len(rows)])
        if wrong or (self.num_lines is not None and len(rows) > self.num_lines):
            raise self.error(where)
        return self.num_lines is None or len(rows) == self.num_lines

    def error(self, where: str) -> ConfigError:
        """For a file with something else at `where`."""
        number = "" if self.num_lines is None else f"{self.num_lines} for each image, "
        texts = "" if self.given is None else f", for the same {self.fields[0]}s"
        return ConfigError(
            f"{where} was not written by this command with these options, which give lines ({number}"
            f"{', '.join(('key', *self.fields))}{texts}); name another --out"
        )


def read_lines(path: Path) -> Iterator[tuple[Identity, list[Row], str, int]]:
    """The inputs of a file in order: which, its lines, where they begin, and the byte where they end.

    A half-written line at the end is left out. Raises ConfigError for a line that is none.
    """
    content = path.read_bytes() if path.exists() else b""
    identity: Identity | None = None
    rows: list[Row] = []
    first, end = "", 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        where = f"{path}:{number}"
        row = _row(line, where)
        own = (row.get("shard"), str(row["key"]))
        if own != identity:
            if identity is not None:
                yield identity, rows, first, end
            identity, rows, first = own, [], where
        rows.append(row)
        end += len(line)
    if identity is not None:
        yield identity, rows, first, end


def open_to_continue(path: Path, layout: LineFormat) -> tuple[TextIO, set[Identity]]:
    """Opens `path` for more lines, and says which inputs it already holds.

    What a killed run left half-written at the end, a line or an input without all its lines, is cut off;
    where the number of lines is not known, the last input is.

    Raises:
        ConfigError: the file holds something else than lines of this layout.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    present: set[Identity] = set()
    whole = last_start = 0
    last: Identity | None = None
    cut = ""  # where an input without all its lines begins: only the last one may be so
    for identity, rows, where, end in read_lines(path):
        if cut or identity in present:
            raise layout.error(cut or where)
        if layout.is_whole(rows, where):
            present.add(identity)
            last, last_start, whole = identity, whole, end
        else:
            cut = where
    if layout.num_lines is None and last is not None:
        present.discard(last)
        whole = last_start
    if path.exists() and whole < path.stat().st_size:
        os.truncate(path, whole)
    return path.open("a", encoding="utf-8"), present


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if isinstance(row, dict) and "key" in row:
            return row
    except ValueError:
        pass
    raise ConfigError(f"{where} is not a line that this command wrote; name another --out")
