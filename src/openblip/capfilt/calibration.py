"""Thresholds for a wanted precision or keep rate, and a learned mix of all scores, from labels of sampled texts.

The precision above a threshold is the mean, over all texts above it, of the probability that a text is true. This
probability is a logistic curve over the score, fitted to the labels with the weights of their strata (Platt scaling).
Intervals are of refits to labels drawn anew within the strata (the bootstrap).

n labels, R texts that represent the run, G bins of their scores, F features of the mix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from openblip.capfilt.folder import CapFiltFolder
from openblip.capfilt.labels import draw_texts, label_weights, labelled_rows, read_labels
from openblip.capfilt.statistics import Floats
from openblip.data.captions import read_texts, score_file, text_columns, write_score
from openblip.errors import ConfigError, MissingExtraError
from openblip.files import write_json
from openblip.metrics.intervals import Interval
from openblip.progress import Progress

MIX = "mix"
CALIBRATION_FILE = "calibration.json"
MIN_LABELS = 20  # that say yes or no
MIN_OF_EACH = 5  # that say yes, and that say no
NUM_POINTS = 4000
NUM_RESAMPLES = 300
NUM_FOLDS = 5
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)  # of the mix: the inverse of its regularisation, as scikit-learn's C
RIDGE = 0.08  # of the logistic curve, whose logits lie between -1 and 1
CUT = 1e-6  # probabilities are cut so far from 0 and 1 before their logit is taken
NO_FEATURES = frozenset({MIX, "index", "rank", "image_hash", "width", "height"})  # what no mix should depend on
IS_WEB, IS_MISSING = "is_web", " is missing"  # features that are no columns

Bools = NDArray[np.bool_]


class Threshold(NamedTuple):
    """A threshold of a score with what it keeps: texts strictly above it. Each with its 95 % interval, but for the
    share of all texts that is kept, which is counted.
    """

    threshold: Interval
    precision: Interval
    keep_rate: float


class Calibration(NamedTuple):
    """What labels say of a score: its AUC, by their weights, and the threshold that was asked for. None where no
    threshold has the precision; then `best` is the highest one that any has.
    """

    score: str
    auc: float
    chosen: Threshold | None
    best: float


@dataclass(frozen=True, kw_only=True)
class MixModel:
    """A logistic regression over scores: of each, the value is cut to a range, then standardised, and 0 where it is
    missing. For itm it is the logit.
    """

    columns: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    names: tuple[str, ...]
    """The features: columns, whether one is missing, and whether the text is from the web."""
    coefficients: tuple[float, ...] = ()
    intercept: float = 0.0

    @classmethod
    def describe(cls, texts: pa.Table, columns: Sequence[str]) -> "MixModel":
        """The features of columns, with ranges of `texts`; columns without a difference are left out."""
        kept, ranges, names = [], [], []
        for column in columns:
            values = _values(texts, column)
            known = np.isfinite(values)
            if not known.any():
                continue
            low, high = np.quantile(values[known], [0.005, 0.995])
            cut = np.clip(values[known], low, high)
            if cut.std() > 1e-9:
                kept.append(column)
                ranges.append((float(low), float(high), float(cut.mean()), float(cut.std())))
                names.append(column)
            if 0.005 < known.mean() < 0.995:
                names.append(column + IS_MISSING)
        if len(set(texts["source"].unique().to_pylist())) > 1:
            names.append(IS_WEB)
        low, high, mean, std = zip(*ranges, strict=True) if ranges else ((), (), (), ())
        return cls(columns=tuple(kept), low=low, high=high, mean=mean, std=std, names=tuple(names))

    def features(self, texts: pa.Table) -> Floats:
        """(R, F)."""
        found: dict[str, Floats] = {}
        for column in {name.removesuffix(IS_MISSING) for name in self.names} - {IS_WEB}:
            values = _values(texts, column)
            is_known = np.isfinite(values)
            found[column + IS_MISSING] = 1.0 - is_known
            if column in self.columns:
                place = self.columns.index(column)
                cut = np.clip(np.where(is_known, values, self.mean[place]), self.low[place], self.high[place])
                found[column] = np.where(is_known, (cut - self.mean[place]) / self.std[place], 0.0)
        found[IS_WEB] = np.asarray(pc.equal(texts["source"], "web").to_numpy(zero_copy_only=False), np.float64)
        return np.stack([found[name] for name in self.names], axis=1)

    def probability(self, texts: pa.Table) -> Floats:
        """That a text is true of its image (R,)."""
        logits = self.features(texts) @ np.array(self.coefficients) + self.intercept
        return np.asarray(0.5 + 0.5 * np.tanh(logits / 2))


class CalibrationSummary(NamedTuple):
    """What `calibrate` found: labels with an answer, the share of all texts that is true with its interval, of each
    score its calibration, and the mix with the importance of its features, the largest first; None without a mix.
    """

    num_labels: int
    num_unsure: int
    true_share: Interval
    scores: list[Calibration]
    mix: MixModel | None
    path: Path


def calibrate(
    directory: str | Path,
    labels: str | Path,
    *,
    precision: float | None = None,
    keep_rate: float | None = None,
    features: Sequence[str] | None = None,
    learn_mix: bool = True,
    seed: int = 0,
) -> CalibrationSummary:
    """Calibrate ITM, and a mix of all scores that is learned and written as the score `mix`, with labels of a run.

    Give a precision or a keep rate. features: the columns of the mix; by default all numbers and flags that every
    shard has. `calibration.json` has everything that is returned.

    Raises `ConfigError` for labels that are too few, all alike, or of another run.
    """
    if (precision is None) == (keep_rate is None):
        raise ConfigError("capfilt-calibrate: give either a precision or a keep rate")
    for name, share in (("precision", precision), ("keep-rate", keep_rate)):
        if share is not None and not 0 < share < 1:
            raise ConfigError(f"capfilt-calibrate: {name} is {share}; it is a share between 0 and 1")
    folder = CapFiltFolder(directory)
    everything = read_labels(labels)
    known = [label for label in everything if label.is_true is not None]
    truth = np.array([label.is_true for label in known], bool)
    smaller = int(min(truth.sum(), (~truth).sum())) if known else 0
    if len(known) < MIN_LABELS or smaller < MIN_OF_EACH:
        raise ConfigError(
            f"{labels} has {int(truth.sum())} texts with yes and {int((~truth).sum())} with no; it takes {MIN_LABELS} "
            f"answers, and {MIN_OF_EACH} of each. Label more texts: `openblip capfilt-sample {directory} --num-texts N`"
        )
    weights = label_weights(everything)[[label.is_true is not None for label in everything]]
    columns = feature_columns(folder, features)
    needed = list(dict.fromkeys(["source", "itm", *(columns if learn_mix else [])]))
    texts, labelled = draw_texts(directory, needed, seed=seed), labelled_rows(directory, known, needed)
    strata = np.array([label.stratum for label in known])
    scores = {"itm": (_numbers(texts, "itm"), _numbers(labelled, "itm"))}
    mix = None
    if learn_mix:
        mix, held_out = fit_mix(MixModel.describe(texts, columns), labelled, truth, weights, seed)
        scores[MIX] = (np.asarray(mix.probability(texts), np.float32).astype(np.float64), held_out)
        _write_mix(folder, mix)
    found, shares = [], []
    for name, (of_texts, of_labels) in scores.items():
        curve = PrecisionCurve.fit(of_texts, of_labels, truth, weights, strata, seed=seed)
        chosen = curve.at_precision(precision) if precision is not None else curve.at_keep_rate(keep_rate or 0.0)
        shares.append(curve.true_share())
        found.append(Calibration(name, weighted_auc(of_labels, truth, weights), chosen, curve.best()))
    summary = CalibrationSummary(
        len(known), len(everything) - len(known), shares[0], found, mix, folder.root / CALIBRATION_FILE
    )
    wanted = {"precision": precision, "keep_rate": keep_rate}
    write_json(summary.path, {**wanted, **_as_json(summary), "labels": [asdict(label) for label in everything]})
    return summary


def feature_columns(folder: CapFiltFolder, wanted: Sequence[str] | None = None) -> list[str]:
    """The columns of a mix: those wanted, or all numbers and flags of the run that could say something of a text."""
    shards = folder.done_shards()
    if not shards:
        raise ConfigError(f"{folder.root}: no shard is finished; run the same openblip capfilt command again")
    first = read_texts(folder.root, shards[0])
    common = set(first.column_names).intersection(*(text_columns(folder.root, shard) for shard in shards))
    numbers = [
        column.name
        for column in first.schema
        if column.name in common
        and (pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_boolean(column.type))
    ]
    if wanted is None:
        return [name for name in numbers if name not in NO_FEATURES and not name.endswith("_group")]
    if missing := [name for name in wanted if name not in numbers]:
        raise ConfigError(
            f"capfilt-calibrate: no number in every shard is called {', '.join(missing)}; there are "
            f"{', '.join(numbers)}. `openblip capfilt-score` adds columns"
        )
    return list(wanted)


def fit_mix(
    model: MixModel, labelled: pa.Table, truth: Bools, weights: Floats, seed: int = 0
) -> tuple[MixModel, Floats]:
    """A model with coefficients, and the probabilities (n,) that models which have not seen a label give it.

    The strength of the regularisation is the one with the least log-loss in cross-validation.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold
    except ImportError as error:
        raise MissingExtraError('a learned mix needs scikit-learn: pip install "openblip[capfilt]"') from error
    features = model.features(labelled)
    weights = weights * len(weights) / weights.sum()
    num_folds = min(NUM_FOLDS, int(truth.sum()), int((~truth).sum()))
    folds = list(StratifiedKFold(num_folds, shuffle=True, random_state=seed).split(features, truth))
    best: tuple[float, float, Floats] | None = None
    for strength in STRENGTHS:
        held_out = np.empty(len(truth))
        for train, test in folds:
            fitted = LogisticRegression(C=strength, max_iter=1000).fit(features[train], truth[train], weights[train])
            held_out[test] = fitted.predict_proba(features[test])[:, 1]
        of_truth = np.clip(np.where(truth, held_out, 1 - held_out), CUT, 1)
        loss = float(-(weights * np.log(of_truth)).mean())
        if best is None or loss < best[0]:
            best = loss, strength, held_out
    assert best is not None
    fitted = LogisticRegression(C=best[1], max_iter=1000).fit(features, truth, weights)
    learned = asdict(model) | {
        "coefficients": tuple(fitted.coef_[0].tolist()),
        "intercept": float(fitted.intercept_[0]),
    }
    return MixModel(**learned), best[2]


