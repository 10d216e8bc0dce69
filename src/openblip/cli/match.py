"""`openblip match`: how well do these texts, or the captions that they come with, describe images?

B images, R texts of all images, S image size, E embedding width, Q queries.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from openblip.cli.batches import Batches, OutputLines, decode_image
from openblip.cli.inputs import ImageFile, find_sources, has_texts, is_one_file
from openblip.cli.options import ModelOptions
from openblip.data.sample import Sample
from openblip.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from torch import Tensor

    from openblip.predictor import BasePredictor, EncodedImages

Rows = list[list[dict[str, Any]]]


def command(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    texts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT...", help_behavior_hint="")],
    /,
    *,
    model: str,
    out: Path | None = None,
    images: str | None = None,
    encoder_token: Literal["[ENC]", "[CLS]"] | None = None,
    batch_size: int = 32,
    num_workers: int = 2,
    options: Annotated[ModelOptions, tyro.conf.arg(name="")] = ModelOptions(),  # noqa: B008
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
        images: the folder of the images that an annotation file or table names.
        encoder_token: the first token of the texts; what the checkpoint says when not given.
        batch_size: images in one step of the model.
        num_workers: threads that read and decode images.
        options: where and how the model runs.
    """
    if min(batch_size, num_workers) < 1:
        raise ConfigError("--batch-size and --num-workers must be at least 1")
    is_alone = out is None and is_one_file(source)
    sources = [] if is_alone else find_sources([source], images=images, with_texts=not texts)
    if not texts and not has_texts(sources):
        raise ConfigError("there is no text to score; write at least one after the image")
    predictor = options.load(model, encoder_token=encoder_token)
    if not {"match", "similarity"} & predictor.tasks:
        predictor.match([], [])  # raises the error that says what the checkpoint can do
    import torch

    def prepare(sample: Sample) -> "Tensor":
        if not texts and not sample.captions:
            raise SourceError("it has no caption to score")
        return torch.from_numpy(predictor.preprocessing(decode_image(sample)))

    def score(samples: Sequence[Sample], pixels: Sequence["Tensor"]) -> Rows:
        encoded = predictor.encode(torch.stack(list(pixels)), batch_size)  # once for both scores
        if texts:
            return _score_texts(predictor, encoded, texts, batch_size)
        return _score_captions(predictor, encoded, [sample.captions for sample in samples], batch_size)

    if is_alone:
        sample = ImageFile(source, with_texts=False).read()
        for row in score([sample], [prepare(sample)])[0]:
            print(json.dumps(row, ensure_ascii=False))
        return 0
    fields = ("text" if texts else "caption", "match", "similarity")
    with OutputLines(out, fields=fields, num_lines=len(texts) or None, given=texts or None) as lines:
        batches = Batches(sources, prepare, lines, label="scoring", batch_size=batch_size, num_workers=num_workers)
        for batch in batches:
            samples = [sample for sample, _ in batch]
            lines.write(samples, score(samples, [pixels for _, pixels in batch]))
    return batches.finish("scored")


def _score_texts(predictor: "BasePredictor", images: "EncodedImages", texts: tuple[str, ...], batch_size: int) -> Rows:
    """Score every image with all texts."""
    nothing = [[None] * len(texts)] * len(images)
    match = similarity = nothing
    if "match" in predictor.tasks:
        match = predictor.match_matrix(images, texts, batch_size).tolist()
    if "similarity" in predictor.tasks:
        similarity = predictor.similarity(images, texts, batch_size).tolist()
    return [_rows("text", texts, *scores) for scores in zip(match, similarity, strict=True)]


def _score_captions(
    predictor: "BasePredictor", images: "EncodedImages", captions: Sequence[tuple[str, ...]], batch_size: int
) -> Rows:
    """Score every image with its own captions."""
    import torch

    from openblip.models.blip import similarity_of_pairs

    texts = [caption for captions_of_image in captions for caption in captions_of_image]
    owners = torch.tensor([i for i, captions_of_image in enumerate(captions) for _ in captions_of_image])
    match: list[float | None] = [None] * len(texts)
    similarity = match
    if "match" in predictor.tasks:
        match = predictor.match(images.select(owners), texts, batch_size).tolist()
    if "similarity" in predictor.tasks:
        vectors = predictor.embed_images(images, batch_size)[owners]  # (R, E) or (R, Q, E)
        similarity = similarity_of_pairs(vectors, predictor.embed_texts(texts, batch_size)).tolist()
    rows = iter(_rows("caption", texts, match, similarity))
    return [[next(rows) for _ in captions_of_image] for captions_of_image in captions]


def _rows(
    field: str, texts: Sequence[str], match: Sequence[float | None], similarity: Sequence[float | None]
) -> list[dict[str, Any]]:
    return [
        {field: text, "match": probability, "similarity": cosine}
        for text, probability, cosine in zip(texts, match, similarity, strict=True)
    ]
