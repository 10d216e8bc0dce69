"""How well a filter tells true captions from noise, where the truth is known (BLIP section 3.3). N texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from openblip.data.captions import read_judged
from openblip.data.reader import read_source
from openblip.data.sample import Reject, Sample, Source
from openblip.data.sources import open_source
from openblip.data.sources.capfilt import CapFiltSource
from openblip.data.texts import normalize_caption
from openblip.errors import SourceError
from openblip.evaluation.captioning import reference_captions
from openblip.evaluation.run import require_caption, run_evaluation
from openblip.metrics.calibration import calibration_report
from openblip.metrics.ranking import auc, average_precision, filter_curve, filter_quality
from openblip.predictor import BasePredictor
from openblip.text_counts import count_texts, warn_caller

TRUTH_FIELDS = {"noise", "references"}  # of samples that say what is true of them, as emoji scenes do


@count_texts(warn_caller)
def evaluate_filter(
    predictor: BasePredictor,
    source: Source,
    *,
    threshold: float = 0.5,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Return how well P(match) of each image with its first caption tells true captions from noise.

    `scores` has areas of ITM and, where the model has it, of ITC, and `curves` their ROC and precision-recall curves.
    `calibration` says how far P(match) is the probability that the caption is true. A sample says in its `noise` field
    whether the caption is true (null) or which kind of noise it is. Raises `SourceError` when no sample does.
    """

    has_itc = "similarity" in predictor.tasks

    def predict(samples: list[Sample]) -> list[dict[str, float]]:
        images, texts = [sample.image for sample in samples], [sample.captions[0] for sample in samples]
        if not has_itc:
            return [{"itm": itm} for itm in predictor.match(images, texts, batch_size).tolist()]
        scored = predictor.score_texts(images, [[text] for text in texts], batch_size)
        return [score._asdict() for (score,) in scored]

    def check_sample(sample: Sample) -> None:
        require_caption(sample)
        if "noise" not in sample.info:
            raise SourceError("no `noise` field, so the truth is not known")
        kind = sample.info["noise"]
        if kind is not None and not isinstance(kind, str):
            raise SourceError(f"`noise` must be null for a true caption or the kind of noise, not {kind!r:.80}")

    run = run_evaluation(source, predict, label="matching", check_sample=check_sample, limit=limit)
    kinds = [sample.info["noise"] for sample in run.samples]
    by_name = {name: np.array([row[name] for row in run.results]) for name in run.results[0]}
    clean = np.array([kind is None for kind in kinds])
    scores = filter_report(by_name["itm"], kinds, threshold)
    scores["scores"] = {
        name: {"auc": auc(values, clean), "average_precision": average_precision(values, clean)}
        for name, values in by_name.items()
    }
    scores["calibration"] = calibration_report(by_name["itm"].tolist(), clean.tolist())
    curves = {name: curve.points() for name, values in by_name.items() if (curve := filter_curve(values, clean))}
    return run.report({"num_pairs": len(kinds)}, scores, curves=curves)


def filter_report(scores: NDArray[np.float64], kinds: Sequence[str | None], threshold: float) -> dict[str, Any]:
    """Return AUC, average precision, precision, recall and noise before and after, and the AUC on each kind of noise.

    scores: (N,) P(match); kinds: for each text its kind of noise, None for a true one. A value that is not
    defined (the precision of a filter that keeps nothing) is None.
    """
    clean = np.array([kind is None for kind in kinds])
    by_kind = {}
    for kind in sorted({kind for kind in kinds if kind is not None}):
        rows = clean | np.array([other == kind for other in kinds])
        by_kind[kind] = auc(scores[rows], clean[rows])
    quality = filter_quality(scores, clean, threshold)
    areas = {"auc": auc(scores, clean), "average_precision": average_precision(scores, clean)}
    return {"threshold": threshold, **areas, **quality, "auc_by_kind": by_kind}


class KnownTruth(NamedTuple):
    """What a sample says is true of it: the kind of noise in its web text, None for a true one, and true captions."""

    noise: str | None
    references: frozenset[str]

    def holds_for(self, source: str, caption: str) -> bool:
        """Whether a text of a CapFilt run is true."""
        return self.noise is None if source == "web" else normalize_caption(caption) in self.references


