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
from collections.abc import Sequence

from openblip.errors import ConfigError
from openblip.metrics.captioning import References, check_references, exact_match

NUM_MATCHES = 3  # matching annotators for a full score

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
    text = _trimmed(text)
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    replacements = {ord(mark): "" if has_number or f"{mark} " in text or f" {mark}" in text else " " for mark in _MARKS}
    text = _PERIOD.sub("", text.translate(replacements), count=_PERIODS)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(predictions: Sequence[str], answers: References) -> list[float]:
    """Return the official accuracy of each question, in [0, 1]; VQAv2's, OK-VQA's and VizWiz' score is their mean.

    It is the mean over annotators of min(1, matches among the others / 3). `answers` holds every annotator's answer,
    repeats included: ten in VQAv2 and OK-VQA. Of n below 4, the best score is (n - 1) / 3. Raises `ConfigError` for no
    questions, lists of unequal length, or a question with fewer than two answers: leave-one-out gives one answer 0
    whatever the prediction (`single_answer_accuracy` scores it).
    """
    check_references("vqa_accuracy", predictions, answers, "question", "answer")
    accuracies = []
    for question, (prediction, given) in enumerate(zip(predictions, answers, strict=True)):
        if len(given) < 2:
            raise ConfigError(
                f"vqa_accuracy: question {question} has {len(given)} answers, and 2 are needed; "
                "single_answer_accuracy is for data with one answer"
            )
        prediction, given = _trimmed(prediction), list(map(_trimmed, given))
        if len(set(given)) > 1:
            prediction, given = normalise_answer(prediction), list(map(normalise_answer, given))
        matches = given.count(prediction)
        # Leave-one-out: an annotator who gave this answer counts one match less than the others.
        by_matching, by_others = min(1.0, (matches - 1) / NUM_MATCHES), min(1.0, matches / NUM_MATCHES)
        accuracies.append((matches * by_matching + (len(given) - matches) * by_others) / len(given))
    return accuracies


def direct_answer_accuracy(predictions: Sequence[str], answers: References) -> float:
    """Return A-OKVQA's direct-answer accuracy, in [0, 1]: the mean of min(1, matches / 3), over all annotators.

    As in its official script, answers match as written and nothing is normalised. The script leaves questions
    marked `difficult_direct_answer` out; so must the caller. Raises `ConfigError` for no questions, lists of
    unequal length, or a question without answers.
    """
    check_references("direct_answer_accuracy", predictions, answers, "question", "answer")
    matches = [list(given).count(prediction) for prediction, given in zip(predictions, answers, strict=True)]
    return sum(min(1.0, count / NUM_MATCHES) for count in matches) / len(matches)


def single_answer_accuracy(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Return the share of predictions that equal the one right answer (MSRVTT-QA, MSVD-QA, GQA), both normalised.

    Raises `ConfigError` for no questions, or lists of unequal length.
    """
    if isinstance(answers, str):
        raise ConfigError("single_answer_accuracy: give a list of predictions and a list of answers")
    references = [[answer] for answer in answers]
    check_references("single_answer_accuracy", predictions, references, "question", "answer")
    return exact_match(predictions, references, normalise_answer)


def _trimmed(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
