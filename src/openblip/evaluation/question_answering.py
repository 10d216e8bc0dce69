"""Visual question answering, of images and of videos, measured (BLIP sections 5.3 and 5.6)."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple, Protocol

import torch

from openblip.data.readings import answers_of, text_field
from openblip.data.sample import Sample, Source
from openblip.errors import SourceError
from openblip.evaluation.run import pictures, walk
from openblip.generation.decoding import Beam, Decoding
from openblip.metrics.vqa import (
    direct_answer_accuracy,
    mean_vqa_accuracy,
    multiple_choice_accuracy,
    single_answer_accuracy,
    vqa_accuracy_by_type,
)

DECODING = Beam(num_beams=3, max_new_tokens=10, min_new_tokens=1)  # released code


class Answerer(Protocol):
    """What questions need of a model; clips also need `encode_videos`."""

    def encode(self, images: Any, batch_size: int | None) -> Any: ...
    def answer(
        self,
        images: Any,
        questions: Any,
        candidates: Any = None,
        *,
        decoding: Decoding,
        batch_size: int | None,
    ) -> Any: ...


class _Answered(NamedTuple):
    sample: Sample
    answer: str
    choice: str | None


def evaluate_question_answering(
    model: Answerer,
    source: Source,
    *,
    candidates: Sequence[str] | None = None,
    num_frames: int | None = None,
    decoding: Decoding = DECODING,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Accuracy of one answer per question, written, or the best of `candidates`; with the predictions.

    Questions with several annotators' answers are scored by VQA's official accuracy, those with a single one
    by whether it was given. Where samples have `choices` (A-OKVQA), their direct answers are scored as there,
    and the best choice as multiple choice. Questions without answers are answered and not scored.
    `results` are what VQA's server takes. With `num_frames` the questions are about clips.
    """

    def work(samples: list[Sample]) -> list[_Answered]:
        images = model.encode(pictures(model, samples, num_frames, batch_size), batch_size)
        questions = [sample.info["question"] for sample in samples]
        answers = model.answer(images, questions, candidates, decoding=decoding, batch_size=batch_size)
        offered = [i for i, sample in enumerate(samples) if sample.info.get("choices")]
        choices: dict[int, str] = {}
        if offered:
            best = model.answer(
                images.select(torch.tensor(offered)),
                [questions[i] for i in offered],
                [samples[i].info["choices"] for i in offered],
                decoding=decoding,
                batch_size=batch_size,
            )
            choices = dict(zip(offered, best, strict=True))
        return [
            _Answered(replace(sample, image=b""), answer, choices.get(i))
            for i, (sample, answer) in enumerate(zip(samples, answers, strict=True))
        ]

    def accept(sample: Sample) -> None:
        text_field(sample, "question")
        answers_of(sample)
        _check_choices(sample)

    found, rejects = walk(source, work, label="answering", accept=accept, limit=limit)
    results = [{"question_id": question_id(row.sample), "answer": row.answer} for row in found]
    return {
        "num_questions": len(found),
        "num_rejects": len(rejects),
        **_accuracies(found),
        "predictions": [
            {"shard": row.sample.shard, "key": row.sample.key, "question": row.sample.info["question"]}
            | result
            for row, result in zip(found, results, strict=True)
        ],
        "results": results,
        "rejects": [asdict(reject) for reject in rejects],
    }


def question_id(sample: Sample) -> Any:
    """What the data set knows a question by."""
    return sample.info.get("question_id", sample.key)


def _check_choices(sample: Sample) -> None:
    choices, correct = sample.info.get("choices"), sample.info.get("correct_choice")
    if not choices:
        return
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise SourceError(f"the choices must be a list of strings, not {choices!r:.80}")
    if correct is not None and (type(correct) is not int or not 0 <= correct < len(choices)):
        raise SourceError(f"there are {len(choices)} choices and the correct one is number {correct!r:.80}")


def _accuracies(found: Sequence[_Answered]) -> dict[str, Any]:
    """The accuracies that the samples' annotations admit, each over the questions that it applies to."""
    scores: dict[str, Any] = {}
    plain = [row for row in found if row.choice is None]
    several = [row for row in plain if len(answers_of(row.sample)) > 1]
    single = [row for row in plain if len(answers_of(row.sample)) == 1]
    offered = [row for row in found if row.choice is not None]
    chosen = [row for row in offered if row.sample.info.get("correct_choice") is not None]
    easy = [
        row
        for row in offered
        if answers_of(row.sample) and not row.sample.info.get("difficult_direct_answer")
    ]
    if several:
        answers, true = [row.answer for row in several], [answers_of(row.sample) for row in several]
        scores["vqa_accuracy"] = mean_vqa_accuracy(answers, true)
        types = [_type(row.sample) for row in several]
        if len(set(types)) > 1:
            scores["by_type"] = vqa_accuracy_by_type(answers, true, types)
    if single:
        true_single = [answers_of(row.sample)[0] for row in single]
        scores["accuracy"] = single_answer_accuracy([row.answer for row in single], true_single)
    if easy:
        scores["direct_answer_accuracy"] = direct_answer_accuracy(
            [row.answer for row in easy], [answers_of(row.sample) for row in easy]
        )
    if chosen:
        scores["multiple_choice_accuracy"] = multiple_choice_accuracy(
            [str(row.choice) for row in chosen],
            [row.sample.info["choices"] for row in chosen],
            [row.sample.info["correct_choice"] for row in chosen],
        )
    return scores


def _type(sample: Sample) -> str:
    """VQAv2's type of answer, or the emoji world's kind of question."""
    return str(sample.info.get("answer_type") or sample.info.get("question_kind") or "other")