@dataclass(frozen=True, kw_only=True)
class PrecisionCurve:
    """The precision above each threshold, as labels say it, and as labels that are drawn anew within strata do."""

    thresholds: Floats  # (G,), rising; the first keeps all texts
    keep_rates: Floats  # (G,)
    precisions: Floats  # (G,)
    resampled: Floats  # (NUM_RESAMPLES, G)

    @classmethod
    def fit(
        cls,
        of_texts: Floats,
        of_labels: Floats,
        truth: Bools,
        weights: Floats,
        strata: NDArray[np.int64],
        *,
        seed: int = 0,
        num_resamples: int = NUM_RESAMPLES,
    ) -> "PrecisionCurve":
        """of_texts: (R,) probabilities; of_labels: (n,)."""
        edges = np.unique(np.quantile(of_texts, np.linspace(0, 1, NUM_POINTS + 1), method="lower"))
        bins = np.searchsorted(edges, of_texts, side="left")  # bin i has what is above edge i - 1, up to edge i
        counts = np.bincount(bins, minlength=len(edges))  # (G,)
        middles = np.bincount(bins, weights=_logit(of_texts), minlength=len(edges)) / np.maximum(counts, 1)
        above = np.cumsum(counts[::-1])[::-1]  # (G,) texts in this bin and above it
        rng = np.random.default_rng([seed, len(truth)])
        resamples = [(np.arange(len(truth)), np.ones(len(truth)))]
        resamples += [_redraw(strata, rng) for _ in range(num_resamples)]
        curves = []
        logits = _logit(of_labels)
        for rows, factors in resamples:
            slope, intercept = _fit_logistic(logits[rows], truth[rows], weights[rows] * factors)
            probability = 0.5 + 0.5 * np.tanh((slope * middles + intercept) / 2)  # (G,)
            curves.append(np.cumsum((counts * probability)[::-1])[::-1] / above)
        # What is in bin i and above is strictly above edge i - 1; everything is above what no text is below.
        thresholds = np.concatenate([[0.0 if edges[0] > 0 else -1.0], edges[:-1]])
        return cls(
            thresholds=thresholds,
            keep_rates=above / len(of_texts),
            precisions=curves[0],
            resampled=np.array(curves[1:]) if num_resamples else np.array(curves),
        )

    def at_precision(self, wanted: float) -> Threshold | None:
        """The lowest threshold of that precision; None where none has it."""
        place = self._first(self.precisions, wanted)
        if place is None:
            return None
        of_resamples = [self._first(curve, wanted) for curve in self.resampled]
        last = len(self.thresholds) - 1
        ends = np.quantile(self.thresholds[[last if each is None else each for each in of_resamples]], [0.025, 0.975])
        return self._threshold(place, ends)

    def at_keep_rate(self, wanted: float) -> Threshold:
        """The highest threshold that keeps at least so many of all texts; it is counted, not estimated."""
        place = int(np.flatnonzero(self.keep_rates >= wanted)[-1])
        return self._threshold(place, np.repeat(self.thresholds[place], 2))

    def true_share(self) -> Interval:
        """The share of all texts that is true."""
        low, high = np.quantile(self.resampled[:, 0], [0.025, 0.975])
        return Interval(float(self.precisions[0]), float(low), float(high))

    def best(self) -> float:
        """The highest precision of any threshold that keeps more than a text in a thousand."""
        return float(self.precisions[self.keep_rates > 0.001].max())

    def _first(self, curve: Floats, wanted: float) -> int | None:
        places = np.flatnonzero((curve >= wanted) & (self.keep_rates > 0.001))
        return int(places[0]) if len(places) else None

    def _threshold(self, place: int, ends: Floats) -> Threshold:
        value = max(float(self.thresholds[place]), 0.0)
        low, high = np.quantile(self.resampled[:, place], [0.025, 0.975])
        return Threshold(
            Interval(value, min(max(float(ends[0]), 0.0), value), max(float(ends[1]), value)),
            Interval(float(self.precisions[place]), float(low), float(high)),
            float(self.keep_rates[place]),
        )


