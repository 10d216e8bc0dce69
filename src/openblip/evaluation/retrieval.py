"""Retrieval of texts, images and videos, measured (BLIP sections 5.1 and 5.6).

I images or videos, T texts.
"""

from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from openblip.data.sample import Sample, Source
from openblip.errors import SourceError
from openblip.evaluation.run import pictures, walk
from openblip.metrics.retrieval import retrieval_recall
from openblip.models.similarity import similarity_matrix

RERANKED = 16


class Matcher(Protocol):
    """What retrieval needs of a model; clips also need `encode_videos`."""

    def encode(self, images: Any, batch_size: int | None) -> Any: ...
    def embed_images(self, images: Any, batch_size: int | None) -> Tensor: ...
    def embed_texts(self, texts: Any, batch_size: int | None) -> Tensor: ...
    def match_matrix(self, images: Any, texts: Any, batch_size: int | None) -> Tensor: ...


class _Embedded(NamedTuple):
    place: tuple[str, str]
    image_id: str
    captions: tuple[str, ...]
    vector: Tensor


def evaluate_retrieval(
    model: Matcher,
    source: Source,
    *,
    rerank: int = RERANKED,
    num_frames: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Text retrieval (TR) and image retrieval (IR) R@1/5/10, 0 to 1, by ITC and re-ranked by ITM.

    All captions of an image are right answers. The `rerank` best by ITC similarity (all, where there are
    fewer) are ordered anew by similarity plus ITM score, as in BLIP section 5.1; here the ITM score is
    P(match), where the released code adds the raw logit. With `num_frames` the source's clips take the place
    of images (section 5.6). Pictures are read twice, so that no more than a batch of them is in memory.
    """

    def embed(samples: list[Sample]) -> list[_Embedded]:
        vectors = model.embed_images(pictures(model, samples, num_frames, batch_size), batch_size)
        return [
            _Embedded((s.shard, s.key), s.image_id, s.captions, vector)
            for s, vector in zip(samples, vectors, strict=True)
        ]

    found, rejects = walk(source, embed, label="embedding", accept=_check_caption, limit=limit)
    names = {name: i for i, name in enumerate(dict.fromkeys(image.image_id for image in found))}
    image_ids = np.array([names[image.image_id] for image in found])
    texts = [caption for image in found for caption in image.captions]
    text_ids = np.array([names[image.image_id] for image in found for _ in image.captions])
    vectors = torch.stack([image.vector for image in found])
    similarity = similarity_matrix(vectors, model.embed_texts(texts, batch_size))  # (I, T)
    by_image, by_text = best(similarity, rerank), best(similarity.T, rerank).T  # (I, T) bool
    rows = {image.place: i for i, image in enumerate(found)}

    def match(samples: list[Sample]) -> list[Tensor]:
        encoded = model.encode(pictures(model, samples, num_frames, batch_size), batch_size)
        scores = []
        for i, sample in enumerate(samples):
            columns = (by_image | by_text)[rows[sample.shard, sample.key]].nonzero().flatten().tolist()
            own = encoded.select(torch.tensor([i]))
            scores.append(model.match_matrix(own, [texts[c] for c in columns], batch_size)[0])
        return scores

    matched, _ = walk(source, match, label="re-ranking", accept=_check_caption, limit=limit)
    itm = torch.zeros_like(similarity)
    itm[by_image | by_text] = torch.cat(matched)
    to_image = put_first(similarity, itm, by_text).T.numpy()
    itc = retrieval_recall(similarity.numpy(), image_ids, text_ids)
    reranked = retrieval_recall(
        put_first(similarity, itm, by_image).numpy(), image_ids, text_ids, text_to_image=to_image
    )
    return {
        "num_images": len(found),
        "num_texts": len(texts),
        "num_rejects": len(rejects),
        "itc": itc,
        "itm": reranked,
        "reranked": min(rerank, max(similarity.shape)),
        "rejects": [asdict(reject) for reject in rejects],
    }


def best(scores: Tensor, count: int) -> Tensor:
    """bool (queries, candidates): each query's `count` best, or all where there are fewer."""
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    return chosen.scatter_(1, scores.topk(min(count, scores.shape[1]), dim=1).indices, True)


def put_first(scores: Tensor, itm: Tensor, chosen: Tensor) -> Tensor:
    """Scores with the ITM score added where `chosen`, and enough that these come before all others."""
    above_all_others = scores.max() - scores.min() + 1.0
    return scores + chosen * (itm + above_all_others)


def _check_caption(sample: Sample) -> None:
    if not sample.captions:
        raise SourceError("no caption")
