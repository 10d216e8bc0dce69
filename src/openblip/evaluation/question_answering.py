"""Visual question answering, of images and of videos (BLIP sections 5.3 and 5.6)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from openblip.data.fields import answers_of, text_field
from openblip.data.sample import Sample, Source
from openblip.errors import SourceError
from openblip.evaluation.run import run_evaluation, sample_images
from openblip.generation.decoding import Beam, Decoding
from openblip.metrics.vqa import (
    direct_answer_accuracy,
    mean_vqa_accuracy,
    multiple_choice_accuracy,
    single_answer_accuracy,
    vqa_accuracy_by_type,
)
from openblip.predictor import BasePredictor

ANSWER_DECODING = Beam(num_beams=3, max_new_tokens=10, min_new_tokens=1)  # released code


class _AnsweredQuestion(NamedTuple):
    sample: Sample
    """Without its image."""
    answer: str
    choice: str | None
    """The best of the sample's choices, where it offers some."""


def evaluate_question_answering(
    predictor: BasePredictor,
    source: Source,
    *,
    candidates: Sequence[str] | None = None,
    num_frames: int | None = None,
    decoding: Decoding = ANSWER_DECODING,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Return the accuracy of one answer per question, with the predictions.

    An answer is written freely, or with `candidates` it is the likeliest of them. Questions with several
    annotators' answers are scored by VQA's official accuracy, those with a single answer by whether it was
    given. Where samples have `choices` (A-OKVQA), the direct answers are scored by A-OKVQA's rule, and the
    likeliest choice as multiple choice. Questions without answers are answered and not scored. `results` is
    the list that VQA's evaluation server takes. With `num_frames` the questions are about videos.

    Raises `SourceError` when no sample can be used.
    """

    def predict(samples: list[Sample]) -> list[_AnsweredQuestion]:
        images = predictor.encode(sample_images(predictor, samples, num_frames, batch_size), batch_size)
        questions = [sample.info["question"] for sample in samples]
        answers = predictor.answer(images, questions, candidates, decoding=decoding, batch_size=batch_size)
        with_choices = [i for i, sample in enumerate(samples) if sample.info.get("choices")]
        choices: dict[int, str] = {}
        if with_choices:
            likeliest = predictor.answer(
                images.select(torch.tensor(with_choices)),
                [questions[i] for i in with_choices],
                [samples[i].info["choices"] for i in with_choices],
                decoding=decoding,
                batch_size=batch_size,
            )
            choices = dict(zip(with_choices, likeliest, strict=True))
        return [
            _AnsweredQuestion(replace(sample, image=b""), answer, choices.get(i))
            for i, (sample, answer) in enumerate(zip(samples, answers, strict=True))
        ]

    run = run_evaluation(source, predict, label="answering", check_sample=_check_question, limit=limit)
    answers = [
        {"question_id": row.sample.info.get("question_id", row.sample.key), "answer": row.answer}
        for row in run.results
    ]
    return run.report(
        {"num_questions": len(run.results)},
        _accuracies(run.results),
        predictions=[
            {"shard": row.sample.shard, "key": row.sample.key, "question": row.sample.info["question"]}
            | answer
            for row, answer in zip(run.results, answers, strict=True)
        ],
        results=answers,
    )


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


def _accuracies(rows: Sequence[_AnsweredQuestion]) -> dict[str, Any]:
    """Each accuracy that the annotations allow, over the questions that it applies to."""
    scores: dict[str, Any] = {}
    without_choices = [row for row in rows if row.choice is None]
    several = [row for row in without_choices if len(answers_of(row.sample)) > 1]
    single = [row for row in without_choices if len(answers_of(row.sample)) == 1]
    with_choices = [row for row in rows if row.choice is not None]
    direct = [
        row
        for row in with_choices
        if answers_of(row.sample) and not row.sample.info.get("difficult_direct_answer")
    ]
    with_correct = [row for row in with_choices if row.sample.info.get("correct_choice") is not None]
    if several:
        answers, truths = [row.answer for row in several], [answers_of(row.sample) for row in several]
        scores["vqa_accuracy"] = mean_vqa_accuracy(answers, truths)
        # VQAv2's type of the answer, or the emoji scenes' kind of question.
        infos = [row.sample.info for row in several]
        types = [str(info.get("answer_type") or info.get("question_kind") or "other") for info in infos]
        if len(set(types)) > 1:
            scores["by_type"] = vqa_accuracy_by_type(answers, truths, types)
    if single:
        scores["accuracy"] = single_answer_accuracy(
            [row.answer for row in single], [answers_of(row.sample)[0] for row in single]
        )
    if direct:
        scores["direct_answer_accuracy"] = direct_answer_accuracy(
            [row.answer for row in direct], [answers_of(row.sample) for row in direct]
        )
    if with_correct:
        scores["multiple_choice_accuracy"] = multiple_choice_accuracy(
            [str(row.choice) for row in with_correct],
            [row.sample.info["choices"] for row in with_correct],
            [row.sample.info["correct_choice"] for row in with_correct],
        )
    return scores
