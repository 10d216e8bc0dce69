"""`openblip match`: how well do these texts describe this image?"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import tyro

from openblip.errors import ConfigError, UnsupportedTaskError

if TYPE_CHECKING:
    from torch import Tensor


def command(
    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")],
    texts: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT...", help_behavior_hint="")
    ],
    /,
    *,
    model: str,
    device: str | None = None,
) -> int:
    """Scores texts against an image: one JSON line {"text", "match", "similarity"} per text.

    "match" is the probability that the text describes the image (ITM), "similarity" the cosine of their
    embeddings (ITC). One that the checkpoint has no weights for is null.

    Args:
        image: an image file.
        texts: the texts to score.
        model: a checkpoint folder, or the name of a shipped model.
        device: "cpu", "cuda", "cuda:1" …; the best there is when not given.
    """
    import openblip

    if not texts:
        raise ConfigError("there is no text to score; write at least one after the image")
    predictor = openblip.load(model, device=device)
    encoded = predictor.encode([image])  # once for both scores
    words = list(texts)
    match, no_match = _scores(lambda: predictor.match_matrix(encoded, words), len(texts))
    similarity, no_similarity = _scores(lambda: predictor.similarity(encoded, words), len(texts))
    if no_match is not None and no_similarity is not None:
        raise no_match
    for text, probability, cosine in zip(texts, match, similarity, strict=True):
        print(json.dumps({"text": text, "match": probability, "similarity": cosine}, ensure_ascii=False))
    return 0


def _scores(
    compute: "Callable[[], Tensor]", count: int
) -> tuple[list[float] | list[None], UnsupportedTaskError | None]:
    """The scores of one image, or as many None and why there are none."""
    try:
        scores: list[float] = compute().reshape(-1).tolist()
    except UnsupportedTaskError as error:
        return [None] * count, error
    return scores, None
