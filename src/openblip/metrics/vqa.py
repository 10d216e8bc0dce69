"""Accuracy of answers to questions: VQAv2's official one, A-OKVQA's two, and that of data with one answer.

The first follows the official scorer (github.com/GT-Vision-Lab/VQA, vqaEval.py) to the digit. It is a Python 2
program, so it is written anew here, with what it does without saying so:

- Answers are normalised only where the annotators gave different ones. Where all wrote the same, a prediction
  has to equal it as written, upper case and punctuation included.
- A punctuation mark becomes a space, but nothing where the text has it beside a space anywhere, and no mark
  leaves a space where any comma stands between two digits.
- A period goes unless a digit follows, and only the first 32 go. Apostrophes, colons and % stay.
- Number words stop at ten; "none" is 0; the articles a, an and the go, so that an answer can be empty.
- A contraction gets its apostrophe, or its second one, but I'm, I've and the like are looked up in
  lower-cased text and never found, "couldntve" is unknown, and "somebody'd" loses its own.
- Digits are 0 to 9: regular expressions of Python 2 know no others.
"""

import re
from collections.abc import Callable, Sequence

from openblip.errors import ConfigError
from openblip.metrics.captioning import exact_match

ENOUGH = 3  # matching annotators for a full score

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"[0-9],[0-9]")
_PERIOD = re.compile(r"\.(?![0-9])")
_PERIODS = 32  # the scorer passes re.UNICODE, which is 32, where re.sub takes the count
_ARTICLES = frozenset(["a", "an", "the"])
_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
you've
"""
# Every form that lacks one apostrophe, with the right form.
_CONTRACTIONS = {
    form[:index] + form[index + 1 :]: form
    for form in _WITH_APOSTROPHES.split()
    for index, letter in enumerate(form)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalise_answer(text: str) -> str:
    """Return the official normal form of an answer, by the rules above."""
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(_trimmed(text)).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the official accuracy of one question, in [0, 1].

    It is the mean over annotators of min(1, matches among the others / 3). `answers` holds every annotator's
    answer, repeats included: ten in VQAv2 and OK-VQA. Of n below 4, the best score is (n - 1) / 3.

    Raises:
        ConfigError: `answers` is one string, or fewer than two: leave-one-out gives one answer 0 whatever the
            prediction (`single_answer_accuracy` scores it), and a test split has none.
    """
    _check("vqa_accuracy", [prediction], [answers], at_least=2)
    return _official(prediction, answers)


def mean_vqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Return the mean of `vqa_accuracy` over questions: VQAv2's, OK-VQA's and VizWiz' score, in [0, 1].

    Raises:
        ConfigError: no questions, lists of unequal length, or as `vqa_accuracy`, with the question's place.
    """
    _check("mean_vqa_accuracy", predictions, answers, at_least=2)
    return _mean(_official, predictions, answers)


def vqa_accuracy_by_type(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], types: Sequence[str]
) -> dict[str, float]:
    """Return `mean_vqa_accuracy` for each type of question ("yes/no", "number", ...), in order of first occurrence.

    Raises:
        ConfigError: as `mean_vqa_accuracy`, or not one type per question.
    """
    _check("vqa_accuracy_by_type", predictions, answers, at_least=2)
    if isinstance(types, str) or len(types) != len(predictions):
        raise ConfigError(
            f"vqa_accuracy_by_type: {len(predictions)} predictions and {len(types)} types; "
            "give one type per question"
        )
    scores: dict[str, list[float]] = {}
    for prediction, given, kind in zip(predictions, answers, types, strict=True):
        scores.setdefault(kind, []).append(_official(prediction, given))
    return {kind: sum(values) / len(values) for kind, values in scores.items()}


def direct_answer_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Return A-OKVQA's direct-answer accuracy, in [0, 1]: the mean of min(1, matches / 3), over all annotators.

    As in its official script, answers match as written and nothing is normalised. The script leaves questions
    marked `difficult_direct_answer` out; so must the caller.

    Raises:
        ConfigError: no questions, lists of unequal length, or a question without answers.
    """
    _check("direct_answer_accuracy", predictions, answers, at_least=1)
    return _mean(
        lambda prediction, given: min(1.0, list(given).count(prediction) / ENOUGH), predictions, answers
    )


