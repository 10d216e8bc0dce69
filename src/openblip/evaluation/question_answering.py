"""Visual question answering, of images and of videos (BLIP sections 5.3 and 5.6)."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import compress, islice
from typing import Any, NamedTuple

import torch

from openblip.data.reader import read_source
from openblip.data.sample import Reject, Sample, Source
from openblip.data.texts import answers_of, text_field
from openblip.errors import ConfigError, SourceError
from openblip.evaluation.run import EvaluationResults, run_evaluation, sample_images
from openblip.generation.decoding import Decoding
from openblip.metrics.calibration import calibration_report
from openblip.metrics.vqa import direct_answer_accuracy, single_answer_accuracy, vqa_accuracy
from openblip.predictor import BasePredictor
from openblip.text_counts import count_texts, warn_caller


class Answered(NamedTuple):
    """An answer with its probability, and the likeliest of the choices where the sample offers some."""

    answer: str
    probability: float
    choice: str | None


@count_texts(warn_caller)
def evaluate_question_answering(
    predictor: BasePredictor,
    source: Source,
    *,
    candidates: Sequence[str] | None = None,
    num_frames: int | None = None,
    num_examples: int = 0,
    decoding: Decoding | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Return the accuracy of one answer per question, with the predictions.

    An answer is written freely (`decoding`: by default the predictor's), or with `candidates` it is the likeliest of
    them. Questions with several annotators' answers are scored by VQA's official accuracy, those with a single answer
    by whether it was given. `calibration` says how far the probability of an answer is its accuracy. Where samples have
    `choices` (A-OKVQA), the direct answers are scored by A-OKVQA's rule, and the likeliest choice as multiple choice.
    Questions without answers are answered and not scored. `results` is the list that VQA's evaluation server takes.
    With `num_frames` the questions are about videos. With `num_examples` the first questions of the source that have
    answers are examples, which stand with their images before every question and are not scored. Raises `SourceError`
    when no sample can be used.
    """

    examples = _first_answered(source, num_examples)
    shown = [(sample.image, sample.info["question"], _usual_answer(sample)) for sample in examples]

    def predict(samples: list[Sample]) -> list[Answered]:
        images = predictor.encode(sample_images(predictor, samples, num_frames, batch_size), batch_size)
        questions = [sample.info["question"] for sample in samples]
        settings: dict[str, Any] = {"decoding": decoding, "batch_size": batch_size}
        settings |= {"examples": shown} if shown else {}
        answers = predictor.answer(images, questions, candidates, return_scores=True, **settings)
        with_choices = [i for i, sample in enumerate(samples) if sample.info.get("choices")]
        choices: dict[int, str] = {}
        if with_choices:
            with_images = images.select(torch.tensor(with_choices))
            asked, offered = zip(*((questions[i], samples[i].info["choices"]) for i in with_choices), strict=True)
            chosen = predictor.answer(with_images, list(asked), list(offered), **settings)
            choices = dict(zip(with_choices, chosen, strict=True))
        return [
            Answered(answer.text, min(math.exp(answer.logprob), 1.0), choices.get(i))
            for i, answer in enumerate(answers)
        ]

    run = run_evaluation(source, predict, label="answering", check_sample=_check_question, limit=limit)
    are_examples = {(sample.shard, sample.key) for sample in examples}
    others = [(sample.shard, sample.key) not in are_examples for sample in run.samples]
    run = run._replace(samples=list(compress(run.samples, others)), results=list(compress(run.results, others)))
    rows, asked = [], []
    for sample, answered in run.pairs():
        rows.append({"question_id": sample.info.get("question_id", sample.key), "answer": answered.answer})
        asked.append({"question": sample.info["question"], **rows[-1], "probability": answered.probability})
    num_scored, scores = _accuracies(run)
    counts = {"num_questions": len(rows), "num_scored": num_scored}
    return run.report(counts, scores, predictions=run.named(asked), results=rows)


def _first_answered(source: Source, count: int) -> list[Sample]:
    """The first samples of a source whose question has answers."""
    found = (entry[0] for entry in read_source(source, _check_question) if not isinstance(entry, Reject))
    examples = list(islice((sample for sample in found if answers_of(sample)), count))
    if len(examples) < count:
        raise ConfigError(f"{source.name} has {len(examples)} questions with answers, fewer than {count} examples.")
    return examples


def _usual_answer(sample: Sample) -> str:
    """The answer that most annotators gave, the first of these."""
    ((answer, _),) = Counter(answers_of(sample)).most_common(1)
    return answer


def _check_question(sample: Sample) -> None:
    text_field(sample, "question")
    answers_of(sample)
    choices, correct = sample.info.get("choices"), sample.info.get("correct_choice")
    if not choices:
        return
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise SourceError(f"the choices must be a list of strings, not {choices!r:.80}")
    if correct is not None and (type(correct) is not int or not 0 <= correct < len(choices)):
        raise SourceError(f"there are {len(choices)} choices and the correct one is number {correct!r:.80}")


def _accuracies(run: EvaluationResults[Answered]) -> tuple[int, dict[str, Any]]:
    """The number of questions that can be scored, and each accuracy that their annotations allow."""
    num_scored = 0
    several: list[tuple[str, list[str], str]] = []  # answer, right answers, type of question
    single: list[tuple[str, str]] = []
    direct: list[tuple[str, list[str]]] = []
    is_right_choice: list[bool] = []
    judged: list[tuple[float, float]] = []  # the probability and the accuracy of each answer
    for sample, (answer, probability, choice) in run.pairs():
        info, right = sample.info, answers_of(sample)
        num_scored += bool(right) or (choice is not None and info.get("correct_choice") is not None)
        if choice is not None:
            if right and not info.get("difficult_direct_answer"):
                direct.append((answer, right))
                judged.append((probability, direct_answer_accuracy([answer], [right])))
            if (correct := info.get("correct_choice")) is not None:
                is_right_choice.append(choice == info["choices"][correct])
        elif len(right) > 1:
            # VQAv2's type of the answer, or the emoji scenes' kind of question.
            judged.append((probability, vqa_accuracy([answer], [right])[0]))
            several.append((answer, right, str(info.get("answer_type") or info.get("question_kind") or "other")))
        elif right:
            single.append((answer, right[0]))
            judged.append((probability, single_answer_accuracy([answer], [right[0]])))
    scores: dict[str, Any] = {}
    if several:
        answers, right_answers, types = zip(*several, strict=True)
        accuracies = vqa_accuracy(answers, right_answers)
        scores["vqa_accuracy"] = sum(accuracies) / len(accuracies)
        by_type: dict[str, list[float]] = {}
        for kind, accuracy in zip(types, accuracies, strict=True):
            by_type.setdefault(kind, []).append(accuracy)
        if len(by_type) > 1:
            scores["by_type"] = {kind: sum(values) / len(values) for kind, values in by_type.items()}
    if single:
        scores["accuracy"] = single_answer_accuracy(*zip(*single, strict=True))
    if direct:
        scores["direct_answer_accuracy"] = direct_answer_accuracy(*zip(*direct, strict=True))
    if is_right_choice:
        scores["multiple_choice_accuracy"] = sum(is_right_choice) / len(is_right_choice)
    if judged:
        scores["calibration"] = calibration_report(*zip(*judged, strict=True))
    return num_scored, scores
