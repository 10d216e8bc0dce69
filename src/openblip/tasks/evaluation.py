"""Measures a model's calls over a data source: captioning, retrieval, filtering.

The model is anything with the calls of `openblip.Predictor`; true captions come from a sample's
`references`, or from its captions when it has none.

I images, T texts.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from openblip.data.sample import Reject, Sample, Source
from openblip.data.sequential import read_samples
from openblip.data.tokenizer import normalize_caption
from openblip.errors import SourceError
from openblip.generation.decoding import Beam, Decoding
from openblip.metrics.captioning import bleu, cider, exact_match
from openblip.metrics.filtering import auc, filter_quality
from openblip.metrics.retrieval import retrieval_recall

READ_AT_ONCE = 256
RERANKED = 16
CAPTION_DECODING = Beam(num_beams=3, max_new_tokens=20)


class Captioner(Protocol):
    """What captioning needs of a model."""

    def caption(self, images: Any, *, decoding: Decoding, batch_size: int | None) -> Any: ...


class Matcher(Protocol):
    """What retrieval and filtering need of a model."""

    def encode(self, images: Any, batch_size: int | None) -> Any: ...
    def embed_images(self, images: Any, batch_size: int | None) -> Tensor: ...
    def embed_texts(self, texts: Any, batch_size: int | None) -> Tensor: ...
    def match(self, images: Any, texts: Any, batch_size: int | None) -> Tensor: ...


class Collected(NamedTuple):
    """A source read into memory, images still encoded."""

    samples: list[Sample]
    rejects: list[Reject]


def collect(source: Source, limit: int | None = None) -> Collected:
    """The samples of a source that have captions, at most `limit`; SourceError when there are none."""
    samples: list[Sample] = []
    rejects: list[Reject] = []
    for item in read_samples(source):
        if isinstance(item, Reject):
            rejects.append(item)
        elif not item.captions:
            rejects.append(Reject(item.shard, item.key, "no caption"))
        else:
            samples.append(item)
        if limit is not None and len(samples) >= limit:
            break
    if not samples:
        raise SourceError(f"{source.name} has no sample with a caption to evaluate on.")
    return Collected(samples, rejects)


def references(sample: Sample) -> list[str]:
    """All captions known to be true of a sample, as a model is trained to write them."""
    true = sample.info.get("references") or sample.captions
    return [normalize_caption(text) for text in true]


def evaluate_captioning(
    model: Captioner,
    source: Source,
    *,
    decoding: Decoding = CAPTION_DECODING,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """CIDEr, BLEU-1 to 4 (0 to 1) and exact match of one caption per image, with the predictions.

    Raises SourceError for an empty source, ImageError for an unreadable picture and MissingExtraError
    without pycocoevalcap.
    """
    samples, rejects = collect(source, limit)
    predictions: list[str] = []
    for start in range(0, len(samples), READ_AT_ONCE):
        pictures = [sample.image for sample in samples[start : start + READ_AT_ONCE]]
        predictions += model.caption(pictures, decoding=decoding, batch_size=batch_size)
    true = [references(sample) for sample in samples]
    return {
        "num_images": len(samples),
        "num_rejects": len(rejects),
        "exact_match": exact_match(predictions, true, normalize_caption),
        "cider": cider(predictions, true),
        **{f"bleu_{n}": value for n, value in enumerate(bleu(predictions, true), start=1)},
        "predictions": [
            {"shard": sample.shard, "key": sample.key, "caption": text}
            for sample, text in zip(samples, predictions, strict=True)
        ],
    }


def evaluate_retrieval(
    model: Matcher,
    source: Source,
    *,
    rerank: int = RERANKED,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Text retrieval (TR) and image retrieval (IR) R@1/5/10, 0 to 1, by ITC and re-ranked by ITM.

    As BLIP section 5.1: the `rerank` best by ITC similarity are ordered anew by similarity plus ITM score;
    here the ITM score is P(match), where the released code adds the raw logit.
    """
    samples, rejects = collect(source, limit)
    captions = [sample.captions[0] for sample in samples]
    encoded = encode_all(model, samples, batch_size)
    similarity = model.embed_images(encoded, batch_size) @ model.embed_texts(captions, batch_size).T  # (I, T)
    names = {name: i for i, name in enumerate(dict.fromkeys(sample.image_id for sample in samples))}
    ids = np.array([names[sample.image_id] for sample in samples])
    reranked_texts = rerank_best(model, encoded, captions, similarity, rerank, batch_size)
    reranked_images = rerank_best(model, encoded, captions, similarity.T, rerank, batch_size, by_text=True)
    itc = retrieval_recall(similarity.numpy(), ids, ids)
    itm = retrieval_recall(reranked_texts.numpy(), ids, ids, text_to_image=reranked_images.numpy())
    return {
        "num_pairs": len(samples),
        "num_rejects": len(rejects),
        "itc": itc,
        "itm": itm,
        "reranked": min(rerank, len(samples)),
    }


