"""`openblip answer`: questions about images or clips, of the command line or of a data source."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro

from openblip.cli.inputs import ImageInput, is_clip_file
from openblip.cli.jsonl_file import LineFormat, Row
from openblip.cli.jsonl_job import JsonlJob
from openblip.cli.listed_texts import read_texts
from openblip.cli.texts_job import inputs_for_texts, print_rows, run_job
from openblip.errors import ConfigError, SourceError
from openblip.generation.decoding import Beam, Decoding

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from openblip.data.sample import Sample
    from openblip.predictor import BasePredictor, EncodedImages

    Frames = npt.NDArray[np.uint8]  # (F, 3, S, S)


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
    device: str | None = None,
    tokenizer: str | None = None,
) -> int:
    """Answers questions about an image or a clip: one JSON line {"question", "answer", "logprob"} for each.

    For a folder or a data source, each line begins with the "key" of its image. Without questions each sample
    of a data source is asked its own: {"image": "a.jpg", "question": "..."} in the lines of a .jsonl, say.
    Images that cannot be read are named on standard error and skipped; the exit code is then 1. With --out,
    the same command again continues where it was stopped.

    Args:
        source: an image or clip file, a folder of them (searched recursively), or a data source.
        questions: the questions, each in quotes.
        model: a checkpoint folder, file or hub name, or the name of a shipped model.
        out: write the lines to this file; to standard output when not given.
        images: the folder of the pictures that an annotation file or table names.
        candidates: a JSON list of answers to choose from; answers are written when not given.
        num_beams: texts kept while an answer is written; 3, of BLIP-2 5 when not given.
        max_new_tokens: the longest answer that is written, in tokens.
        num_frames: frames of a clip.
        encoder_token: the first token of the questions; what the checkpoint says when not given.
        batch_size: images, or frames of clips, in one step of the model.
        num_workers: threads that read and decode images.
        device: "cpu", "cuda", "cuda:1" …; the best there is when not given.
        tokenizer: folder or hub name of the vocabulary, for a checkpoint that has none.
    """
    import openblip

    if num_frames < 1:
        raise ConfigError("--num-frames must be at least 1")
    if not all(question.strip() for question in questions):
        raise ConfigError("a question is empty; write it in quotes after the image")
    chosen = {"max_new_tokens": max_new_tokens, **({} if num_beams is None else {"num_beams": num_beams})}
    Beam(min_new_tokens=1, **chosen)  # says what is out of range before anything is loaded
    choices = None if candidates is None else read_texts(candidates, "candidates")
    missing = "question; write at least one in quotes after the image"
    inputs = inputs_for_texts(source, questions, out=out, images=images, clips=True, missing=missing)
    predictor = openblip.load(model, device=device, encoder_token=encoder_token, tokenizer=tokenizer)
    answerer = _Answerer(
        predictor=predictor,
        questions=questions,
        candidates=choices,
        decoding=replace(predictor.answer_decoding, **chosen),
        num_frames=num_frames,
        batch_size=batch_size,
    )
    answerer.check()
    if inputs is None:
        return print_rows(answerer.rows(answerer.encode_file(source), [questions])[0])
    return run_job(answerer.job(num_workers), inputs, out, done="answered about")


class _Asked(NamedTuple):
    """A picture (one frame) or a clip, and the questions about it."""

    frames: "Frames"
    questions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Answerer:
    """The model, how it answers, and what every image is asked; nothing: its own question."""

    predictor: "BasePredictor"
    questions: tuple[str, ...]
    candidates: list[str] | None
    decoding: Decoding
    num_frames: int
    batch_size: int

    def check(self) -> None:
        """Lets the model refuse what it cannot do before anything is written."""
        self.predictor.answer([], [], self.candidates, self.decoding)

    def job(self, num_workers: int) -> JsonlJob[_Asked]:
        given = self.questions or None
        layout = LineFormat(
            fields=("question", "answer", "logprob"), num_lines=len(self.questions) or 1, given=given
        )
        return JsonlJob(
            label="answering",
            layout=layout,
            load=self._load,
            process=self._process,
            batch_size=self.batch_size,
            num_workers=num_workers,
        )

    def encode_file(self, path: str) -> "EncodedImages":
        """One picture or clip."""
        if is_clip_file(path):
            return self.predictor.encode_videos([path], self.num_frames, self.batch_size)
        return self.predictor.encode([path])

    def rows(self, images: "EncodedImages", questions: Sequence[tuple[str, ...]]) -> list[list[Row]]:
        """What each image is answered to its questions."""
        import torch

        owners = torch.tensor([number for number, own in enumerate(questions) for _ in own])
        asked = [question for own in questions for question in own]
        answers = self.predictor.answer(
            images.select(owners),
            asked,
            self.candidates,
            self.decoding,
            batch_size=self.batch_size,
            return_scores=True,
        )
        rows = iter(
            [
                {"question": question, "answer": answer.text, "logprob": round(answer.logprob, 6)}
                for question, answer in zip(asked, answers, strict=True)
            ]
        )
        return [[next(rows) for _ in own] for own in questions]

    def _load(self, image: ImageInput) -> _Asked:
        import numpy as np

        from openblip.data.images import read_image
        from openblip.data.video import is_video
        from openblip.data.video import read_frames

        sample = image.read_sample()
        questions = self.questions or (_own_question(sample),)
        if is_video(sample.image):
            frames = read_frames(sample.image, self.num_frames, name=image.name)
        else:
            frames = [read_image(sample.image, name=image.name)]
        return _Asked(np.stack([self.predictor.preprocessing(frame) for frame in frames]), questions)

    def _process(self, batch: Sequence[_Asked]) -> list[list[Row]]:
        """Pictures together, and clips by as many as have the frames of a batch of pictures."""
        from openblip.predictor.batching import chunks

        found: list[list[Row]] = []
        for num_frames, alike in itertools.groupby(batch, key=lambda asked: len(asked.frames)):
            for part in chunks(list(alike), max(1, self.batch_size // num_frames)):
                found += self.rows(self._encode(part), [asked.questions for asked in part])
        return found

    def _encode(self, batch: Sequence[_Asked]) -> "EncodedImages":
        """Pictures or clips of as many frames."""
        import numpy as np
        import torch

        from openblip.predictor import EncodedImages

        pixels = torch.from_numpy(np.stack([asked.frames for asked in batch]))  # (B, F, 3, S, S) uint8
        frames = self.predictor.encode(pixels.flatten(0, 1), self.batch_size)  # tokens (B * F, N, Dv)
        num_frames = pixels.shape[1]
        tokens = frames.tokens.unflatten(0, (-1, num_frames)).flatten(1, 2)  # (B, F * N, Dv)
        return EncodedImages(tokens, frames.seeds[::num_frames], num_frames)


def _own_question(sample: "Sample") -> str:
    question = sample.info.get("question")
    if not isinstance(question, str) or not question.strip():
        raise SourceError("it has no question")
    return question