def multiple_choice_accuracy(
    predictions: Sequence[str], choices: Sequence[Sequence[str]], correct_choices: Sequence[int]
) -> float:
    """Return the share of predictions that are the right one of their question's choices (A-OKVQA).

    Compared as written. A prediction that is none of the choices is wrong.

    Raises:
        ConfigError: no questions, lists of unequal length, or a right choice that is not there.
    """
    _check("multiple_choice_accuracy", predictions, choices, at_least=1)
    if len(correct_choices) != len(predictions):
        raise ConfigError(
            f"multiple_choice_accuracy: {len(predictions)} predictions and {len(correct_choices)} right "
            "choices; give one per question"
        )
    for question, (offered, correct) in enumerate(zip(choices, correct_choices, strict=True)):
        if not 0 <= correct < len(offered):
            raise ConfigError(
                f"multiple_choice_accuracy: question {question} has {len(offered)} choices and its right one "
                f"is number {correct}, counted from 0"
            )
    right = [offered[correct] for offered, correct in zip(choices, correct_choices, strict=True)]
    return single_answer_accuracy(predictions, right, normalise=str)


def single_answer_accuracy(
    predictions: Sequence[str], answers: Sequence[str], normalise: Callable[[str], str] = normalise_answer
) -> float:
    """Return the share of predictions that equal the one right answer (MSRVTT-QA, MSVD-QA, GQA), both sides normalised.

    Raises:
        ConfigError: no questions, or lists of unequal length.
    """
    if isinstance(answers, str):
        raise ConfigError("single_answer_accuracy: give a list of predictions and a list of answers")
    allowed = [[answer] for answer in answers]
    _check("single_answer_accuracy", predictions, allowed, at_least=1)
    return exact_match(predictions, allowed, normalise)


def _official(prediction: str, answers: Sequence[str]) -> float:
    prediction, given = _trimmed(prediction), [_trimmed(answer) for answer in answers]
    if len(set(given)) > 1:
        prediction, given = normalise_answer(prediction), [normalise_answer(answer) for answer in given]
    matches = given.count(prediction)
    # Leave-one-out: an annotator who gave this answer counts one match less than the others.
    by_matching, by_others = min(1.0, (matches - 1) / ENOUGH), min(1.0, matches / ENOUGH)
    return (matches * by_matching + (len(given) - matches) * by_others) / len(given)


def _trimmed(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    replacements = {
        ord(mark): "" if has_number or f"{mark} " in text or f" {mark}" in text else " " for mark in _MARKS
    }
    return _PERIOD.sub("", text.translate(replacements), count=_PERIODS)


def _mean(
    score: Callable[[str, Sequence[str]], float], predictions: Sequence[str], answers: Sequence[Sequence[str]]
) -> float:
    scores = [score(prediction, given) for prediction, given in zip(predictions, answers, strict=True)]
    return sum(scores) / len(scores)


def _check(
    metric: str, predictions: Sequence[str], answers: Sequence[Sequence[str]], *, at_least: int
) -> None:
    if isinstance(predictions, str) or isinstance(answers, str):
        raise ConfigError(f"{metric}: give lists, one entry per question, not a single string")
    if not predictions or len(predictions) != len(answers):
        raise ConfigError(
            f"{metric}: {len(predictions)} predictions and answers to {len(answers)} questions; "
            "give one prediction per question, and at least one"
        )
    for question, (prediction, given) in enumerate(zip(predictions, answers, strict=True)):
        if isinstance(given, str) or not all(isinstance(text, str) for text in [prediction, *given]):
            raise ConfigError(
                f"{metric}: question {question} needs a string as prediction and a list of strings to "
                f"compare it with, not {prediction!r} and {given!r}"
            )
        if len(given) < at_least:
            raise ConfigError(
                f"{metric}: question {question} has {len(given)} answers, and {at_least} are needed; "
                + ("leave it out" if not given else "single_answer_accuracy is for data with one answer")
            )
