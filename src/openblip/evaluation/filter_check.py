"""Whether a filter can tell an image's own caption from another image's, measured on clean pairs before it is used.

N pairs of an image and its caption, I images of a batch.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openblip.data.images import Pixels, read_image
from openblip.data.reader import in_batches, items_without_images, read_source
from openblip.data.sample import Reject, Sample, Source
from openblip.data.texts import normalize_caption
from openblip.errors import SourceError
from openblip.files import hash_int
from openblip.metrics.intervals import Interval, auc_interval, share_interval
from openblip.metrics.ranking import FilterCurve, auc, average_precision, filter_curve
from openblip.models.blip import similarity_matrix
from openblip.predictor import BasePredictor
from openblip.progress import Progress

MOST_PAIRS = 2000  # that are scored: the interval of an AUC of 0.9 is then 0.02 wide
MOST_SEEN = 200_000  # samples among which they are chosen
OTHERS = ("random", "hard")  # captions that own ones are told from
_DRAWS = 20  # of a random caption, before an image counts as one whose caption all others have too


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedPair:
    """An image with its own caption, a random image's and the one of all others that ITC finds closest, each with its
    ITM score. A caption that does not differ from the image's own, after normalisation, is no other image's.
    """

    key: str
    shard: str
    caption: str
    random_caption: str | None
    hard_caption: str | None
    own: float
    random: float | None
    hard: float | None
    own_itc: float | None = None
    """Cosines by ITC; None in checks from before they were kept."""
    random_itc: float | None = None
    hard_itc: float | None = None

    def scores(self, against: str, score: str) -> tuple[float, float] | None:
        """The `score` ("itm" or "itc") of the own caption and of the other one, None where there is no other."""
        ending = "" if score == "itm" else f"_{score}"
        own, other = getattr(self, f"own{ending}"), getattr(self, f"{against}{ending}")
        return None if own is None or other is None else (own, other)


def choose_pairs(source: Source, limit: int = MOST_PAIRS) -> list[Sample]:
    """At most `limit` samples with a caption, one of each image, without their images: those whose ids have the
    smallest hashes, so that the choice does not depend on the order of the source.
    """
    largest: list[tuple[int, int, Sample]] = []  # a heap of (minus hash, number, sample)
    chosen: set[str] = set()
    for number, sample in enumerate(_captioned(source)):
        if number >= MOST_SEEN:
            break
        if sample.image_id in chosen:
            continue
        rank = hash_int(f"check/{sample.image_id.removeprefix(source.image_id_prefix(sample.shard))}")
        if len(largest) < limit:
            heapq.heappush(largest, (-rank, -number, sample))
        elif -rank > largest[0][0]:
            chosen.remove(heapq.heapreplace(largest, (-rank, -number, sample))[2].image_id)
        else:
            continue
        chosen.add(sample.image_id)
    return [sample for _, _, sample in sorted(largest, key=lambda entry: -entry[1])]


def count_pairs(source: Source, enough: int) -> int:
    """How many images of a source have a caption; no further than `enough`."""
    images: set[str] = set()
    for sample in _captioned(source):
        images.add(sample.image_id)
        if len(images) >= enough:
            break
    return len(images)


def _captioned(source: Source) -> Iterator[Sample]:
    return (item for item in items_without_images(source) if isinstance(item, Sample) and item.captions)


def score_pairs(
    predictor: BasePredictor, source: Source, pairs: Sequence[Sample], *, batch_size: int = 64, seed: int = 0
) -> tuple[list[CheckedPair], list[Reject]]:
    """Score the first caption of each of `pairs`, and two captions of others, against its image.

    Captions of all images are embedded first, so that an image is read once: the hard caption is the one that has the
    largest ITC similarity with it, as in the training of ITM (BLIP section 3.2). It may be true by chance, a random
    one hardly ever. Images that cannot be read are rejects. Raises `SourceError` when no image can be read.
    """
    captions = [pair.captions[0] for pair in pairs]
    normalized = np.array([normalize_caption(caption) for caption in captions])  # (N,)
    vectors = predictor.embed_texts(captions, batch_size)  # (N, E)
    numbers = {(pair.shard, pair.key): number for number, pair in enumerate(pairs)}
    rng = np.random.default_rng([seed, len(pairs)])
    random_numbers = [_random_other(normalized, number, rng) for number in range(len(pairs))]

    def prepare(sample: Sample) -> Pixels:
        with read_image(sample.image, name=sample.place) as image:
            return predictor.preprocessing(image)

    checked: list[CheckedPair] = []
    rejects: list[Reject] = []
    shards = list(dict.fromkeys(pair.shard for pair in pairs))
    entries = read_source(source, prepare, shards=shards, skip=lambda shard, key: (shard, key) not in numbers)
    with Progress("checking the filter", total=len(pairs), unit="images") as bar:
        for batch in in_batches(entries, batch_size):
            rejects += [reject for reject in batch.rejects if (reject.shard, reject.key) in numbers]
            if batch.samples:
                images = predictor.encode(predictor.stack([pixels for _, pixels in batch.samples]), batch_size)
                similarity = similarity_matrix(predictor.embed_images(images, batch_size), vectors)  # (I, N)
                chosen: list[tuple[int, int | None, int | None]] = []  # own, random and hard one of each image
                for (sample, _), row in zip(batch.samples, similarity.numpy(), strict=True):
                    number = numbers[sample.shard, sample.key]
                    others = np.where(normalized == normalized[number], -np.inf, row)
                    hard = int(others.argmax()) if np.isfinite(others).any() else None
                    chosen.append((number, random_numbers[number], hard))
                texts = [[captions[i] for i in own_and_others if i is not None] for own_and_others in chosen]
                scores = predictor.score_texts(images, texts, batch_size=batch_size)
                for (number, random, hard), image_scores in zip(chosen, scores, strict=True):
                    scored = iter(image_scores)
                    own = next(scored)
                    of_random = None if random is None else next(scored)
                    of_hard = None if hard is None else next(scored)
                    checked.append(
                        CheckedPair(
                            key=pairs[number].key,
                            shard=pairs[number].shard,
                            caption=captions[number],
                            random_caption=None if random is None else captions[random],
                            hard_caption=None if hard is None else captions[hard],
                            own=own.itm,
                            random=of_random and of_random.itm,
                            hard=of_hard and of_hard.itm,
                            own_itc=own.itc,
                            random_itc=of_random and of_random.itc,
                            hard_itc=of_hard and of_hard.itc,
                        )
                    )
            bar.advance(len(batch.samples) + len(batch.rejects))
    if not checked:
        raise SourceError(f"{source.name}: no image of it can be read" + "".join(f"; {each}" for each in rejects[:3]))
    return checked, rejects


def _random_other(normalized: "np.ndarray[Any, Any]", number: int, rng: np.random.Generator) -> int | None:
    """The number of a random pair whose caption differs."""
    for other in rng.integers(len(normalized), size=_DRAWS):
        if normalized[other] != normalized[number]:
            return int(other)
    return None


def check_report(checked: Sequence[CheckedPair], threshold: float) -> dict[str, Any]:
    """How well the filter tells own captions from others, each value with the ends of its 95 % interval.

    `random` and `hard` each have the `auc` of ITM and that of ITC (`itc_auc`), and the `precision` of ITM at the
    threshold among as many own captions as others, and over all thresholds (`average_precision`, a number). `recall` is
    the share of own captions that are kept. A value of nothing is None.
    """
    own = np.array([pair.own for pair in checked], np.float64)
    recall = share_interval(int((own > threshold).sum()), len(own))
    report: dict[str, Any] = {"threshold": threshold, "num_pairs": len(checked), "recall": _named(recall)}
    for kind in OTHERS:
        scores, clean = compared_scores(checked, kind, "itm")
        kept_own, kept_others = (int((scores[clean == is_own] > threshold).sum()) for is_own in (True, False))
        report[kind] = {
            "num_pairs": len(scores) // 2,
            "auc": _named(_area(scores, clean)),
            "precision": _named(share_interval(kept_own, kept_own + kept_others)),
            "average_precision": average_precision(scores, clean),
            "itc_auc": _named(_area(*compared_scores(checked, kind, "itc"))),
        }
    return report


def check_curves(checked: Sequence[CheckedPair]) -> dict[str, dict[str, FilterCurve]]:
    """The ROC and precision-recall curves of ITM and ITC, by what own captions are told from ("random", "hard")."""
    return {
        kind: {
            score: curve
            for score in ("itm", "itc")
            if (curve := filter_curve(*compared_scores(checked, kind, score))) is not None
        }
        for kind in OTHERS
    }


def compared_scores(
    checked: Sequence[CheckedPair], against: str, score: str
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The scores (2N,) of own captions and then of as many others, and which are own."""
    pairs = [scores for pair in checked if (scores := pair.scores(against, score)) is not None]
    return np.array(pairs, np.float64).reshape(-1, 2).T.ravel(), np.repeat([True, False], len(pairs))


def _area(scores: NDArray[np.float64], clean: NDArray[np.bool_]) -> Interval | None:
    value = auc(scores, clean)
    return None if value is None else auc_interval(value, len(scores) // 2, len(scores) // 2)


def _named(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else {name: round(value, 6) for name, value in interval._asdict().items()}
