"""`openblip answer`: questions about images or videos, of the command line or of a data source.

B images or videos, F frames of each, S image size.
"""

from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import tyro

from openblip.cli import lines
from openblip.cli.options import ModelOptions, read_json_texts
from openblip.data.sample import Sample
from openblip.errors import ConfigError, SourceError
from openblip.generation.decoding import Beam


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
    num_frames: int = 16,
) -> int:
    """Answers questions about an image or a video: one JSON line {"question", "answer", "logprob"} for each.

    For a folder or a data source, each line begins with the "key" of its image. Without questions each sample
    of a data source is asked its own: {"image": "a.jpg", "question": "..."} in the lines of a .jsonl, say.
    Images that cannot be read are named on standard error and skipped; the exit code is then 1. With --out,
    the same command again continues where it was stopped.

    Args:
        source: an image or video file, a folder of them (searched recursively), or a data source.
        questions: the questions, each in quotes.
        candidates: a JSON list of answers to choose from; answers are written when not given.
        num_beams: texts kept while an answer is written; 3, of BLIP-2 5 when not given.
        max_new_tokens: the longest answer that is written, in tokens.
        num_frames: frames of a video.
    """
    if num_frames < 1:
        raise ConfigError("--num-frames must be at least 1")
    if not all(question.strip() for question in questions):
        raise ConfigError("a question is empty; write it in quotes after the image")
    given = {"max_new_tokens": max_new_tokens, **({} if num_beams is None else {"num_beams": num_beams})}
    Beam(min_new_tokens=1, **given)  # says what is out of range before anything is loaded
    choices = None if candidates is None else read_json_texts(candidates, "candidates")
    sources = lines.find_source(source, reading, videos=True, with_texts=not questions)
    if not questions and not lines.has_texts(sources):
        raise ConfigError("there is no question; write at least one in quotes after the image")
    predictor = model.load()
    decoding = replace(predictor.answer_decoding, **given)
    predictor.answer([], [], choices, decoding)  # raises what it cannot do, before a file is made
    import torch

    from openblip.data.images import is_video, read_frames, read_image

    def prepare(sample: Sample) -> tuple[torch.Tensor, tuple[str, ...]]:
        """An image (one frame) or a video, (F, 3, S, S) uint8, and the questions about it."""
        question = sample.info.get("question")
        if not questions and (not isinstance(question, str) or not question.strip()):
            raise SourceError("it has no question")
        if is_video(sample.image) or Path(sample.key).suffix.lower() in lines.VIDEO_FILE_SUFFIXES:
            frames = read_frames(sample.image, num_frames, name=lines.name_of(sample))
        else:
            frames = [read_image(sample.image, name=lines.name_of(sample))]
        pixels = torch.stack([torch.from_numpy(predictor.preprocessing(frame)) for frame in frames])
        return pixels, questions or (str(question),)

    output = lines.OutputLines(sources, reading, ("question", "answer", "logprob"), len(questions) or 1, questions)
    for samples, batch in output.batches(prepare, label="answering"):
        rows: list[list[dict[str, Any]]] = []
        for length, group in groupby(batch, key=lambda asked: len(asked[0])):  # equally many frames go together
            alike, step = list(group), max(1, reading.batch_size // length)
            for part in (alike[start : start + step] for start in range(0, len(alike), step)):
                frames = torch.stack([frames for frames, _ in part])  # (B, F, 3, S, S)
                owners = torch.tensor([index for index, (_, asked) in enumerate(part) for _ in asked])
                images = predictor.encode(frames, reading.batch_size).select(owners)
                texts = [question for _, asked in part for question in asked]
                answers = iter(
                    predictor.answer(images, texts, choices, decoding, reading.batch_size, return_scores=True)
                )
                rows += [
                    [
                        {"question": question, "answer": answer.text, "logprob": round(answer.logprob, 6)}
                        for question, answer in zip(asked, answers, strict=False)
                    ]
                    for _, asked in part
                ]
        output.write(samples, rows)
    return output.finish("answered about")
