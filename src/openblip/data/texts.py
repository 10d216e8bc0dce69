"""What samples are annotated with: captions, questions and answers, labels, dialogs, conversations.

The functions read the fields of a sample's json under the names of docs/data.md, for training and evaluation
alike. They raise `SourceError` for a field that is missing or not as described there.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from openblip.data.sample import Sample, clean_text, is_weight
from openblip.errors import SourceError

if TYPE_CHECKING:
    import numpy as np

MAX_QUESTION_TOKENS = 35  # released code
MAX_STATEMENT_WORDS = 40  # released code
MAX_DIALOG_TOKENS = 256  # ten rounds of VisDial have about 150 tokens
MAX_DIALOG_CAPTION_TOKENS = 40

_STRIPPED = re.compile(r"[.!\"()*#:;~]")
_SENTENCE_ENDS = (".", "!", "?")


def normalize_caption(text: str, max_words: int = 30) -> str:
    """BLIP's `pre_caption`: lower case, `.!"()*#:;~` become spaces, one space between words, at most
    `max_words` words.
    """
    return " ".join(_STRIPPED.sub(" ", text.lower()).split()[:max_words])


def normalize_question(text: str, max_words: int = 50) -> str:
    """BLIP's `pre_question`: lower case, `.!"()*#:;~` are removed, at most `max_words` words; "?" stays."""
    return " ".join(_STRIPPED.sub("", text.lower()).split()[:max_words])


def conversation_prompt(question_prompt: str, earlier: Sequence[tuple[str, str]], question: str) -> str:
    """A question after the turns before it: "Question: is it red? Answer: no. Question: why? Answer:".

    BLIP-2 puts a single question this way; several turns are joined as in the examples of its Figure 4.

    Args:
        question_prompt: how one question is put, with `{}` in its place.
        earlier: questions and answers of the turns before.
        question: the question without an answer.
    """
    turns = [f"{question_prompt.format(asked)} {_as_sentence(answer)}" for asked, answer in earlier]
    return " ".join([*turns, question_prompt.format(question)])


def _as_sentence(answer: str) -> str:
    return answer if answer.endswith(_SENTENCE_ENDS) else f"{answer}."


def dialog_turns(rounds: Sequence[tuple[str, str]], question: str, answer: str) -> list[str]:
    """A dialog as the turns that `Tokenizer.encode_turns` takes (BLIP section 5.5).

    Each earlier question is followed by its answer, and the last question by the answer to be judged. Texts
    are normalised as questions are. The paper leaves this format open.
    """
    return [
        f"{normalize_question(asked)} {normalize_question(said)}".strip()
        for asked, said in (*rounds, (question, answer))
    ]


CONVERSATION_FIELDS = frozenset({"turns", "dialog", "conversations", "instruction"})
"""Any of these fields makes a sample a conversation."""
IMAGE_PLACEHOLDER = "<image>"  # stands in LLaVA's texts where the image is
_HUMAN, _MODEL = ("human", "user"), ("gpt", "assistant", "model")


def text_field(sample: Sample, name: str) -> str:
    """The text in the field `name`; `SourceError` when there is none."""
    value = sample.info.get(name)
    if not isinstance(value, str) or not value.strip():
        raise SourceError(f"no {name}")
    return value


def draw_caption(sample: Sample, rng: "np.random.Generator") -> str:
    """One of the sample's captions at random, normalised; `SourceError` when it has none."""
    captions = [text for caption in sample.captions if (text := normalize_caption(caption))]
    if not captions:
        raise SourceError("no caption")
    return captions[int(rng.integers(len(captions)))]


def answers_of(sample: Sample) -> list[str]:
    """The answers of all annotators; empty without any. `SourceError` for anything but a list of texts."""
    answers = sample.info.get("answers", [])
    if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
        raise SourceError(f"the answers must be a list of strings, not {answers!r:.80}")
    return list(answers)


def weight_of(sample: Sample) -> float:
    """How much a question counts in training; `SourceError` for anything but a number from 0 on."""
    weight = sample.info.get("weight", 1.0)
    if not is_weight(weight):
        raise SourceError(f"the weight must be a number from 0 on, not {weight!r:.80}")
    return float(weight)


def question_with_answers(sample: Sample) -> tuple[str, list[tuple[str, float]]]:
    """The question, and its distinct answers with the share of annotators who gave each.

    Both are normalised as in the released code. The weights of a question sum to 1, those of Visual Genome's
    questions to 0.2. Raises `SourceError` for a sample without a question or answer.
    """
    question = normalize_question(text_field(sample, "question"))
    answers = Counter(filter(None, map(normalize_question, answers_of(sample))))
    if not question or not answers:
        raise SourceError("no question" if not question else "no answer")
    share = weight_of(sample) / answers.total()
    return question, [(answer, count * share) for answer, count in answers.items()]


