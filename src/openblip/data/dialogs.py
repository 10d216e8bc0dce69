"""Dialogs about a picture: the rounds of a sample, and how one becomes a text (BLIP section 5.5).

The paper leaves the format of the text open.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from openblip.data.sample import Sample, is_weight
from openblip.data.tokenizer import normalize_question
from openblip.errors import SourceError

MAX_DIALOG_TOKENS = 256  # ten rounds of VisDial have about 150 word pieces
MAX_CAPTION_TOKENS = 40


def dialog_turns(rounds: Sequence[tuple[str, str]], question: str, answer: str) -> list[str]:
    """The turns that `Tokenizer.encode_turns` reads: earlier questions with their answers, and the answer in
    question behind the open question. Texts are normalised as questions are.
    """
    return [
        f"{normalize_question(asked)} {normalize_question(said)}".strip()
        for asked, said in (*rounds, (question, answer))
    ]


class Round(NamedTuple):
    """One round of a dialog that can be ranked; `history` are the rounds before it, with their answers."""

    number: int
    """From 0."""
    history: list[tuple[str, str]]
    question: str
    options: list[str]
    answer_index: int | None
    relevance: list[float] | None

    @property
    def answer(self) -> str | None:
        """The right one of the options; None where nobody said which."""
        return None if self.answer_index is None else self.options[self.answer_index]


def open_rounds(sample: Sample) -> list[Round]:
    """The rounds of a dialog that have candidates, behind the answered ones before them.

    Raises `SourceError` when there is none, or one is not as docs/data.md says.
    """
    dialog = sample.info.get("dialog")
    if not isinstance(dialog, list):
        raise SourceError("no dialog")
    rounds: list[Round] = []
    history: list[tuple[str, str]] = []
    for number, turn in enumerate(dialog):
        if not isinstance(turn, dict) or not isinstance(turn.get("question"), str):
            raise SourceError(f"round {number} has no question")
        if turn.get("options"):
            rounds.append(_open_round(number, history, turn))
        answer = turn.get("answer")
        if answer is None:  # of a test split: nothing can follow
            break
        if not isinstance(answer, str):
            raise SourceError(f"the answer of round {number} must be a text, not {answer!r:.80}")
        history = [*history, (turn["question"], answer)]
    if not rounds:
        raise SourceError("no round with options to rank")
    return rounds


def _open_round(number: int, history: list[tuple[str, str]], turn: dict[str, Any]) -> Round:
    options, index, relevance = turn["options"], turn.get("answer_index"), turn.get("relevance")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise SourceError(f"the options of round {number} must be a list of strings, not {options!r:.80}")
    if index is not None and (type(index) is not int or not 0 <= index < len(options)):
        raise SourceError(f"round {number} has {len(options)} options and its answer is number {index!r:.80}")
    if relevance is not None and not _are_relevances(relevance, len(options)):
        raise SourceError(
            f"the relevance in round {number} must be {len(options)} numbers from 0 on, one for each option, "
            f"not {relevance!r:.80}"
        )
    return Round(number, history, turn["question"], options, index, relevance)


def _are_relevances(value: Any, count: int) -> bool:
    if not isinstance(value, list) or len(value) != count:
        return False
    return all(map(is_weight, value))
