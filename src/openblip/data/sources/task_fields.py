"""The fields of questions, statements, dialogs and instructions in a row of a table or list: checked, and
brought to the types of docs/data.md. A cell of a .csv is a text, so a list is written there as json and a
label as `true`.
"""

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

from openblip.data.sample import clean_text
from openblip.errors import SourceError

_ROUNDS = ("dialog", "turns", "conversations")

TASK_COLUMNS = ("question", "statement", "label", "instruction", *_ROUNDS)
"""Columns of which any makes a row useful without a caption."""

_TYPED = frozenset({*TASK_COLUMNS, "answers", "weight", "choices", "correct_choice"})


def task_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its task fields in their types, without those that are blank; other fields are left alone.

    Raises `SourceError`.
    """
    given = {name: value for name, value in row.items() if name not in _TYPED or value not in (None, "")}
    if "question" in given:
        given |= _question_fields(given)
    if "statement" in given:
        given["statement"] = _text(given["statement"], "statement")
        if "label" in given:
            given["label"] = truth(given["label"])
    if "instruction" in given:
        given["instruction"] = _text(given["instruction"], "instruction")
    for name in _ROUNDS:
        if name in given:
            given[name] = _rounds(given[name], name)
    return given


def _question_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "question": _text(row["question"], "question"),
        "answers": texts(row.get("answers", row.get("answer")), "answers"),
    }
    if "weight" in row:
        fields["weight"] = _weight(row["weight"])
    if "choices" in row:
        fields |= choices(row["choices"], row.get("correct_choice"))
    return fields


def texts(value: Any, name: str) -> list[str]:
    """A text, a list of texts or nothing, as a list; repeats stay, and blank ones do too."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):  # an answer that begins with a bracket
            value = json.loads(value)
    if value is None or value == "":
        return []
    found = [value] if isinstance(value, str) else value
    try:
        is_plain = isinstance(found, list) and "".join(found).isascii()
    except TypeError:
        found = None
    if not isinstance(found, list):
        raise SourceError(f"{name} must be a text or a list of texts, not {value!r:.80}")
    # Nearly all are ASCII, which has no lone surrogates: a table of millions is read fast.
    return [text.strip() if is_plain else clean_text(text) for text in found]


def choices(value: Any, correct: Any) -> dict[str, Any]:
    """The fields of a multiple choice; `correct` is the place of the right one, None where nobody says it."""
    listed = texts(value, "choices")
    if correct in (None, ""):
        return {"choices": listed}
    try:
        place = int(correct)
    except (TypeError, ValueError) as error:
        raise SourceError(f"the correct choice must be a number, not {correct!r:.80}") from error
    if not 0 <= place < len(listed):
        raise SourceError(f"the correct choice is number {place} of {len(listed)} choices, counted from 0")
    return {"choices": listed, "correct_choice": place}


def truth(value: Any) -> bool | None:
    """Whether a statement holds; None where nobody says so."""
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return value
    spelled = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else None
    if spelled is None:
        raise SourceError(f"the label of a statement must be true or false, not {value!r:.80}")
    return spelled


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not (text := clean_text(value)):
        raise SourceError(f"the {name} must be a text, not {value!r:.80}")
    return text


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