def label_of(sample: Sample) -> bool | None:
    """Whether a statement is true; None without annotation. `SourceError` for anything but true and false."""
    label = sample.info.get("label")
    if label is not None and not isinstance(label, bool):
        raise SourceError(f"the label must be true or false, not {label!r:.80}")
    return label


class Round(NamedTuple):
    """One round of a dialog whose candidate answers can be ranked."""

    number: int
    """From 0."""
    history: list[tuple[str, str]]
    """Questions and answers of the rounds before."""
    question: str
    options: list[str]
    """The candidate answers."""
    answer_index: int | None
    """Which option is right; None without annotation."""
    relevance: list[float] | None
    """Of each option; None without annotation."""

    @property
    def answer(self) -> str | None:
        """The right option; None without annotation."""
        return None if self.answer_index is None else self.options[self.answer_index]


def open_rounds(sample: Sample) -> list[Round]:
    """The rounds of a dialog that have candidates, each with the answered rounds before it.

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
        if answer is None:  # the last round of a test split: none can follow
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
    if relevance is not None and not (
        isinstance(relevance, list) and len(relevance) == len(options) and all(map(is_weight, relevance))
    ):
        raise SourceError(
            f"the relevance in round {number} must be {len(options)} numbers from 0 on, one for each option, "
            f"not {relevance!r:.80}"
        )
    return Round(number, history, turn["question"], options, index, relevance)


class Turn(NamedTuple):
    """A question or instruction, and its answer."""

    question: str
    answer: str


def draw_turns(sample: Sample, rng: "np.random.Generator") -> list[Turn]:
    """The turns of a conversation, or a lone question with one of its answers at random.

    Raises `SourceError` for a sample with neither.
    """
    question = sample.info.get("question")
    if not isinstance(question, str) or sample.info.keys() & CONVERSATION_FIELDS:
        return turns_of(sample.info)
    answers = [text for answer in answers_of(sample) if (text := clean_text(answer))]
    if not answers:
        raise SourceError("no answer")
    return [Turn(clean_text(question), answers[int(rng.integers(len(answers)))])]


def turns_of(info: Mapping[str, Any]) -> list[Turn]:
    """The turns of a conversation, from whichever field of a sample's json has them.

    `turns` or `dialog`: a list of objects with `question` and `answer`, up to the first without an answer.
    `conversations`: LLaVA's list of objects with `from` and `value`, human and gpt in alternation.
    `instruction` with `answer` or `output`, and optionally `input`, which is put after the instruction.

    Raises `SourceError` when there is none of these, or it is not as described.
    """
    for name in ("turns", "dialog"):
        if info.get(name):
            return _question_turns(info[name], name)
    if info.get("conversations"):
        return _message_turns(info["conversations"])
    if info.get("instruction"):
        more = info.get("input")
        parts = [_turn_text(info["instruction"], "instruction"), _turn_text(more, "input") if more else ""]
        answer = _turn_text(info.get("answer", info.get("output")), "answer")
        return [Turn("\n".join(filter(None, parts)), answer)]
    raise SourceError("no instruction, turns, dialog or conversations")


def _question_turns(items: Any, name: str) -> list[Turn]:
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise SourceError(f"{name} must be a list of objects with question and answer, not {items!r:.80}")
    turns = [
        Turn(_turn_text(item.get("question"), "question"), _turn_text(item["answer"], "answer"))
        for item in takewhile(lambda item: item.get("answer") is not None, items)
    ]
    if not turns:
        raise SourceError(f"no answer in {name}")
    return turns


def _message_turns(messages: Any) -> list[Turn]:
    """LLaVA's messages, two for each turn; a last one without an answer is left out."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise SourceError(f"conversations must be a list of objects with from and value, not {messages!r:.80}")
    for number, message in enumerate(messages):
        speaker, expected = message.get("from"), (_HUMAN, _MODEL)[number % 2]
        if speaker not in expected:
            raise SourceError(f"message {number} of the conversation is from {speaker!r:.40}, not {expected[0]}")
    texts = [_turn_text(message.get("value"), "value of a message") for message in messages]
    turns = [Turn(texts[i], texts[i + 1]) for i in range(0, len(texts) - 1, 2)]
    if not turns:
        raise SourceError("no answer in conversations")
    return turns


def _turn_text(value: Any, name: str) -> str:
    text = clean_text(value.replace(IMAGE_PLACEHOLDER, "")) if isinstance(value, str) else ""
    if not text:
        raise SourceError(f"the {name} must be a text, not {value!r:.80}")
    return text
