"""`openblip match`: how well do these texts, or the captions that they come with, describe images or videos?

B images or videos, R texts of all of them, E embedding width, Q queries.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from openblip.cli import lines
from openblip.cli.options import ModelOptions
from openblip.cluster import EngineOptions
from openblip.data.sample import Sample
from openblip.errors import SourceError

if TYPE_CHECKING:
    from openblip.predictor import BasePredictor


@dataclass(frozen=True, kw_only=True)
class MatchTask(lines.LineTask):
    """What `openblip match` scores of each image: these texts, or its own captions where there are none."""

    scored: Sequence[str]

    @property
    def fields(self) -> Sequence[str]:
        return ("text" if self.scored else "caption", "match", "similarity")

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"command": "match", "texts": self.scored}

    @property
    def num_lines(self) -> int | None:
        return len(self.scored) or None

    def resolved(self, predictor: "BasePredictor") -> "MatchTask":
        if not predictor.tasks & {"match", "similarity"}:
            predictor.match([], [])  # raises the error that says what the checkpoint can do
        return self

    def texts(self, sample: Sample) -> Sequence[str]:
        if not self.scored and not sample.captions:
            raise SourceError("it has no caption to score")
        return self.scored or sample.captions

    def rows(
        self, predictor: "BasePredictor", batch: lines.EncodedBatch, batch_size: int
    ) -> Iterator[Mapping[str, Any]]:
        from openblip.models.blip import similarity_of_pairs

        images, all_texts = batch.images, batch.all_texts
        can_match, can_embed = ("match" in predictor.tasks), ("similarity" in predictor.tasks)
        match: list[float | None] = [None] * len(all_texts)
        similarity = match
        if self.scored:
            if can_match:
                match = predictor.match_matrix(images, self.scored, batch_size).flatten().tolist()
            if can_embed:
                similarity = predictor.similarity(images, self.scored, batch_size).flatten().tolist()
        else:
            if can_match:
                match = predictor.match(images.select(batch.owners), all_texts, batch_size).tolist()
            if can_embed:
                vectors = predictor.embed_images(images, batch_size)[batch.owners]  # (R, E) or (R, Q, E)
                similarity = similarity_of_pairs(vectors, predictor.embed_texts(all_texts, batch_size)).tolist()
        for text, p, cosine in zip(all_texts, match, similarity, strict=True):
            yield {self.fields[0]: text, "match": p, "similarity": cosine}


def command(
    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")],
    texts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT...", help_behavior_hint="")],
    /,
    *,
    model: ModelOptions,
    reading: lines.ReadingOptions,
    engine: EngineOptions,
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
    output = lines.OutputLines(sources, reading, model, engine, MatchTask(scored=texts))
    for _ in output.write(label="scoring"):
        pass
    return output.finish("scored")
