"""`openblip answer`: questions about images or videos, of the command line or of a data source."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from openblip.cli import lines
from openblip.cli.options import ModelOptions, only_with, read_json_texts
from openblip.cluster import EngineOptions
from openblip.data.sample import Sample
from openblip.errors import Condition, ConfigError, SourceError
from openblip.generation.decoding import Beam

if TYPE_CHECKING:
    from openblip.predictor import BasePredictor


@dataclass(frozen=True, kw_only=True)
class AnswerTask(lines.LineTask):
    """What `openblip answer` asks about each image: these questions, or its own where there are none."""

    questions: Sequence[str]
    candidates: Sequence[str] | None
    given: Mapping[str, int]
    """Settings of the beam search that are not the model's own."""
    decoding: Beam | None = None
    default_frames: ClassVar[int] = 16

    @property
    def fields(self) -> Sequence[str]:
        names = ("question", "answer", "logprob")
        return names if self.questions else ("question_id", *names)

    @property
    def settings(self) -> Mapping[str, Any]:
        named = {"questions": self.questions, "candidates": self.candidates}
        return {"command": "answer", **named, **(asdict(self.decoding) if self.decoding else {})}

    @property
    def num_lines(self) -> int:
        return len(self.questions) or 1

    def resolved(self, predictor: "BasePredictor") -> "AnswerTask":
        decoding = replace(predictor.answer_decoding, **self.given)
        predictor.answer([], [], self.candidates, decoding)  # raises what it cannot do
        return replace(self, decoding=decoding)

    def texts(self, sample: Sample) -> Sequence[str]:
        question = sample.info.get("question")
        if not self.questions and (not isinstance(question, str) or not question.strip()):
            raise SourceError("it has no question")
        return self.questions or (str(question),)

    def rows(
        self, predictor: "BasePredictor", batch: lines.EncodedBatch, batch_size: int
    ) -> Iterator[Mapping[str, Any]]:
        images = batch.images.select(batch.owners)
        answers = predictor.answer(
            images, batch.all_texts, self.candidates, self.decoding, batch_size, return_scores=True
        )
        for number, question, answer in zip(batch.owners.tolist(), batch.all_texts, answers, strict=True):
            sample = batch.samples[number]
            named = {} if self.questions else {"question_id": sample.info.get("question_id", sample.key)}
            yield {**named, "question": question, "answer": answer.text, "logprob": round(answer.logprob, 6)}


@only_with(
    Condition(
        "num-beams max-new-tokens no-repeat-ngram-size",
        lambda o: o.candidates is None,
        "with --candidates no answer is written, one of them is chosen",
    )
)
def command(
    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")],
    questions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="QUESTION...", help_behavior_hint="")],
    /,
    *,
    model: ModelOptions,
    reading: lines.ReadingOptions,
    engine: EngineOptions,
    candidates: Path | None = None,
    num_beams: int | None = None,
    max_new_tokens: int = 10,
    no_repeat_ngram_size: int = 0,
) -> int:
    """Answers questions about an image or a video: one JSON line {"question", "answer", "logprob"} for each.

    For a folder or a data source, each line begins with the "key" of its image. Without questions each sample
    of a data source is asked its own: {"image": "a.jpg", "question": "..."} in the lines of a .jsonl, say. Each
    line then has the "question_id" too, which is the key where the sample has none.
    Images that cannot be read are named on standard error and skipped; the exit code is then 1. With --out,
    the same command again continues where it was stopped.

    Args:
        source: an image or video file, a folder of them (searched recursively), or a data source.
        questions: the questions, each in quotes.
        candidates: a JSON list of answers to choose from; answers are written when not given.
        num_beams: texts kept while an answer is written; 3, of BLIP-2 5 when not given.
        max_new_tokens: the longest answer that is written, in tokens.
        no_repeat_ngram_size: no so many tokens in a row occur twice in an answer; 0 is off.
    """
    if not all(question.strip() for question in questions):
        raise ConfigError("a question is empty; write it in quotes after the image")
    given = {"max_new_tokens": max_new_tokens, "no_repeat_ngram_size": no_repeat_ngram_size}
    if num_beams is not None:
        given["num_beams"] = num_beams
    Beam(min_new_tokens=1, **given)  # says what is out of range before anything is loaded
    choices = read_json_texts(candidates, "candidates")
    advice = "there is no question; write at least one in quotes after the image"
    sources = lines.find_source(source, reading, without_texts=None if questions else advice)
    task = AnswerTask(questions=questions, candidates=choices, given=given)
    output = lines.OutputLines(sources, reading, model, engine, task)
    for _ in output.write(label="answering"):
        pass
    return output.finish("answered about")
