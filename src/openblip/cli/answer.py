"""`openblip answer`: questions about images or videos, of the command line or of a data source.

B images or videos, F frames of each, S image size.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from openblip.cli.batches import Batches, OutputLines, decode_image, sample_name
from openblip.cli.inputs import VIDEO_FILE_SUFFIXES, ImageFile, find_sources, has_texts, is_one_file
from openblip.cli.options import ModelOptions, read_text_list
from openblip.data.sample import Sample
from openblip.errors import ConfigError, SourceError
from openblip.generation.decoding import Beam

if TYPE_CHECKING:
    from torch import Tensor

    from openblip.predictor import BasePredictor


class Asked(NamedTuple):
    """An image (one frame) or a video, and the questions about it."""

    frames: "Tensor"
    """(F, 3, S, S) uint8"""
    questions: tuple[str, ...]


def command(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    questions: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="QUESTION...", help_behavior_hint="")
    ],
    /,
    *,
    model: str,
    out: Path | None = None,
    images: str | None = None,
    candidates: Path | None = None,
    num_beams: int | None = None,
    max_new_tokens: int = 10,
    num_frames: int = 16,
    encoder_token: Literal["[ENC]", "[CLS]"] | None = None,
    batch_size: int = 32,
    num_workers: int = 2,
    options: Annotated[ModelOptions, tyro.conf.arg(name="")] = ModelOptions(),  # noqa: B008
) -> int:
    """Answers questions about an image or a video: one JSON line {"question", "answer", "logprob"} for each.

    For a folder or a data source, each line begins with the "key" of its image. Without questions each sample
    of a data source is asked its own: {"image": "a.jpg", "question": "..."} in the lines of a .jsonl, say.
    Images that cannot be read are named on standard error and skipped; the exit code is then 1. With --out,
    the same command again continues where it was stopped.

    Args:
        source: an image or video file, a folder of them (searched recursively), or a data source.
        questions: the questions, each in quotes.
        model: a checkpoint folder, file or hub name, or the name of a shipped model.
        out: write the lines to this file; to standard output when not given.
        images: the folder of the images that an annotation file or table names.
        candidates: a JSON list of answers to choose from; answers are written when not given.
        num_beams: texts kept while an answer is written; 3, of BLIP-2 5 when not given.
        max_new_tokens: the longest answer that is written, in tokens.
        num_frames: frames of a video.
        encoder_token: the first token of the questions; what the checkpoint says when not given.
        batch_size: images, or frames of videos, in one step of the model.
        num_workers: threads that read and decode images.
        options: where and how the model runs.
    """
    if min(num_frames, batch_size, num_workers) < 1:
        raise ConfigError("--num-frames, --batch-size and --num-workers must be at least 1")
    if not all(question.strip() for question in questions):
        raise ConfigError("a question is empty; write it in quotes after the image")
    chosen = {"max_new_tokens": max_new_tokens, **({} if num_beams is None else {"num_beams": num_beams})}
    Beam(min_new_tokens=1, **chosen)  # says what is out of range before anything is loaded
    choices = None if candidates is None else read_text_list(candidates, "candidates")
    is_alone = out is None and is_one_file(source)
    sources = [] if is_alone else find_sources([source], images=images, videos=True, with_texts=not questions)
    if not questions and not has_texts(sources):
        raise ConfigError("there is no question; write at least one in quotes after the image")
    predictor = options.load(model, encoder_token=encoder_token)
    decoding = replace(predictor.answer_decoding, **chosen)
    predictor.answer([], [], choices, decoding)  # refuses what it cannot do, before a file is made

    def prepare(sample: Sample) -> Asked:
        own = questions or (_own_question(sample),)
        return Asked(_read_frames(predictor, sample, num_frames), own)

    def answer(batch: Sequence[Asked]) -> list[list[dict[str, Any]]]:
        """The rows of each image; those of as many frames are encoded together."""
        rows: list[list[dict[str, Any]]] = []
        for frames, alike in itertools.groupby(batch, key=lambda asked: len(asked.frames)):
            group, at_once = list(alike), max(1, batch_size // frames)
            for start in range(0, len(group), at_once):
                rows += _answer(predictor, group[start : start + at_once], choices, decoding, batch_size)
        return rows

    if is_alone:
        for row in answer([prepare(ImageFile(source, with_texts=False).read())])[0]:
            print(json.dumps(row, ensure_ascii=False))
        return 0
    fields = ("question", "answer", "logprob")
    with OutputLines(out, fields=fields, num_lines=len(questions) or 1, given=questions or None) as lines:
        batches = Batches(sources, prepare, lines, label="answering", batch_size=batch_size, num_workers=num_workers)
        for batch in batches:
            lines.write([sample for sample, _ in batch], answer([asked for _, asked in batch]))
    return batches.finish("answered about")


def _answer(
    predictor: "BasePredictor", batch: Sequence[Asked], candidates: list[str] | None, decoding: Beam, batch_size: int
) -> list[list[dict[str, Any]]]:
    """The rows of images or videos of equally many frames."""
    import torch

    images = predictor.encode(torch.stack([asked.frames for asked in batch]), batch_size)  # of (B, F, 3, S, S)
    texts = [question for asked in batch for question in asked.questions]
    answers = predictor.answer(
        images.select(torch.tensor([i for i, asked in enumerate(batch) for _ in asked.questions])),
        texts,
        candidates,
        decoding,
        batch_size=batch_size,
        return_scores=True,
    )
    rows = iter(
        {"question": question, "answer": answer.text, "logprob": round(answer.logprob, 6)}
        for question, answer in zip(texts, answers, strict=True)
    )
    return [[next(rows) for _ in asked.questions] for asked in batch]


def _read_frames(predictor: "BasePredictor", sample: Sample, num_frames: int) -> "Tensor":
    """Decode an image, or evenly spread frames of a video: (F, 3, S, S) uint8."""
    import torch

    from openblip.data.video import is_video, read_frames

    frames = (
        read_frames(sample.image, num_frames, name=sample_name(sample.shard, sample.key))
        if is_video(sample.image) or Path(sample.key).suffix.lower() in VIDEO_FILE_SUFFIXES
        else [decode_image(sample)]
    )
    return torch.stack([torch.from_numpy(predictor.preprocessing(frame)) for frame in frames])


def _own_question(sample: Sample) -> str:
    question = sample.info.get("question")
    if not isinstance(question, str) or not question.strip():
        raise SourceError("it has no question")
    return question