def weighted_auc(scores: Floats, truth: Bools, weights: Floats) -> float:
    """How probably a true text scores above one that is not, both drawn with their weights; a tie counts half."""
    positive, negative = scores[truth], scores[~truth]
    wins = (positive[:, None] > negative).astype(np.float64) + 0.5 * (positive[:, None] == negative)
    pairs = weights[truth][:, None] * weights[~truth]
    return float((wins * pairs).sum() / pairs.sum())


def _fit_logistic(logits: Floats, truth: Bools, weights: Floats) -> tuple[float, float]:
    """Slope and intercept of the probability of truth over a score's logit (Platt, 1999), by Newton's method.

    A slight pull towards 0 keeps the slope finite where a threshold divides the labels without a mistake. The slope is
    not negative.
    """
    weights = weights * len(weights) / weights.sum()
    scale = max(float(np.abs(logits).max()), 1e-9)
    design = np.stack([logits / scale, np.ones(len(logits))], axis=1)  # (n, 2)
    solution = np.zeros(2)
    for _ in range(50):
        probability = 0.5 + 0.5 * np.tanh(design @ solution / 2)
        gradient = design.T @ (weights * (truth - probability)) - RIDGE * solution
        curvature = design.T @ (design * (weights * probability * (1 - probability))[:, None]) + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        solution = solution + np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-8:
            break
    return max(float(solution[0]) / scale, 0.0), float(solution[1])


