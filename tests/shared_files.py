"""Files that tests write and read, in one place for all folders."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar of files by name and content. Folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def as_json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def read_lines(path: Path) -> list[Any]:
    return json_lines(path.read_text())


def printed(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    """The JSON lines on standard output."""
    return json_lines(capsys.readouterr().out)
