"""Visual question answering, of images and of videos (BLIP sections 5.3 and 5.6)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from openblip.data.sample import Sample, Source
from openblip.data.texts import answers_of, text_field
from openblip.errors import SourceError
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
    With `num_frames` the questions are about videos. Raises `SourceError` when no sample can be used.
    """

    def predict(samples: list[Sample]) -> list[Answered]:
        images = predictor.encode(sample_images(predictor, samples, num_frames, batch_size), batch_size)
        questions = [sample.info["question"] for sample in samples]
        settings: dict[str, Any] = {"decoding": decoding, "batch_size": batch_size}
        answers = predictor.answer(images, questions, candidates, return_scores=True, **settings)
        with_choices = [i for i, sample in enumerate(samples) if sample.info.get("choices")]
        choices: dict[int, str] = {}
        if with_choices:
            shown = images.select(torch.tensor(with_choices))
            asked, offered = zip(*((questions[i], samples[i].info["choices"]) for i in with_choices), strict=True)
            chosen = predictor.answer(shown, list(asked), list(offered), **settings)
            choices = dict(zip(with_choices, chosen, strict=True))
        return [
            Answered(answer.text, min(math.exp(answer.logprob), 1.0), choices.get(i))
            for i, answer in enumerate(answers)
        ]

    run = run_evaluation(source, predict, label="answering", check_sample=_check_question, limit=limit)
    rows, asked = [], []
    for sample, answered in run.pairs():
        rows.append({"question_id": sample.info.get("question_id", sample.key), "answer": answered.answer})
        asked.append({"question": sample.info["question"], **rows[-1], "probability": answered.probability})
    num_scored, scores = _accuracies(run)
    counts = {"num_questions": len(rows), "num_scored": num_scored}
    return run.report(counts, scores, predictions=run.named(asked), results=rows)


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
