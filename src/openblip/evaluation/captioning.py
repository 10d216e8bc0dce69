"""Captioning, as COCO and NoCaps measure it (BLIP section 5.2)."""

from typing import Any

from openblip.data.sample import Sample, Source, caption_texts
from openblip.data.texts import normalize_caption
from openblip.evaluation.run import run_evaluation
from openblip.generation.decoding import Decoding
from openblip.metrics.captioning import caption_scores, exact_match, scores_by_domain
from openblip.predictor import BasePredictor
from openblip.predictor.base import CAPTION_DECODING
from openblip.text_counts import count_texts, warn_caller


@count_texts(warn_caller)
def evaluate_captioning(
    predictor: BasePredictor,
    source: Source,
    *,
    decoding: Decoding = CAPTION_DECODING,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Return the scores of COCO evaluation and exact match of one caption per image, with the predictions.

    Images without captions are captioned and not scored. Where all samples have a `domain` (NoCaps), each domain has
    scores of its own too. `results` is the list that COCO's evaluation server takes; its `image_id` is the data set's
    where the sample has one, else the key. Raises `SourceError` when no image can be captioned, and `MissingExtraError`
    without pycocoevalcap.
    """

    def predict(samples: list[Sample]) -> list[str]:
        images = [sample.image for sample in samples]
        return list(predictor.caption(images, decoding=decoding, batch_size=batch_size))

    run = run_evaluation(source, predict, label="captioning", check_sample=reference_captions, limit=limit)
    scored = [
        (caption, references, sample.info.get("domain"))
        for sample, caption in run.pairs()
        if (references := reference_captions(sample))
    ]
    scores: dict[str, Any] = {}
    if scored:
        captions, references, domains = zip(*scored, strict=True)
        scores["exact_match"] = exact_match(captions, references, normalize_caption)
        if None in domains:
            scores |= caption_scores(captions, references)
        else:
            by_domain = scores_by_domain(captions, references, domains)
            scores |= {**by_domain["entire"], "by_domain": by_domain}
    image_ids = [sample.info.get("image_id", sample.key) for sample in run.samples]
    rows = [{"image_id": name, "caption": caption} for name, caption in zip(image_ids, run.results, strict=True)]
    counts = {"num_images": len(rows), "num_scored": len(scored)}
    return run.report(counts, scores, predictions=run.named(rows), results=rows)


def reference_captions(sample: Sample) -> list[str]:
    """Return all captions known to be true of a sample, normalised as in training.

    These are its `references` field, or its captions where it has none. Raises `SourceError` when the field
    is neither a string nor a list of strings.
    """
    stated = caption_texts(sample.info.get("references"), f"{sample.shard}/{sample.key}: references")
    return [normalize_caption(text) for text in stated or sample.captions]
