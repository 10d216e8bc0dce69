"""Reading a json document of hundreds of megabytes: what nobody asks for is let go while it is parsed."""

import json
import re
import sys
from array import array
from typing import Any

from openblip.data.sources import storage
from openblip.errors import SourceError


def read_text(path: str) -> str:
    """Raises `SourceError`."""
    try:
        return storage.read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: broken json: {error}") from error


def read_document(path: str) -> Any:
    """The parsed json of a file; raises `SourceError`."""
    content, is_whole = parse_document(read_text(path), path)
    if not is_whole:
        raise SourceError(f"{path}: broken json: there is more after its end")
    return content


def parse_document(text: str, path: str) -> tuple[Any, bool]:
    """The first json value of a text, and whether nothing follows it. Raises `SourceError`."""
    try:
        content, end = _DECODER.raw_decode(text, _blanks_end(text, 0))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: broken json: {error}") from error
    return content, _blanks_end(text, end) == len(text)


def _lightened(found: dict[str, Any]) -> Any:
    """An object of a known kind as what is read of it; anything else as it is.

    VQA: ten answers to each of 440,000 questions, of which a few thousand are different. Karpathy: the tokens
    of 600,000 sentences. Visual Genome: the objects that 1.7 million questions are about. VisDial: a hundred
    numbers for each of 1.2 million rounds.
    """
    if "answer_confidence" in found:
        answer = found.get("answer")
        return sys.intern(answer) if type(answer) is str else found
    if "raw" in found:
        return found["raw"]
    if "answer_options" in found:
        found["answer_options"] = _packed(found["answer_options"])
    elif "qa_id" in found:
        found.pop("a_objects", None)
        found.pop("q_objects", None)
    return found


def _packed(numbers: Any) -> Any:
    """Numbers in four bytes each; left alone, and found broken later, where they are no such list."""
    try:
        return array("i", numbers)
    except (TypeError, OverflowError):
        return numbers


_DECODER = json.JSONDecoder(object_hook=_lightened)
_BLANKS = re.compile(r"\s*")


def _blanks_end(text: str, start: int) -> int:
    """Where the blanks from `start` end."""
    found = _BLANKS.match(text, start)
    return start if found is None else found.end()
