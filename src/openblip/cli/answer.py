"""`openblip answer`: questions about images or videos, of the command line or of a data source.

B images or videos, F frames of each, S image size.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from openblip.cli.batches import OutputLines, decode_image, sample_name
from openblip.cli.inputs import VIDEO_FILE_SUFFIXES, find_sources, has_texts, is_one_file, read_file
from openblip.cli.options import ModelOptions, ReadingOptions, read_text_list
from openblip.data.sample import Sample
from openblip.errors import ConfigError, SourceError
from openblip.generation.decoding import Beam

if TYPE_CHECKING:
    from torch import Tensor

    Asked = tuple[Tensor, tuple[str, ...]]
    """An image (one frame) or a video, (F, 3, S, S) uint8, and the questions about it."""


def command(
    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")],
    questions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="QUESTION...", help_behavior_hint="")],
    /,
    *,
    model: ModelOptions,
    out: Path | None = None,
    candidates: Path | None = None,
    num_beams: int | None = None,
    max_new_tokens: int = 10,
    num_frames: int = 16,
    reading: ReadingOptions,
) -> int:
    """Answers questions about an image or a video: one JSON line {"question", "answer", "logprob"} for each.

    For a folder or a data source, each line begins with the "key" of its image. Without questions each sample
    of a data source is asked its own: {"image": "a.jpg", "question": "..."} in the lines of a .jsonl, say.
    Images that cannot be read are named on standard error and skipped; the exit code is then 1. With --out,
    the same command again continues where it was stopped.

    Args:
        source: an image or video file, a folder of them (searched recursively), or a data source.
        questions: the questions, each in quotes.
        model: which model runs, where and how.
        out: write the lines to this file; to standard output when not given.
        candidates: a JSON list of answers to choose from; answers are written when not given.
        num_beams: texts kept while an answer is written; 3, of BLIP-2 5 when not given.
        max_new_tokens: the longest answer that is written, in tokens.
        num_frames: frames of a video.
        reading: how images are read.
    """
    if num_frames < 1:
        raise ConfigError("--num-frames must be at least 1")
    if not all(question.strip() for question in questions):
        raise ConfigError("a question is empty; write it in quotes after the image")
    given = {"max_new_tokens": max_new_tokens, **({} if num_beams is None else {"num_beams": num_beams})}
    Beam(min_new_tokens=1, **given)  # says what is out of range before anything is loaded
    choices = None if candidates is None else read_text_list(candidates, "candidates")
    is_alone = out is None and is_one_file(source)
    sources = [] if is_alone else find_sources([source], images=reading.images, videos=True, with_texts=not questions)
    if not questions and not has_texts(sources):
        raise ConfigError("there is no question; write at least one in quotes after the image")
    predictor = model.load()
    decoding = replace(predictor.answer_decoding, **given)
    predictor.answer([], [], choices, decoding)  # raises what it cannot do, before a file is made
    import torch

    from openblip.data.images import is_video, read_frames

    def prepare(sample: Sample) -> "Asked":
        question = sample.info.get("question")
        if not questions and (not isinstance(question, str) or not question.strip()):
            raise SourceError("it has no question")
        if is_video(sample.image) or Path(sample.key).suffix.lower() in VIDEO_FILE_SUFFIXES:
            frames = read_frames(sample.image, num_frames, name=sample_name(sample.shard, sample.key))
        else:
            frames = [decode_image(sample)]
        pixels = torch.stack([torch.from_numpy(predictor.preprocessing(frame)) for frame in frames])
        return pixels, questions or (str(question),)

    def answer(batch: Sequence["Asked"]) -> list[list[dict[str, Any]]]:
        """The rows of each image or video; those of equally many frames are encoded together."""
        rows: list[list[dict[str, Any]]] = []
        for _, group in groupby(batch, key=lambda asked: len(asked[0])):
            alike = list(group)
            step = max(1, reading.batch_size // len(alike[0][0]))
            for part in (alike[start : start + step] for start in range(0, len(alike), step)):
                frames = torch.stack([frames for frames, _ in part])  # (B, F, 3, S, S)
                images = predictor.encode(frames, reading.batch_size)
                texts = [question for _, asked in part for question in asked]
                answers = predictor.answer(
                    images.select(torch.tensor([i for i, (_, asked) in enumerate(part) for _ in asked])),
                    texts,
                    choices,
                    decoding,
                    batch_size=reading.batch_size,
                    return_scores=True,
                )
                answered = iter(
                    {"question": question, "answer": answer.text, "logprob": round(answer.logprob, 6)}
                    for question, answer in zip(texts, answers, strict=True)
                )
                rows += [[next(answered) for _ in asked] for _, asked in part]
        return rows

    if is_alone:
        for row in answer([prepare(read_file(source))])[0]:
            print(json.dumps(row, ensure_ascii=False))
        return 0
    fields = ("question", "answer", "logprob")
    with OutputLines(out, fields=fields, num_lines=len(questions) or 1, given=questions or None) as lines:
        for samples, asked in lines.batches(sources, prepare, reading, label="answering"):
            lines.write(samples, answer(asked))
    return lines.finish("answered about")
