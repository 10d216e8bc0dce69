"""`openblip match`: how well do these texts, or the captions that they come with, describe images or videos?

B images or videos, R texts of all of them, E embedding width, Q queries.
"""

from collections.abc import Sequence
from typing import Annotated

import tyro

from openblip.cli import lines
from openblip.cli.options import ModelOptions
from openblip.data.sample import Sample
from openblip.errors import SourceError


def command(
    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")],
    texts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT...", help_behavior_hint="")],
    /,
    *,
    model: ModelOptions,
    reading: lines.ReadingOptions,
) -> int:
    """Scores texts against an image or a video: one JSON line {"text", "match", "similarity"} per text.

    "match" is the probability that the text describes the image (ITM), "similarity" the cosine of their
    embeddings (ITC). One that the checkpoint has no weights for is null.

    For a folder of images or a data source, each line begins with the "key" of its image. Without texts each
    image is scored with its own captions: {"key", "caption", "match", "similarity"}. Images that cannot be
    read are named on standard error and skipped; the exit code is then 1. With --out, the same command again
    continues where it was stopped.

    Args:
        source: an image or video file, a folder of them (searched recursively), or a data source ("shards/*.tar").
        texts: the texts to score.
    """
    advice = "there is no text to score; write at least one after the image"
    sources = lines.find_source(source, reading, without_texts=None if texts else advice)
    predictor = model.load()
    can_match, can_embed = ("match" in predictor.tasks), ("similarity" in predictor.tasks)
    if not can_match and not can_embed:
        predictor.match([], [])  # raises the error that says what the checkpoint can do
    from openblip.models.blip import similarity_of_pairs

    batch_size, field = reading.batch_size, "text" if texts else "caption"

    def texts_of(sample: Sample) -> Sequence[str]:
        if not texts and not sample.captions:
            raise SourceError("it has no caption to score")
        return texts or sample.captions

    output = lines.OutputLines(
        sources, reading, model, predictor, (field, "match", "similarity"), {"command": "match", "texts": texts},
        num_lines=len(texts) or None,
    )  # fmt: skip
    for batch in output.batches(texts_of, label="scoring"):
        images, all_texts = batch.images, batch.all_texts
        match: list[float | None] = [None] * len(all_texts)
        similarity = match
        if texts:
            if can_match:
                match = predictor.match_matrix(images, texts, batch_size).flatten().tolist()
            if can_embed:
                similarity = predictor.similarity(images, texts, batch_size).flatten().tolist()
        else:
            if can_match:
                match = predictor.match(images.select(batch.owners), all_texts, batch_size).tolist()
            if can_embed:
                vectors = predictor.embed_images(images, batch_size)[batch.owners]  # (R, E) or (R, Q, E)
                similarity = similarity_of_pairs(vectors, predictor.embed_texts(all_texts, batch_size)).tolist()
        scores = zip(all_texts, match, similarity, strict=True)
        output.write(batch, ({field: text, "match": p, "similarity": cosine} for text, p, cosine in scores))
    return output.finish("scored")