def known_truth(sample: Sample) -> KnownTruth | None:
    """What is known to be true of a sample; None where it does not say."""
    if not sample.info.keys() >= TRUTH_FIELDS:
        return None
    return KnownTruth(sample.info["noise"], frozenset(reference_captions(sample)))


# A CapFilt run whose source says what is true
def has_ground_truth(directory: str | Path) -> bool:
    """Whether the samples of a CapFilt run's source say what is true of them."""
    run = CapFiltSource.open(f"capfilt:{directory}", str(directory), open_source)
    for entry in read_source(run.original, lambda sample: None, shards=run.shards()[:1]):
        if not isinstance(entry, Reject):
            return entry[0].info.keys() >= TRUTH_FIELDS
    return False


def measure_capfilt(directory: str | Path) -> dict[str, Any]:
    """Return the noise before and after a CapFilt run, and how well its filter told true texts from others.

    A web text is true when its sample says `noise: null`; a synthetic one when it is among the sample's `references`.
    The bootstrapped set is every kept text of both sources. Raises `SourceError` when a sample cannot be read, or does
    not say what is true of it.
    """
    run = CapFiltSource.open(f"capfilt:{directory}", str(directory), open_source)
    web: list[tuple[float, str | None]] = []  # P(match) and kind of noise
    synthetic: list[tuple[float, bool]] = []  # P(match) and whether the text is true
    is_kept: dict[str, list[bool]] = {"web": [], "synthetic": []}
    for shard in run.shards():
        rows_by_key: dict[str, list[dict[str, Any]]] = {}
        for row in read_judged(directory, shard, run.decision, ["key", "source", "caption", "itm"]).to_pylist():
            rows_by_key.setdefault(row["key"], []).append(row)
        for entry in read_source(run.original, reference_captions, shards=[shard]):
            if isinstance(entry, Reject):
                if entry.key in rows_by_key:
                    raise SourceError(f"{run.original.name}: {shard}/{entry.key}: {entry.reason}")
                continue
            sample, true_captions = entry
            for row in rows_by_key.pop(sample.key, []):
                if not sample.info.keys() >= TRUTH_FIELDS:
                    raise SourceError(f"{run.original.name}: {shard}/{sample.key} does not say what is true of it.")
                is_kept[row["source"]].append(row["kept"])
                if row["source"] == "web":
                    web.append((row["itm"], sample.info["noise"]))
                else:
                    synthetic.append((row["itm"], normalize_caption(row["caption"]) in true_captions))
        if rows_by_key:
            raise SourceError(f"{run.original.name}: {shard}/{next(iter(rows_by_key))} is no longer there.")
    kinds = [kind for _, kind in web]
    itm = np.array([score for score, _ in [*web, *synthetic]])
    clean = np.array([*(kind is None for kind in kinds), *(is_true for _, is_true in synthetic)])
    of_web = filter_report(itm[: len(web)], kinds, 0.5) | {"threshold": run.decision.threshold}
    # As scores of 0 and 1, since a decision need not be a threshold of ITM
    of_web |= filter_quality(np.array(is_kept["web"], float), clean[: len(web)], 0.5)
    of_synthetic: dict[str, Any] = {"num_texts": len(synthetic)}
    if synthetic:
        scores, is_true = itm[len(web) :], clean[len(web) :]
        quality = filter_quality(np.array(is_kept["synthetic"], float), is_true, 0.5)
        of_synthetic |= {"correct": float(is_true.mean()), "correct_kept": quality["precision"]}
        of_synthetic |= {"recall": quality["recall"], "auc": auc(scores, is_true)}
    kept = np.array([*is_kept["web"], *is_kept["synthetic"]], bool)
    return {
        "num_images": len(web),
        "web": of_web,
        "synthetic": of_synthetic,
        "noise_before": float(1 - clean[: len(web)].mean()),
        "noise_after": float(1 - clean[kept].mean()) if kept.any() else None,
        "num_kept": int(kept.sum()),
        "num_texts": len(itm),
    }