def _redraw(strata: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.int64], Floats]:
    """Labels drawn anew, with replacement, one fewer from each stratum, and factors for their weights. So they vary as
    labels that are drawn from all texts do (Rao and Wu, 1988). A stratum with one label is drawn with the next.
    """
    order = np.argsort(strata, kind="stable")
    merged: list[NDArray[np.int64]] = []
    for group in np.split(order, np.flatnonzero(np.diff(strata[order])) + 1):
        if merged and min(len(group), len(merged[-1])) < 2:
            merged[-1] = np.concatenate([merged[-1], group])
        else:
            merged.append(group)
    rows = [rng.choice(group, len(group) - 1) for group in merged]
    factors = [np.full(len(group) - 1, len(group) / (len(group) - 1)) for group in merged]
    return np.concatenate(rows), np.concatenate(factors)


def _write_mix(folder: CapFiltFolder, mix: MixModel) -> None:
    """Write the score `mix` of every finished shard, and what it was made with beside it. Earlier values are removed
    first, so that those of two models never count as one score.
    """
    shards = folder.done_shards()
    for shard in shards:
        score_file(folder.root, MIX, shard, "report.json").unlink(missing_ok=True)
    write_json(folder.root / "scores" / MIX / "model.json", asdict(mix))
    needed = {name.removesuffix(IS_MISSING) for name in mix.names} - {IS_WEB} | {"source"}
    settings = {"score": MIX, "columns": list(mix.columns), "coefficients": list(mix.coefficients)}
    with Progress("writing mix", total=len(shards), unit="shards") as bar:
        for shard in shards:
            texts = read_texts(folder.root, shard, sorted(needed))
            values = pa.array(mix.probability(texts), pa.float32())
            write_score(folder.root, shard, MIX, values)
            report = {"shard": shard, "score": MIX, "rows": len(values), "settings": settings}
            write_json(score_file(folder.root, MIX, shard, "report.json"), {**report, "openblip": version("openblip")})
            bar.advance()


