"""Texts in a JSON file that an option names: a list, or an object with a text for each name."""

import json
from pathlib import Path
from typing import Any

from openblip.errors import ConfigError


def read_texts(path: Path, option: str) -> list[str]:
    """A list of at least one text. ConfigError names the option when the file is something else."""
    content = _read(path, option)
    if not isinstance(content, list) or not _all_texts(content):
        raise ConfigError(f"--{option} {path} is no JSON list of strings")
    return content


def read_named_texts(path: Path, option: str) -> dict[str, str]:
    """A text for each name; of a list, each text for itself. ConfigError as `read_texts`."""
    content = _read(path, option)
    if isinstance(content, dict) and _all_texts(list(content.values())):
        return content
    if not isinstance(content, list) or not _all_texts(content):
        raise ConfigError(f"--{option} {path} is neither a JSON list of strings nor an object of them")
    return {text: text for text in content}


def _read(path: Path, option: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--{option} {path} is not readable JSON: {error}") from error


def _all_texts(values: list[Any]) -> bool:
    """Whether there are any, all of them strings."""
    return bool(values) and all(isinstance(value, str) for value in values)
