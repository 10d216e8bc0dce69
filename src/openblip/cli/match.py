"""`openblip match`: how well do these texts, or the captions that they come with, describe images?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro

from openblip.cli.inputs import ImageInput
from openblip.cli.jsonl_file import LineFormat, Row
from openblip.cli.jsonl_job import JsonlJob
from openblip.cli.texts_job import inputs_for_texts, print_rows, run_job
from openblip.errors import SourceError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from openblip.predictor import BasePredictor, EncodedImages

    Pixels = npt.NDArray[np.uint8]  # (3, S, S)


def command(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    texts: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT...", help_behavior_hint="")
    ],
    /,
    *,
    model: str,
    out: Path | None = None,
    images: str | None = None,
    encoder_token: Literal["[ENC]", "[CLS]"] | None = None,
    batch_size: int = 32,
    num_workers: int = 2,
    device: str | None = None,
    tokenizer: str | None = None,
) -> int:
    """Scores texts against an image: one JSON line {"text", "match", "similarity"} per text.

    "match" is the probability that the text describes the image (ITM), "similarity" the cosine of their
    embeddings (ITC). One that the checkpoint has no weights for is null.

    For a folder of images or a data source, each line begins with the "key" of its image. Without texts each
    image is scored with its own captions: {"key", "caption", "match", "similarity"}. Images that cannot be
    read are named on standard error and skipped; the exit code is then 1. With --out, the same command again
    continues where it was stopped.

    Args:
        source: an image file, a folder of images (searched recursively), or a data source ("shards/*.tar").
        texts: the texts to score.
        model: a checkpoint folder, file or hub name, or the name of a shipped model.
        out: write the lines to this file; to standard output when not given.
        images: the folder of the pictures that an annotation file or table names.
        encoder_token: the first token of the texts; what the checkpoint says when not given.
        batch_size: images in one step of the model.
        num_workers: threads that read and decode images.
        device: "cpu", "cuda", "cuda:1" …; the best there is when not given.
        tokenizer: folder or hub name of the vocabulary, for a checkpoint that has none.
    """
    import openblip

    missing = "text to score; write at least one after the image"
    inputs = inputs_for_texts(source, texts, out=out, images=images, clips=False, missing=missing)
    predictor = openblip.load(model, device=device, encoder_token=encoder_token, tokenizer=tokenizer)
    scorer = _Scorer(predictor=predictor, texts=texts, batch_size=batch_size)
    scorer.check()
    if inputs is None:
        return print_rows(scorer.rows_of_texts(predictor.encode([source]))[0])
    return run_job(scorer.job(num_workers), inputs, out, done="scored")


class _Captioned(NamedTuple):
    """An image, and its own captions where those are scored."""

    pixels: "Pixels"
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Scorer:
    """The model, and the texts to score every image with; none: its own captions."""

    predictor: "BasePredictor"
    texts: tuple[str, ...]
    batch_size: int

    def check(self) -> None:
        """UnsupportedTaskError when the checkpoint has neither score."""
        if not self._can("match") and not self._can("similarity"):
            self.predictor.match([], [])

    def job(self, num_workers: int) -> JsonlJob[_Captioned]:
        scores = ("match", "similarity")
        layout = (
            LineFormat(fields=("text", *scores), num_lines=len(self.texts), given=self.texts)
            if self.texts
            else LineFormat(fields=("caption", *scores), num_lines=None)
        )
        return JsonlJob(
            label="scoring",
            layout=layout,
            load=self._load,
            process=self._process,
            batch_size=self.batch_size,
            num_workers=num_workers,
        )

    def rows_of_texts(self, images: "EncodedImages") -> list[list[Row]]:
        """Each image with all texts."""
        nothing = [[None] * len(self.texts)] * len(images)
        match = similarity = nothing
        if self._can("match"):
            match = self.predictor.match_matrix(images, self.texts, self.batch_size).tolist()
        if self._can("similarity"):
            similarity = self.predictor.similarity(images, self.texts, self.batch_size).tolist()
        return [_rows("text", self.texts, *scores) for scores in zip(match, similarity, strict=True)]

    def _rows_of_captions(
        self, images: "EncodedImages", captions: Sequence[tuple[str, ...]]
    ) -> list[list[Row]]:
        """Each image with its own captions."""
        import torch

        from openblip.predictor import similarity_of_pairs

        texts = [caption for own in captions for caption in own]
        owners = torch.tensor([number for number, own in enumerate(captions) for _ in own])
        match: list[float | None] = [None] * len(texts)
        similarity = match
        if self._can("match"):
            match = self.predictor.match(images.select(owners), texts, self.batch_size).tolist()
        if self._can("similarity"):
            vectors = self.predictor.embed_images(images, self.batch_size)[owners]  # (R, E) or (R, Q, E)
            embedded = self.predictor.embed_texts(texts, self.batch_size)
            similarity = similarity_of_pairs(vectors, embedded).tolist()
        rows = iter(_rows("caption", texts, match, similarity))
        return [[next(rows) for _ in own] for own in captions]

    def _load(self, image: ImageInput) -> _Captioned:
        if self.texts:
            return _Captioned(self.predictor.preprocessing(image.read()), ())
        from openblip.data.images import read_image

        sample = image.read_sample()
        if not sample.captions:
            raise SourceError("it has no caption to score")
        picture = read_image(sample.image, name=image.name)
        return _Captioned(self.predictor.preprocessing(picture), sample.captions)

    def _process(self, batch: Sequence[_Captioned]) -> list[list[Row]]:
        import numpy as np
        import torch

        pixels = torch.from_numpy(np.stack([each.pixels for each in batch]))  # (B, 3, S, S) uint8
        images = self.predictor.encode(pixels, self.batch_size)  # once for both scores
        if self.texts:
            return self.rows_of_texts(images)
        return self._rows_of_captions(images, [each.captions for each in batch])

    def _can(self, call: str) -> bool:
        return call in self.predictor.tasks


def _rows(
    field: str,
    texts: Sequence[str],
    match: Sequence[float | None],
    similarity: Sequence[float | None],
) -> list[Row]:
    return [
        {field: text, "match": probability, "similarity": cosine}
        for text, probability, cosine in zip(texts, match, similarity, strict=True)
    ]
