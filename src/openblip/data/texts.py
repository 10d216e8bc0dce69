"""The texts and annotations of samples, and how texts are put to a model, in training and in use alike.

Samples' annotations are fields of their json under the names of docs/data.md. What reads them raises `SourceError` for
a field that is missing or not as described there. No torch here: recipes read the limits.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from openblip.data.sample import Sample, clean_text
from openblip.errors import SourceError

if TYPE_CHECKING:
    import numpy as np

_CONVERSATION_FIELDS = ("turns", "dialog", "conversations", "instruction")  # any makes a sample a conversation
_IMAGE_PLACEHOLDER = "<image>"  # stands in LLaVA's texts where the image is
_SPEAKERS = (("human", "user"), ("gpt", "assistant", "model"))  # of LLaVA's messages, in alternation
_STRIPPED = re.compile(r"[.!\"()*#:;~]")


def normalize_caption(text: str) -> str:
    """BLIP's `pre_caption`: lower case, `.!"()*#:;~` become spaces, one space between words. Deviation: the released
    code also cuts to 30 words, statements of NLVR2 to 40; here only tokens are limited, where they are made.
    """
    return " ".join(_STRIPPED.sub(" ", text.lower()).split())


def normalize_question(text: str) -> str:
    """BLIP's `pre_question`: lower case, `.!"()*#:;~` are removed; "?" stays. Deviation as in `normalize_caption`."""
    return " ".join(_STRIPPED.sub("", text.lower()).split())


def plain_text(text: str) -> str:
    """A text as it is written, with one space between words: what a language model reads."""
    return " ".join(clean_text(text).split())


def conversation_prompt(question_prompt: str, earlier: Sequence[tuple[str, str]], question: str) -> str:
    """A question after the turns before it: "Question: is it red? Answer: no. Question: why? Answer:". BLIP-2 puts a
    single question this way; several turns are joined as in the examples of its Figure 4. `question_prompt` says how
    one question is put, with `{}` in its place; `earlier` has questions with answers.
    """
    turns = []
    for asked, answer in earlier:
        end = "" if answer.endswith((".", "!", "?")) else "."
        turns.append(f"{question_prompt.format(asked)} {answer}{end}")
    return " ".join([*turns, question_prompt.format(question)])


def dialog_turns(rounds: Sequence[tuple[str, str]], question: str, answer: str) -> list[str]:
    """A dialog as the turns that `Tokenizer.encode_turns` takes (BLIP section 5.5). Each earlier question is followed
    by its answer, and the last question by the answer to be judged. Texts are normalised as questions are. The paper
    leaves this format open.
    """
    pairs = [*rounds, (question, answer)]
    return [f"{normalize_question(asked)} {normalize_question(said)}".strip() for asked, said in pairs]


def text_field(sample: Sample, name: str) -> str:
    """The text in the field `name`."""
    value = sample.info.get(name)
    if not isinstance(value, str) or not value.strip():
        raise SourceError(f"no {name}")
    return value


def draw_caption(
    sample: Sample, rng: "np.random.Generator", normalize: Callable[[str], str] = normalize_caption
) -> str:
    """One of the sample's captions at random, normalised; `plain_text` leaves it as it is written."""
    captions = [normalize(caption) for caption in sample.captions if normalize_caption(caption)]
    if not captions:
        raise SourceError("no caption")
    return captions[int(rng.integers(len(captions)))]


def answers_of(sample: Sample) -> list[str]:
    """The answers of all annotators; empty without any."""
    answers = sample.info.get("answers", [])
    if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
        raise SourceError(f"the answers must be a list of strings, not {answers!r:.80}")
    return list(answers)


def question_with_answers(
    sample: Sample, normalize: Callable[[str], str] = normalize_question
) -> tuple[str, list[tuple[str, float]]]:
    """The question, and its distinct answers with the share of annotators who gave each. Both are normalised as in the
    released code; `plain_text` leaves them as they are written, an answer as it was written first. The weights of a
    question sum to 1, those of Visual Genome's questions to 0.2.
    """
    question = normalize(text_field(sample, "question"))
    answers = Counter(filter(None, map(normalize_question, answers_of(sample))))
    spellings = {normalize_question(answer): normalize(answer) for answer in reversed(answers_of(sample))}
    if not question or not answers:
        raise SourceError("no question" if not question else "no answer")
    weight = sample.info.get("weight", 1.0)
    if not _is_weight(weight):
        raise SourceError(f"the weight must be a number from 0 on, not {weight!r:.80}")
    share = float(weight) / answers.total()
    return question, [(spellings[answer], count * share) for answer, count in answers.items()]


