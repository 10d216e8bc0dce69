"""How dialogs and conversations become texts, and dialogs tokens."""

import pytest
import torch

from openblip.data.texts import conversation_prompt, dialog_turns
from openblip.data.tokenizer import Tokenizer
from openblip.errors import ConfigError

TOKENIZER = Tokenizer.train(["is it red? yes no how many dogs two one cat"] * 2, 200)


def test_the_answer_in_question_stands_behind_the_open_question() -> None:
    rounds = [("Is it RED?", "Yes."), ("How many dogs", "two")]
    assert dialog_turns(rounds, "Is it (a) cat?", "No!") == ["is it red? yes", "how many dogs two", "is it a cat? no"]
    assert dialog_turns([], "is it", "") == ["is it"]


def test_a_long_question_leaves_its_answer_whole() -> None:
    """Or all candidates would look the same."""
    (turn,) = dialog_turns([], "how " * 70, "two dogs")
    assert turn.endswith(" two dogs")
    assert turn.split().count("how") == 50


def test_every_turn_ends_with_a_separator() -> None:
    tokens = TOKENIZER.encode_turns([["is it red? yes", "no"], ["two"]], 30)
    words = [TOKENIZER.encode([text]).ids[0, 1:].tolist() for text in ("is it red? yes", "no", "two")]
    expected = [TOKENIZER.cls_id, *words[0], *words[1]]
    assert tokens.ids[0].tolist() == expected
    assert tokens.ids[0].tolist().count(TOKENIZER.sep_id) == 2
    assert tokens.ids[1, :3].tolist() == [TOKENIZER.cls_id, *words[2]]
    assert tokens.mask.sum(dim=1).tolist() == [len(expected), 3]
    assert (tokens.ids[~tokens.mask] == TOKENIZER.pad_id).all()


@pytest.mark.parametrize("max_length", [2, 3, 5, 9])
def test_a_dialog_that_is_too_long_loses_its_oldest_tokens(max_length: int) -> None:
    turns = ["is it red? yes", "how many dogs two", "one cat"]
    whole = TOKENIZER.encode_turns([turns], 100).ids[0].tolist()
    cut = TOKENIZER.encode_turns([turns], max_length)
    assert cut.ids[0].tolist() == [TOKENIZER.cls_id, *whole[-(max_length - 1) :]]
    assert cut.mask.all()
    assert cut.ids.dtype == torch.int64


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_length 1"):
        TOKENIZER.encode_turns([["red"]], 1)
    assert TOKENIZER.encode_turns([[]], 5).ids.tolist() == [[TOKENIZER.cls_id]]


def test_prompts_of_other_models() -> None:
    assert conversation_prompt("Question: {} Short answer:", [], "why?") == "Question: why? Short answer:"
    assert conversation_prompt("{}", [("Who?", "He!"), ("Me?", "no")], "Why?") == "Who? He! Me? no. Why?"
