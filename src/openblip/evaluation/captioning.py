"""How captions are measured (BLIP section 5.2)."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

from openblip.data.sample import Sample, Source, caption_texts
from openblip.data.tokenizer import normalize_caption
from openblip.evaluation.run import walk
from openblip.generation.decoding import Beam, Decoding
from openblip.metrics.captioning import caption_scores, exact_match, scores_by_domain

DECODING = Beam(num_beams=3, max_new_tokens=20)


class Captioner(Protocol):
    """What captioning needs of a model."""

    def caption(self, images: Any, *, decoding: Decoding, batch_size: int | None) -> Any: ...


class _Captioned(NamedTuple):
    sample: dict[str, Any]
    caption: str
    references: list[str]
    domain: str | None


def evaluate_captioning(
    model: Captioner,
    source: Source,
    *,
    decoding: Decoding = DECODING,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """The scores of COCO evaluation and exact match of one caption per image, with the predictions.

    Images without captions are captioned and not scored. Where samples have a `domain` (NoCaps), also the
    scores of each. `results` are what COCO's server takes.

    Raises SourceError for a source without pictures and MissingExtraError without pycocoevalcap.
    """

    def work(samples: list[Sample]) -> list[_Captioned]:
        images = [sample.image for sample in samples]
        written = model.caption(images, decoding=decoding, batch_size=batch_size)
        return [
            _Captioned(_named(sample), text, references(sample), sample.info.get("domain"))
            for sample, text in zip(samples, written, strict=True)
        ]

    results, rejects = walk(source, work, label="captioning", accept=references, limit=limit)
    scored = [result for result in results if result.references]
    return {
        "num_images": len(results),
        "num_scored": len(scored),
        "num_rejects": len(rejects),
        **(_scores(scored) if scored else {}),
        "predictions": [{**result.sample, "caption": result.caption} for result in results],
        "results": [{"image_id": result.sample["image_id"], "caption": result.caption} for result in results],
        "rejects": [asdict(reject) for reject in rejects],
    }


def references(sample: Sample) -> list[str]:
    """All captions known to be true of a sample, as a model is trained to write them.

    Raises `SourceError` for references that are no texts.
    """
    stated = caption_texts(sample.info.get("references"), f"{sample.shard}/{sample.key}: references")
    return [normalize_caption(text) for text in stated or sample.captions]


def _scores(scored: Sequence[_Captioned]) -> dict[str, Any]:
    predictions, true = [result.caption for result in scored], [result.references for result in scored]
    scores: dict[str, Any] = {"exact_match": exact_match(predictions, true, normalize_caption)}
    domains = [result.domain for result in scored if result.domain is not None]
    if len(domains) == len(scored):
        by_domain = scores_by_domain(predictions, true, domains)
        return {**scores, **by_domain["entire"], "by_domain": by_domain}
    return {**scores, **caption_scores(predictions, true)}


def _named(sample: Sample) -> dict[str, Any]:
    """How a result names its sample; `image_id` is what the data set's server knows it by."""
    return {"shard": sample.shard, "key": sample.key, "image_id": sample.info.get("image_id", sample.key)}
