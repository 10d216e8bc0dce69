"""The JSON lines that `openblip caption` writes, and how a file of them is continued."""

import json
import os
from pathlib import Path
from typing import Any, TextIO

from openblip.cli.inputs import Identity, ImageInput
from openblip.errors import ConfigError


def caption_lines(image: ImageInput, captions: list[Any]) -> str:
    """One JSON line per caption of an image.

    Args:
        image: the image they describe.
        captions: objects with `.text` and `.logprob`.
    """
    place = {"key": image.key} if image.shard is None else {"shard": image.shard, "key": image.key}
    lines = ({**place, "caption": caption.text, "logprob": round(caption.logprob, 6)} for caption in captions)
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def open_to_continue(path: Path, num_captions: int) -> tuple[TextIO, set[Identity]]:
    """Opens `path` for more lines, and says which images it already holds.

    What a killed run left half-written at the end, a line or an image without all its captions, is cut off.

    Raises:
        ConfigError: the file holds something else than the lines of this command with `num_captions` each.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    counts: dict[Identity, int] = {}
    last: Identity | None = None
    start_of_last = end = 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        identity = _identity(line, f"{path}:{number}")
        if identity != last:
            last, start_of_last = identity, end
        counts[identity] = counts.get(identity, 0) + 1
        end += len(line)
    if last is not None and counts[last] < num_captions:
        del counts[last]
        end = start_of_last
    if any(count != num_captions for count in counts.values()):
        raise ConfigError(f"{path} was not written with --num-captions {num_captions}; name another --out")
    if end < len(content):
        os.truncate(path, end)
    return path.open("a", encoding="utf-8"), set(counts)


def _identity(line: bytes, where: str) -> Identity:
    try:
        entry = json.loads(line)
        return entry.get("shard"), str(entry["key"])
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{where} is not a line that `openblip caption` wrote; name another --out"
        ) from error
