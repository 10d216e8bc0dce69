"""A JSON list of texts in a file that an option names."""

import json
from pathlib import Path

from openblip.errors import ConfigError


def read_texts(path: Path, option: str) -> list[str]:
    """At least one text. ConfigError names the option when the file is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--{option} {path} is not readable JSON: {error}") from error
    if not isinstance(content, list) or not content or not all(isinstance(text, str) for text in content):
        raise ConfigError(f"--{option} {path} is no JSON list of strings")
    return content
