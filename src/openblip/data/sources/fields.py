"""The fields of questions, statements, dialogs and instructions in a row, checked and brought to the types of
docs/data.md. A cell of a .csv is a text, so a list is written there as json and a label as `true`.
"""

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

from openblip.data.sample import clean_text
from openblip.errors import SourceError

_ROUNDS = {"dialog", "turns", "conversations"}

TASK_COLUMNS = ("question", "statement", "label", "instruction", "dialog", "turns", "conversations")
"""Columns of which any makes a row useful without a caption."""

_TYPED = frozenset({*TASK_COLUMNS, "answers", "weight", "choices", "correct_choice"})


def task_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with its task fields in their types and without those that are empty.

    Other fields stay as they are. Raises `SourceError` for a field of another type.
    """
    fields = {name: value for name, value in row.items() if name not in _TYPED or value not in (None, "")}
    for name in fields.keys() & {"question", "statement", "instruction"}:
        fields[name] = text_of(fields, name)
    if "question" in fields:
        fields["answers"] = text_list(fields.get("answers", fields.get("answer")), "answers")
        if "weight" in fields:
            fields["weight"] = _weight(fields["weight"])
        if "choices" in fields:
            fields |= choice_fields(fields["choices"], fields.get("correct_choice"))
    if "statement" in fields and "label" in fields:
        fields["label"] = statement_label(fields["label"])
    for name in fields.keys() & _ROUNDS:
        fields[name] = _rounds(fields[name], name)
    return fields


def text_list(value: Any, name: str) -> list[str]:
    """Return a text, a list of texts or nothing as a list, cleaned; repeats and empty texts stay."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):  # an answer that begins with a bracket
            value = json.loads(value)
    if value is None or value == "":
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SourceError(f"{name} must be a text or a list of texts, not {value!r:.80}")
    # Nearly all are ASCII, which has no lone surrogates: a table of millions is read fast.
    return [text.strip() if text.isascii() else clean_text(text) for text in texts]


def choice_fields(choices: Any, correct: Any) -> dict[str, Any]:
    """The fields of a multiple choice; `correct` is the index of the right one, None where it is unknown."""
    listed = text_list(choices, "choices")
    if correct in (None, ""):
        return {"choices": listed}
    try:
        index = int(correct)
    except (TypeError, ValueError) as error:
        raise SourceError(f"the correct choice must be a number, not {correct!r:.80}") from error
    if not 0 <= index < len(listed):
        raise SourceError(f"the correct choice is number {index} of {len(listed)} choices, counted from 0")
    return {"choices": listed, "correct_choice": index}


def statement_label(value: Any) -> bool | None:
    """Whether a statement holds; None where the row does not say."""
    if value is None or value == "":
        return None
    label = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(label, bool):
        raise SourceError(f"the label of a statement must be true or false, not {value!r:.80}")
    return label


def _weight(value: Any) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise SourceError(f"the weight must be a positive number, not {value!r:.80}")
    return weight


def _rounds(value: Any, name: str) -> list[Any]:
    """A list of objects, each with what was asked or said."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise SourceError(f"the {name} is broken json: {error}") from error
    said = "value" if name == "conversations" else "question"
    if not isinstance(value, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get(said), str) for turn in value
    ):
        raise SourceError(f"the {name} must be a list of rounds, each with a {said}")
    return value


def text_of(item: Mapping[str, Any], name: str) -> str:
    """A text that is not empty, cleaned; raises `SourceError` for anything else."""
    value = item.get(name)
    if not isinstance(value, str) or not (text := clean_text(value)):
        raise _wrong(item, name, "a text")
    return text


def id_of(item: Mapping[str, Any], name: str) -> int | str:
    """A number or a text that names something; raises `SourceError` for anything else."""
    value = item.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise _wrong(item, name, "a number or a name")
    return value


def number_of(item: Mapping[str, Any], name: str) -> int:
    """An id that is part of a file name, as of COCO; a text of digits counts. Raises `SourceError`."""
    value = id_of(item, name)
    try:
        return int(value)
    except ValueError as error:
        raise _wrong(item, name, "a number") from error


def file_name_of(item: Mapping[str, Any], name: str) -> str:
    """The name of a file; raises `SourceError` for anything else."""
    value = item.get(name)
    if not isinstance(value, str) or not value or "\0" in value:
        raise _wrong(item, name, "the name of a file")
    return value


def _wrong(item: Mapping[str, Any], name: str, wanted: str) -> SourceError:
    return SourceError(f"{name} must be {wanted}, not {item[name]!r:.80}" if name in item else f"no {name}")
