"""Rounds of dialogs, the forms in which a conversation may be written, and how both become texts."""

from collections.abc import Mapping
from typing import Any

import pytest

from openblip.data.sample import Sample
from openblip.data.texts import Turn, conversation_prompt, dialog_turns, normalize_caption, open_rounds, turns_of
from openblip.errors import SourceError


def turn(number: int, **changes: Any) -> dict[str, Any]:
    options = [f"answer {number}", "yes", "no", f"Answer {number}.", "red", "blue"]
    fields = {"question": f"Question {number}?", "answer": f"answer {number}", "options": options, "answer_index": 0}
    return fields | changes


def dialog(*rounds: dict[str, Any]) -> Sample:
    return Sample("k", "s", b"", (), "source#1", {"dialog": list(rounds)})


def message(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


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
        ({"turns": [{"question": "a?", "answer": "b"}, {"question": "c"}, turn(3)]}, [("a?", "b")]),
        (
            {"conversations": [message("human", "a?\n<image>"), message("gpt", "b"), message("human", "c?")]},
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
        ({"conversations": [message("human", "a")]}, "no answer in conversations"),
        ({"conversations": [message("gpt", "a")]}, "message 0 .* from 'gpt', not human"),
        ({"conversations": [message("human", "<image>"), message("gpt", "a")]}, "value of a message must be a text"),
    ],
)
def test_what_is_no_conversation_is_named(info: Mapping[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        turns_of(info)


def test_normalize_caption() -> None:
    assert normalize_caption(' A "Dog"...  (left)\n#1; ~x: ') == "a dog left 1 x"
    assert normalize_caption("It's a t-shirt, yes") == "it's a t-shirt, yes"
    assert normalize_caption("w " * 50).split() == ["w"] * 50
    assert normalize_caption("!!!") == ""


def test_the_answer_in_question_stands_behind_the_open_question() -> None:
    rounds = [("Is it RED?", "Yes."), ("How many dogs", "two")]
    assert dialog_turns(rounds, "Is it (a) cat?", "No!") == ["is it red? yes", "how many dogs two", "is it a cat? no"]
    assert dialog_turns([], "is it", "") == ["is it"]


def test_a_long_question_leaves_its_answer_whole() -> None:
    """Or all candidates would look the same."""
    (turn,) = dialog_turns([], "how " * 70, "two dogs")
    assert turn.endswith(" two dogs")
    assert turn.split().count("how") == 70


def test_prompts_of_other_models() -> None:
    assert conversation_prompt("Question: {} Short answer:", [], "why?") == "Question: why? Short answer:"
    assert conversation_prompt("{}", [("Who?", "He!"), ("Me?", "no")], "Why?") == "Who? He! Me? no. Why?"