def rerank_best(
    model: Matcher,
    encoded: Any,
    captions: Sequence[str],
    scores: Tensor,
    count: int,
    batch_size: int | None,
    by_text: bool = False,
) -> Tensor:
    """Scores (queries, candidates) with P(match) added to each query's `count` best, which so come first.

    Queries are the images, or the texts with `by_text`.
    """
    best = scores.topk(min(count, scores.shape[1]), dim=1).indices  # (queries, count)
    queries = torch.arange(len(scores)).repeat_interleave(best.shape[1])
    candidates = best.flatten()
    images, texts = (candidates, queries) if by_text else (queries, candidates)
    found = []
    for start in range(0, len(images), READ_AT_ONCE):
        part = slice(start, start + READ_AT_ONCE)
        paired = [captions[i] for i in texts[part].tolist()]
        found.append(model.match(encoded.select(images[part]), paired, batch_size))
    reranked = scores.clone()
    above_all_others = scores.max() - scores.min() + 1.0
    reranked[queries, candidates] += torch.cat(found) + above_all_others
    return reranked


def evaluate_filter(
    model: Matcher,
    source: Source,
    *,
    threshold: float = 0.5,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """How well P(match) tells true captions from noise, on a source whose samples say which are which.

    Raises SourceError when samples have no `noise` field (null for a true caption, else the kind).
    """
    samples, rejects = collect(source, limit)
    unknown = next((sample for sample in samples if "noise" not in sample.info), None)
    if unknown is not None:
        raise SourceError(
            f"{source.name}: {unknown.shard}/{unknown.key} has no `noise` field, so the truth is not known."
        )
    encoded = encode_all(model, samples, batch_size)
    scores = model.match(encoded, [sample.captions[0] for sample in samples], batch_size).numpy()
    kinds = [sample.info["noise"] for sample in samples]
    return {"num_pairs": len(samples), "num_rejects": len(rejects), **filter_report(scores, kinds, threshold)}


def filter_report(
    scores: np.ndarray[Any, Any], kinds: Sequence[str | None], threshold: float
) -> dict[str, Any]:
    """AUC, precision, recall and noise before and after, over all noise and the AUC of each kind."""
    clean = np.array([kind is None for kind in kinds])
    quality = filter_quality(scores, clean, threshold)
    by_kind = {}
    for kind in sorted({kind for kind in kinds if kind is not None}):
        rows = clean | np.array([other == kind for other in kinds])
        by_kind[kind] = auc(scores[rows], clean[rows])
    return {
        "threshold": threshold,
        "auc": none_if_undefined(auc(scores, clean)),
        "precision": none_if_undefined(quality.precision),
        "recall": none_if_undefined(quality.recall),
        "noise_before": quality.noise_before,
        "noise_after": none_if_undefined(quality.noise_after),
        "auc_by_kind": by_kind,
    }


def encode_all(model: Matcher, samples: Sequence[Sample], batch_size: int | None) -> Any:
    """Every picture through the image encoder once."""
    return model.encode([sample.image for sample in samples], batch_size)


def none_if_undefined(value: float) -> float | None:
    """JSON has no NaN: a share of nothing is null."""
    return None if math.isnan(value) else value
