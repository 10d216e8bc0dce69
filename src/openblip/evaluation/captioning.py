"""Captioning, as COCO and NoCaps measure it (BLIP section 5.2)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from openblip.data.prompts import normalize_caption
from openblip.data.sample import Sample, Source, caption_texts
from openblip.evaluation.run import run_evaluation
from openblip.generation.decoding import Decoding
from openblip.metrics.captioning import caption_scores, exact_match, scores_by_domain
from openblip.predictor import BasePredictor
from openblip.predictor.base import CAPTION_DECODING


class _CaptionResult(NamedTuple):
    sample: dict[str, Any]
    """Names the sample."""
    caption: str
    references: list[str]
    domain: str | None


def evaluate_captioning(
    predictor: BasePredictor,
    source: Source,
    *,
    decoding: Decoding = CAPTION_DECODING,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Return the scores of COCO evaluation and exact match of one caption per image, with the predictions.

    Images without captions are captioned and not scored. Where all samples have a `domain` (NoCaps), each
    domain has scores of its own too. `results` is the list that COCO's evaluation server takes; its
    `image_id` is the data set's where the sample has one, else the key.

    Raises:
        SourceError: no image can be captioned.
        MissingExtraError: pycocoevalcap is not installed.
    """

    def predict(samples: list[Sample]) -> list[_CaptionResult]:
        images = [sample.image for sample in samples]
        captions = predictor.caption(images, decoding=decoding, batch_size=batch_size)
        return [
            _CaptionResult(
                {"shard": s.shard, "key": s.key, "image_id": s.info.get("image_id", s.key)},
                caption,
                reference_captions(s),
                s.info.get("domain"),
            )
            for s, caption in zip(samples, captions, strict=True)
        ]

    run = run_evaluation(source, predict, label="captioning", check_sample=reference_captions, limit=limit)
    scored = [result for result in run.results if result.references]
    return run.report(
        {"num_images": len(run.results), "num_scored": len(scored)},
        _scores(scored) if scored else {},
        predictions=[{**result.sample, "caption": result.caption} for result in run.results],
        results=[
            {"image_id": result.sample["image_id"], "caption": result.caption} for result in run.results
        ],
    )


def reference_captions(sample: Sample) -> list[str]:
    """Return all captions known to be true of a sample, normalised as in training.

    These are its `references` field, or its captions where it has none. Raises `SourceError` when the field
    is neither a string nor a list of strings.
    """
    stated = caption_texts(sample.info.get("references"), f"{sample.shard}/{sample.key}: references")
    return [normalize_caption(text) for text in stated or sample.captions]


def _scores(scored: Sequence[_CaptionResult]) -> dict[str, Any]:
    predictions, truths = [result.caption for result in scored], [result.references for result in scored]
    scores: dict[str, Any] = {"exact_match": exact_match(predictions, truths, normalize_caption)}
    domains = [result.domain for result in scored if result.domain is not None]
    if len(domains) == len(scored):
        by_domain = scores_by_domain(predictions, truths, domains)
        return {**scores, **by_domain["entire"], "by_domain": by_domain}
    return {**scores, **caption_scores(predictions, truths)}
