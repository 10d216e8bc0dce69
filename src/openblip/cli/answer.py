"""`openblip answer`: questions about images or videos, of the command line or of a data source."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import tyro

from openblip.cli import lines
from openblip.cli.options import ModelOptions, only_with, read_json_texts
from openblip.data.sample import Sample
from openblip.errors import Condition, ConfigError, SourceError
from openblip.generation.decoding import Beam


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
    predictor = model.load()
    decoding = replace(predictor.answer_decoding, **given)
    predictor.answer([], [], choices, decoding)  # raises what it cannot do, before a file is made

    def questions_of(sample: Sample) -> Sequence[str]:
        question = sample.info.get("question")
        if not questions and (not isinstance(question, str) or not question.strip()):
            raise SourceError("it has no question")
        return questions or (str(question),)

    names = ("question", "answer", "logprob") if questions else ("question_id", "question", "answer", "logprob")
    settings = {"command": "answer", "questions": questions, "candidates": choices, **asdict(decoding)}
    output = lines.OutputLines(
        sources, reading, model, predictor, names, settings,
        num_lines=len(questions) or 1, default_frames=16,
    )  # fmt: skip
    for batch in output.batches(questions_of, label="answering"):
        images = batch.images.select(batch.owners)
        answers = predictor.answer(images, batch.all_texts, choices, decoding, reading.batch_size, return_scores=True)
        rows = []
        for number, question, answer in zip(batch.owners.tolist(), batch.all_texts, answers, strict=True):
            sample = batch.samples[number]
            named = {} if questions else {"question_id": sample.info.get("question_id", sample.key)}
            rows.append({**named, "question": question, "answer": answer.text, "logprob": round(answer.logprob, 6)})
        output.write(batch, rows)
    return output.finish("answered about")
