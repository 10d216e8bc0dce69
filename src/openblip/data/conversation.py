"""Instructions and questions about a picture with their answers, in turns, and how they become a prompt.

One form for training and for use: what a model was asked in training is what `chat` asks it.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from openblip.data.sample import clean_text
from openblip.errors import SourceError

FORMS = frozenset({"turns", "dialog", "conversations", "instruction"})
"""Fields of which any makes a sample a conversation."""
PLACEHOLDER = "<image>"  # where LLaVA's texts say that the picture stands
_HUMAN, _MODEL = ("human", "user"), ("gpt", "assistant", "model")
_ENDS = (".", "!", "?")


class Turn(NamedTuple):
    """What was asked or told, and what was answered."""

    question: str
    answer: str


def conversation_prompt(question_prompt: str, earlier: Sequence[tuple[str, str]], question: str) -> str:
    """A question behind the turns before it: "Question: is it red? Answer: no. Question: why? Answer:".

    question_prompt: how one question is put, with `{}` in its place. BLIP-2 asks a single question so;
    several turns are joined as in the examples of its Figure 4.
    """
    turns = [f"{question_prompt.format(asked)} {_as_sentence(answer)}" for asked, answer in earlier]
    return " ".join([*turns, question_prompt.format(question)])


def turns_of(info: Mapping[str, Any]) -> list[Turn]:
    """The turns of a sample's json, in whichever form of docs/data.md it has them.

    `turns` or `dialog`: a list of objects with `question` and `answer`, up to the first without an answer.
    `conversations`: LLaVA's list of objects with `from` and `value`, human and gpt by turns. `instruction`
    with `answer` or `output`, and `input` behind the instruction where there is one.

    Raises SourceError when there is none of these, or it is not as described.
    """
    for name in ("turns", "dialog"):
        if info.get(name):
            return _answered(info[name], name)
    if info.get("conversations"):
        return _told(info["conversations"])
    if info.get("instruction"):
        more = info.get("input")
        parts = [_text(info["instruction"], "instruction"), _text(more, "input") if more else ""]
        answer = _text(info.get("answer", info.get("output")), "answer")
        return [Turn("\n".join(filter(None, parts)), answer)]
    raise SourceError("no instruction, turns, dialog or conversations")


def _answered(turns: Any, name: str) -> list[Turn]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise SourceError(f"{name} must be a list of objects with question and answer, not {turns!r:.80}")
    found = [
        Turn(_text(turn.get("question"), "question"), _text(turn["answer"], "answer"))
        for turn in takewhile(lambda turn: turn.get("answer") is not None, turns)
    ]
    if not found:
        raise SourceError(f"no answer in {name}")
    return found


def _told(messages: Any) -> list[Turn]:
    """LLaVA's messages, two for a turn; a last one that nobody has answered is left out."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise SourceError(
            f"conversations must be a list of objects with from and value, not {messages!r:.80}"
        )
    speakers = [message.get("from") for message in messages]
    for place, speaker in enumerate(speakers):
        expected = (_HUMAN, _MODEL)[place % 2]
        if speaker not in expected:
            raise SourceError(
                f"message {place} of the conversation is from {speaker!r:.40}, not {expected[0]}"
            )
    texts = [_text(message.get("value"), "value of a message") for message in messages]
    turns = [Turn(texts[i], texts[i + 1]) for i in range(0, len(texts) - 1, 2)]
    if not turns:
        raise SourceError("no answer in conversations")
    return turns


def _text(value: Any, name: str) -> str:
    text = clean_text(value.replace(PLACEHOLDER, "")) if isinstance(value, str) else ""
    if not text:
        raise SourceError(f"the {name} must be a text, not {value!r:.80}")
    return text


def _as_sentence(answer: str) -> str:
    return answer if answer.endswith(_ENDS) else f"{answer}."
