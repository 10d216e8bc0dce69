"""The fields of samples: rounds of dialogs, and the forms in which a conversation may be written."""

from collections.abc import Mapping
from typing import Any

import pytest

from openblip.data.sample import Sample
from openblip.data.texts import Turn, open_rounds, turns_of
from openblip.errors import SourceError


def turn(number: int, **changes: Any) -> dict[str, Any]:
    options = [f"answer {number}", "yes", "no", f"Answer {number}.", "red", "blue"]
    return {
        "question": f"Question {number}?",
        "answer": f"answer {number}",
        "options": options,
        "answer_index": 0,
    } | changes


def dialog(*rounds: dict[str, Any]) -> Sample:
    return Sample("k", "s", b"", (), "source#1", {"dialog": list(rounds)})


def test_open_rounds_are_those_with_candidates_behind_answered_ones() -> None:
    rounds = open_rounds(dialog(turn(0), turn(1, options=None), turn(2, answer=None), turn(3)))
    assert [each.number for each in rounds] == [0, 2]  # nothing can follow round 2
    assert rounds[1].history == [("Question 0?", "answer 0"), ("Question 1?", "answer 1")]
    assert rounds[1].relevance is None
    assert open_rounds(dialog(turn(0, relevance=[0.5, 0, 1, 0, 0, 0])))[0].relevance == [0.5, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("info", "turns"),
    [
        ({"instruction": "Do", "answer": "Done"}, [("Do", "Done")]),
        ({"instruction": "Do", "input": "this", "output": "Done"}, [("Do\nthis", "Done")]),
        ({"dialog": [{"question": "a?", "answer": "b", "options": ["b"]}, {"question": "c?"}]}, [("a?", "b")]),
        (
            {"turns": [{"question": "a?", "answer": "b"}, {"question": "c"}, {"question": "d", "answer": "e"}]},
            [("a?", "b")],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a?\n<image>"},
                    {"from": "gpt", "value": "b"},
                    {"from": "human", "value": "c?"},
                ]
            },
            [("a?", "b")],
        ),
    ],
)
def test_forms_of_turns(info: Mapping[str, Any], turns: list[tuple[str, str]]) -> None:
    assert turns_of(info) == [Turn(*turn) for turn in turns]


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({}, "no instruction, turns, dialog or conversations"),
        ({"instruction": "Do"}, "the answer must be a text"),
        ({"instruction": 5, "answer": "x"}, "the instruction must be a text"),
        ({"turns": "a"}, "turns must be a list of objects"),
        ({"turns": [{"question": "a?"}]}, "no answer in turns"),
        ({"turns": [{"question": "a?", "answer": 3}]}, "the answer must be a text"),
        ({"conversations": {"from": "human"}}, "conversations must be a list of objects"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "no answer in conversations"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "message 0 .* from 'gpt', not human"),
        (
            {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]},
            "value of a message must be a text",
        ),
    ],
)
def test_what_is_no_conversation_is_named(info: Mapping[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        turns_of(info)