def label_of(sample: Sample) -> bool | None:
    """Whether a statement is true; None without annotation."""
    label = sample.info.get("label")
    if label is not None and not isinstance(label, bool):
        raise SourceError(f"the label must be true or false, not {label!r:.80}")
    return label


class Round(NamedTuple):
    """One round of a dialog whose candidate answers can be ranked."""

    number: int  # from 0
    history: list[tuple[str, str]]  # questions and answers of the rounds before
    question: str
    options: list[str]  # the candidate answers
    answer_index: int | None  # which option is right; None without annotation
    relevance: list[float] | None  # of each option; None without annotation

    @property
    def answer(self) -> str | None:
        """The right option; None without annotation."""
        return None if self.answer_index is None else self.options[self.answer_index]


def open_rounds(sample: Sample) -> list[Round]:
    """The rounds of a dialog that have candidates, each with the answered rounds before it; at least one."""
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
        isinstance(relevance, list) and len(relevance) == len(options) and all(map(_is_weight, relevance))
    ):
        expected = f"{len(options)} numbers from 0 on, one for each option"
        raise SourceError(f"the relevance in round {number} must be {expected}, not {relevance!r:.80}")
    return Round(number, history, turn["question"], options, index, relevance)


class Turn(NamedTuple):
    """A question or instruction, and its answer."""

    question: str
    answer: str


def draw_turns(sample: Sample, rng: "np.random.Generator") -> list[Turn]:
    """The turns of a conversation, or a lone question with one of its answers at random."""
    question = sample.info.get("question")
    if not isinstance(question, str) or sample.info.keys() & set(_CONVERSATION_FIELDS):
        return turns_of(sample.info)
    answers = [text for answer in answers_of(sample) if (text := clean_text(answer))]
    if not answers:
        raise SourceError("no answer")
    return [Turn(clean_text(question), answers[int(rng.integers(len(answers)))])]


def turns_of(info: Mapping[str, Any]) -> list[Turn]:
    """The turns of a conversation, from whichever field of a sample's json has them.

    `turns` or `dialog`: a list of objects with `question` and `answer`, up to the first without an answer.
    `conversations`: LLaVA's list of objects with `from` and `value`, human and gpt in alternation; a last one without
    an answer is left out.
    `instruction` with `answer` or `output`, and optionally `input`, which is put after the instruction.
    """
    name = next((name for name in _CONVERSATION_FIELDS if info.get(name)), None)
    if name is None:
        raise SourceError("no instruction, turns, dialog or conversations")
    if name == "instruction":
        texts = [_turn_text(info[name], name)]
        if info.get("input"):
            texts.append(_turn_text(info["input"], "input"))
        return [Turn("\n".join(texts), _turn_text(info.get("answer", info.get("output")), "answer"))]
    if name == "conversations":
        messages = _objects(info[name], name, "from and value")
        for number, message in enumerate(messages):
            speaker, expected = message.get("from"), _SPEAKERS[number % 2]
            if speaker not in expected:
                raise SourceError(f"message {number} of the conversation is from {speaker!r:.40}, not {expected[0]}")
        values = [_turn_text(message.get("value"), "value of a message") for message in messages]
        turns = [Turn(values[i], values[i + 1]) for i in range(0, len(values) - 1, 2)]
    else:
        items = _objects(info[name], name, "question and answer")
        turns = [
            Turn(_turn_text(item.get("question"), "question"), _turn_text(item["answer"], "answer"))
            for item in takewhile(lambda item: item.get("answer") is not None, items)
        ]
    if not turns:
        raise SourceError(f"no answer in {name}")
    return turns


def _objects(items: Any, name: str, fields: str) -> list[dict[str, Any]]:
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise SourceError(f"{name} must be a list of objects with {fields}, not {items!r:.80}")
    return items


def _turn_text(value: Any, name: str) -> str:
    text = clean_text(value.replace(_IMAGE_PLACEHOLDER, "")) if isinstance(value, str) else ""
    if not text:
        raise SourceError(f"the {name} must be a text, not {value!r:.80}")
    return text


def _is_weight(value: Any) -> bool:
    """Whether this is a finite number from 0 on."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value <= sys.float_info.max
