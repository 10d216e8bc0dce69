"""Captioning, as COCO and NoCaps measure it (BLIP section 5.2)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from openblip.data.sample import Sample, Source, caption_texts
from openblip.data.texts import normalize_caption
from openblip.errors import SourceError
from openblip.evaluation.run import run_evaluation
from openblip.generation.decoding import Decoding
from openblip.metrics.calibration import calibration_report
from openblip.metrics.captioning import caption_scores, exact_match, scores_by_domain
from openblip.metrics.hallucination import (
    DepictedObject,
    Judgement,
    ObjectRelation,
    Vocabulary,
    coco_synonyms,
    hallucination_rates,
)
from openblip.predictor import BasePredictor
from openblip.predictor.base import CAPTION_DECODING
from openblip.text_counts import count_texts, warn_caller


@count_texts(warn_caller)
def evaluate_captioning(
    predictor: BasePredictor,
    source: Source,
    *,
    decoding: Decoding = CAPTION_DECODING,
    synonyms: Mapping[str, Sequence[str]] | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Return the scores of COCO evaluation and exact match of one caption per image, with the predictions.

    `hallucination` has what captions say that is not true (`judge_captions`), and `calibration` how far the probability
    of a caption, the geometric mean of its tokens', is the share of captions that say nothing false. Images without
    captions are captioned and not scored. Where all samples have a `domain` (NoCaps), each domain has scores of its own
    too. `results` is the list that COCO's evaluation server takes; its `image_id` is the data set's where the sample
    has one, else the key. Raises `SourceError` when no image can be captioned, and `MissingExtraError` without
    pycocoevalcap.
    """

    def predict(samples: list[Sample]) -> list[tuple[str, float]]:
        """Captions with their confidence."""
        images = [sample.image for sample in samples]
        written = predictor.caption(images, decoding=decoding, batch_size=batch_size, return_scores=True)
        return [(text.text, min(math.exp(text.logprob / max(len(text.token_logprobs), 1)), 1.0)) for text in written]

    def check_sample(sample: Sample) -> None:
        reference_captions(sample)
        objects_of(sample)

    run = run_evaluation(source, predict, label="captioning", check_sample=check_sample, limit=limit)
    scored = [
        (caption, references, sample.info.get("domain"))
        for sample, (caption, _) in run.pairs()
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
    judged = judge_captions(run.samples, [caption for caption, _ in run.results], synonyms)
    known = [
        (judgement, confidence)
        for judgement, (_, confidence) in zip(judged, run.results, strict=True)
        if judgement is not None
    ]
    if known:
        judgements, confidences = zip(*known, strict=True)
        scores["hallucination"] = hallucination_rates(judgements)
        scores["calibration"] = calibration_report(confidences, [not each.hallucinated() for each in judgements])
    image_ids = [sample.info.get("image_id", sample.key) for sample in run.samples]
    rows = [{"image_id": name, "caption": caption} for name, (caption, _) in zip(image_ids, run.results, strict=True)]
    counts = {"num_images": len(rows), "num_scored": len(scored)}
    said = [{} if judgement is None else {"hallucinated": judgement.hallucinated()} for judgement in judged]
    predictions = run.named([{**row, **false} for row, false in zip(rows, said, strict=True)])
    return run.report(counts, scores, predictions=predictions, results=rows)


def judge_captions(
    samples: Sequence[Sample], captions: Sequence[str], synonyms: Mapping[str, Sequence[str]] | None = None
) -> list[Judgement | None]:
    """What each caption says of its image, None where nothing is known of the image.

    Where samples have an `objects` field, it is the truth, and the words of all these fields are what captions are read
    for, with `synonyms` besides. Elsewhere the objects of an image are those that its true captions name, in the words
    of `synonyms`, by default those of COCO's classes (CHAIR, arXiv 1809.02156, which adds the classes that annotators
    have drawn: give these as `objects` to have them).
    """
    fields = [objects_of(sample) for sample in samples]
    if all(objects is None for objects in fields):
        vocabulary = Vocabulary(synonyms=coco_synonyms() if synonyms is None else synonyms)
        for number, sample in enumerate(samples):
            if texts := reference_captions(sample):
                names = dict.fromkeys(mention.name for text in texts for mention in vocabulary.mentions(text))
                fields[number] = [DepictedObject(name) for name in names]
    else:
        vocabulary = Vocabulary([objects for objects in fields if objects], synonyms)
    return [
        None if objects is None else vocabulary.judge(caption, objects)
        for caption, objects in zip(captions, fields, strict=True)
    ]


def reference_captions(sample: Sample) -> list[str]:
    """Return all captions known to be true of a sample, normalised as in training.

    These are its `references` field, or its captions where it has none. Raises `SourceError` when the field
    is neither a string nor a list of strings.
    """
    stated = caption_texts(sample.info.get("references"), f"{sample.shard}/{sample.key}: references")
    return [normalize_caption(text) for text in stated or sample.captions]


def objects_of(sample: Sample) -> list[DepictedObject] | None:
    """The `objects` field of a sample; None where it has none, or one of another format, such as boxes of a detector.

    Raises `SourceError` for objects with names that are not as docs/data.md says.
    """
    listed = sample.info.get("objects")
    if not isinstance(listed, list) or not all(
        isinstance(each, str) or (isinstance(each, dict) and "name" in each) for each in listed
    ):
        return None
    try:
        return [DepictedObject(each) if isinstance(each, str) else _depicted(each) for each in listed]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{sample.place}: `objects` must be as docs/data.md says: {error!r:.200}") from error


def _depicted(field: Mapping[str, Any]) -> DepictedObject:
    attributes, relations, count = field.get("attributes"), field.get("relations"), field.get("count")
    texts = [field["name"], *(field.get("synonyms") or ()), *(attributes or ())]
    held = [ObjectRelation(relation["phrase"], relation.get("to")) for relation in relations or ()]
    texts += [text for relation in held for text in relation if text is not None]
    if not all(isinstance(text, str) for text in texts) or type(count) not in (int, type(None)):
        raise ValueError(f"{field!r:.200}")
    return DepictedObject(
        field["name"],
        tuple(field.get("synonyms") or ()),
        count,
        None if attributes is None else tuple(attributes),
        None if relations is None else tuple(held),
        bool(field.get("stuff", False)),
    )