def _values(texts: pa.Table, column: str) -> Floats:
    """A column as numbers (R,), NaN where there is none; ITM as its logit."""
    return _logit(_numbers(texts, column)) if column == "itm" else _numbers(texts, column)


def _numbers(texts: pa.Table, column: str) -> Floats:
    kind = pa.int8() if pa.types.is_boolean(texts[column].type) else pa.float64()  # flags have no cast to float64
    return np.asarray(pc.cast(pc.cast(texts[column], kind), pa.float64()).to_numpy(), np.float64)


def _logit(probability: Floats) -> Floats:
    cut = np.clip(probability, CUT, 1 - CUT)
    return np.asarray(np.log(cut) - np.log1p(-cut))


def _as_json(summary: CalibrationSummary) -> dict[str, Any]:
    """What is found, as names and numbers."""

    def chosen(threshold: Threshold | None) -> Mapping[str, Any] | None:
        if threshold is None:
            return None
        parts = {"threshold": threshold.threshold._asdict(), "precision": threshold.precision._asdict()}
        return {**parts, "keep_rate": threshold.keep_rate}

    return {
        "num_labels": summary.num_labels,
        "num_unsure": summary.num_unsure,
        "true_share": summary.true_share._asdict(),
        "scores": {
            each.score: {"auc": each.auc, "best_precision": each.best, "chosen": chosen(each.chosen)}
            for each in summary.scores
        },
        "mix": None if summary.mix is None else asdict(summary.mix),
    }
