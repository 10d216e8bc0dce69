"""How well a filter tells true captions from noise, where the truth is known (BLIP section 3.3)."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from openblip.data.sample import Sample, Source
from openblip.errors import SourceError
from openblip.evaluation.run import walk
from openblip.metrics.filtering import auc, filter_quality


class Filter(Protocol):
    """What filtering needs of a model."""

    def match(self, images: Any, texts: Any, batch_size: int | None) -> Tensor: ...


def evaluate_filter(
    model: Filter,
    source: Source,
    *,
    threshold: float = 0.5,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """How well P(match) tells true captions from noise, on a source whose samples say which are which.

    Raises SourceError when samples have no `noise` field (null for a true caption, else the kind).
    """

    def work(samples: list[Sample]) -> list[tuple[float, str | None]]:
        images, texts = [sample.image for sample in samples], [sample.captions[0] for sample in samples]
        scores: list[float] = model.match(images, texts, batch_size).tolist()
        return [(score, sample.info["noise"]) for score, sample in zip(scores, samples, strict=True)]

    results, rejects = walk(source, work, label="matching", accept=_check_truth, limit=limit)
    scores, kinds = np.array([score for score, _ in results]), [kind for _, kind in results]
    return {
        "num_pairs": len(results),
        "num_rejects": len(rejects),
        **filter_report(scores, kinds, threshold),
        "rejects": [asdict(reject) for reject in rejects],
    }


def _check_truth(sample: Sample) -> None:
    if not sample.captions:
        raise SourceError("no caption")
    if "noise" not in sample.info:
        raise SourceError("no `noise` field, so the truth is not known")
    kind = sample.info["noise"]
    if kind is not None and not isinstance(kind, str):
        raise SourceError(f"`noise` must be null for a true caption or the kind of noise, not {kind!r:.80}")


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


def none_if_undefined(value: float) -> float | None:
    """JSON has no NaN: a share of nothing is null."""
    return None if math.isnan(value) else value
