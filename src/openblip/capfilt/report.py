"""`report.html` of a CapFilt run, made anew from the run's folder and the original images.

One file that loads nothing from elsewhere. `page.html` is its template: every text that comes from data is escaped, and
a Content-Security-Policy lets only the page's own script and styles run, by their hashes. The page is complete without
its script, which adds sliders and filters. Its size and the time that it takes are bounded, whatever the run.
"""

import base64
import hashlib
import io
import json
import shlex
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from openblip.capfilt import charts, statistics
from openblip.capfilt.charts import Chart, Curve, Tick, at_x, at_y
from openblip.capfilt.folder import NUM_STEPS, SCORED, SOURCES, CapFiltFolder, RunScores, SourceScores, itm_bins
from openblip.capfilt.statistics import RejectedReason, TextSample, TextStatistics
from openblip.data.captions import read_judged
from openblip.data.config import SourceOptions
from openblip.data.decision import Decision
from openblip.data.images import read_image
from openblip.data.reader import read_source
from openblip.data.sample import Reject, Sample
from openblip.data.sources import open_source
from openblip.errors import OpenBlipError
from openblip.evaluation.filter_check import CheckedPair, check_curves
from openblip.evaluation.filtering import KnownTruth, known_truth
from openblip.files import hash_int, read_json, write_text
from openblip.metrics.ranking import FilterCurve, auc, average_precision, filter_curve

MAX_LISTED = 50  # kinds of rejects, and unfinished shards
MAX_CHARS = 300  # of a text, a name or a setting that is shown
MAX_TEXTS = 8  # of an image that are shown
MAX_SCORES = 16  # that have charts
MAX_CURVES = 8  # of the scores with the largest AUC
MAX_JOINT = 6  # that are drawn against each other
MORE_SCORES = 5  # that stand beside ITM and ITC at the texts of an image
IMAGES_PER_FATE = 12
BORDERLINE_IMAGES, MOST_BORDERLINE = 24, 0.2  # so many, with an ITM at most so far from the threshold
INSPECTED_SHARDS, INSPECTED_IMAGES = 8, 1000  # of the source: its images are read at most so far into so many shards
THUMBNAIL_SIZES = (360, 240, 120)  # the largest whose file is small enough is taken
THUMBNAIL_BYTES = 40_000
NOTHING = "\N{EN DASH}"
NAMES = {"web": "Web", "synthetic": "Synthetic"}
SCORE_NAMES = {"itm": "ITM probability", "itc": "ITC cosine", "logprob": "log-probability"}
Fate = tuple[bool | None, bool | None]
FATES: dict[Fate, str] = {  # of an image: whether its first web and its first synthetic text are kept, None without one
    (False, True): "Only synthetic accepted",
    (True, True): "Both accepted",
    (True, False): "Only web accepted",
    (False, False): "Both rejected",
    (None, True): "No web text, synthetic accepted",
    (None, False): "No web text, synthetic rejected",
}


class ReportTable(NamedTuple):
    """A table of the page; its cells are escaped. `numbers` are the columns that are aligned to the right."""

    headers: Sequence[str]
    rows: Sequence[Sequence[object]]
    numbers: Collection[int] = ()


def write_report(
    directory: str | Path, *, extra_tables: Mapping[str, Sequence[ReportTable]] | None = None
) -> RunScores:
    """Write `DIR/report.html` of a run, finished or not, and return the scores that it shows.

    extra_tables: sections by title, shown after the keep rates, for callers that know more, such as the ground truth
    about the noise. Raises `ConfigError` when the folder is not the output of a CapFilt run.
    """
    folder = CapFiltFolder(directory)
    manifest = folder.read_manifest()
    shards = folder.done_shards()
    decision = Decision.of_manifest(manifest)
    scores = RunScores()
    for shard in shards:
        scores.add_shard(read_judged(folder.root, shard, decision, SCORED))
    sample = statistics.draw_sample(shards, scores.texts, lambda shard: read_judged(folder.root, shard, decision))
    inspected = inspect_images(folder, manifest)
    thresholds = {name: decision.threshold_of(name) for name in SOURCES}
    work = ShardReports.read(folder, shards)
    loader = PackageLoader("openblip.capfilt", "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "text": escape,
        "whole_text": lambda text: escape(text, len(text)),
        "short": lambda number: f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}",
    }
    style, script = (loader.get_source(environment, name)[0] for name in ("page.css", "page.js"))
    page = environment.get_template("page.html").render(
        style=Markup(style),
        script=Markup(script),
        policy=Markup(content_policy(style, script)),
        manifest=manifest,
        decision=decision,
        only_thresholds=decision.has_only_thresholds,
        scores=scores,
        thresholds=thresholds,
        command=f"openblip capfilt-select {shlex.quote(str(directory))}",
        keep_numbers=json.dumps(keep_numbers(scores, inspected)),
        num_steps=NUM_STEPS,
        keep_chart=keep_chart(scores),
        keep_table=keep_table(scores),
        sampled="" if sample.share == 1 else f" · of {len(sample):,} texts, drawn by hash",
        histograms=list(itm_histograms(scores, thresholds)),
        **score_charts(sample),
        check=filter_check(folder, manifest),
        roc=roc_charts(inspected),
        noise=noise_table(inspected),
        num_judged=len(inspected.judged),
        labels=label_table(sample),
        texts=text_tables(sample),
        extra_tables=extra_tables or {},
        work=work,
        num_done=len(shards),
        failures=[(failure["shard"], failure["error"]) for failure in folder.failures()],
        gallery=inspected.images,
        fates=FATES,
        fate_rows=list(fate_rows(scores)),
        images_per_fate=IMAGES_PER_FATE,
        frame=charts,
        names=NAMES,
        nothing=NOTHING,
        max_listed=MAX_LISTED,
        max_texts=MAX_TEXTS,
        more_scores=[name for name in inspected.score_names if name not in ("itm", "itc")][:MORE_SCORES],
        provenance=provenance(manifest, work),
        manifest_text=json.dumps(manifest, indent=2, ensure_ascii=False)[: 100 * MAX_CHARS],
    )
    write_text(folder.report_page, page.lstrip())
    return scores


def escape(value: object, max_chars: int = MAX_CHARS) -> Markup:
    """Any text as inert HTML: markup is escaped, control characters become visible, overrides of the writing direction
    end with the text, and a long text is cut. None is a dash."""
    text = NOTHING if value is None else str(value)
    if len(text) > max_chars:
        text = f"{text[:max_chars]}… ({len(text):,} characters)"
    is_hidden = {char for char in set(text) - {"\n"} if unicodedata.category(char) in {"Cc", "Cs"}}
    shown = "".join("\ufffd" if char in is_hidden else char for char in text)
    return Markup("<bdi>{}</bdi>").format(shown)


def content_policy(style: str, script: str) -> str:
    """A Content-Security-Policy under which nothing but this style, this script and the page's own images is used."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    of_style, of_script = (f"'sha256-{digest}'" for digest in hashes)
    nothing = "default-src 'none'; base-uri 'none'; form-action 'none'"
    return f"{nothing}; img-src data:; style-src {of_style}; script-src {of_script}"


# Keep rates at any threshold


def keep_numbers(scores: RunScores, inspected: "InspectedImages") -> dict[str, dict[str, list[int]]]:
    """Of each source the texts in every bin of ITM, and where the truth is known also the true and the false ones."""
    numbers = {name: {"texts": source.histogram.tolist()} for name, source in scores.sources.items()}
    for name, of_source in numbers.items():
        rows = [row for row in inspected.judged_rows() if row["source"] == name]
        if rows:
            bins = itm_bins(np.array([row["itm"] for row in rows]))
            is_true = np.array([row["is_true"] for row in rows], bool)
            for truth in (True, False):
                counts = np.bincount(bins[is_true == truth], minlength=NUM_STEPS + 1)
                of_source["true" if truth else "false"] = counts.tolist()
    return numbers


def _kept_above(source: SourceScores) -> NDArray[np.float64]:
    """The share of a source's texts above each threshold (NUM_STEPS + 1,)."""
    above = source.texts - np.cumsum(source.histogram)
    return np.asarray(above / max(source.texts, 1), np.float64)


def keep_chart(scores: RunScores) -> Chart:
    """The share of texts that each threshold keeps."""
    thresholds = np.linspace(0, 1, NUM_STEPS // 5 + 1)
    lines = [
        Curve(NAMES[name], name, charts.line_path(at_x(thresholds), at_y(_kept_above(source)[::5])))
        for name, source in scores.sources.items()
        if source.texts
    ]
    return Chart(
        title="Texts kept",
        detail="by ITM threshold",
        label="Share of the texts of each source that an ITM threshold from 0 to 1 keeps",
        x_ticks=charts.ticks_of(0, 1, at_x),
        y_ticks=charts.share_ticks(),
        lines=lines,
    )


def keep_table(scores: RunScores) -> ReportTable:
    """What round thresholds keep."""
    rows = []
    for threshold in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99):
        shares = [_kept_above(source)[round(threshold * NUM_STEPS)] for source in scores.sources.values()]
        kept = sum(round(s * source.texts) for s, source in zip(shares, scores.sources.values(), strict=True))
        rows.append((f"{threshold:g}", *(f"{share:.1%}" for share in shares), f"{kept:,}"))
    return ReportTable(("Threshold", "Web kept", "Synthetic kept", "Pairs"), rows, numbers=(0, 1, 2, 3))


# Scores


def itm_histograms(scores: RunScores, thresholds: Mapping[str, float | None]) -> Iterator[Chart]:
    """ITM of every text of the run, by source, in bins that are wide enough to see."""
    per_bin = NUM_STEPS // statistics.NUM_BINS
    for name, source in scores.sources.items():
        texts, kept = (
            np.append(each[: per_bin + 1].sum(), each[per_bin + 1 :].reshape(-1, per_bin).sum(axis=1))
            for each in (source.histogram, source.kept_histogram)
        )
        threshold = thresholds[name]
        mark = None if threshold is None else Tick(float(at_x(threshold)), f"threshold {threshold:g}")
        yield charts.histogram(NAMES[name], texts, kept, 0, 1, name=SCORE_NAMES["itm"], mark=mark)


def score_charts(sample: TextSample) -> dict[str, Any]:
    """Histograms of every score but ITM, and densities of pairs of scores, those with ITM first, by source."""
    names = sample.score_names()[:MAX_SCORES]
    ends = {name: statistics.score_range(sample.scores(name)) for name in names}
    if "itm" in ends:
        ends["itm"] = (0.0, 1.0)
    further = [
        charts.histogram(
            NAMES[source], each.texts, each.kept, each.low, each.high, name=SCORE_NAMES.get(name, name), mark=None
        )
        for name in names
        if name != "itm"
        for source in SOURCES
        if (each := statistics.distribution(sample, name, source, ends[name])).texts.any()
    ]
    joint: dict[bool, list[Chart]] = {True: [], False: []}  # whether ITM is one of the two
    for pair in combinations(names[:MAX_JOINT], 2):
        for source in SOURCES:
            counts = statistics.joint_counts(sample, pair, source, ends)
            if counts.any():
                x_name, y_name = (SCORE_NAMES.get(name, name) for name in pair)
                chart = Chart(
                    title=NAMES[source],
                    detail=f"{y_name} by {x_name}",
                    label=f"{NAMES[source]} texts: how often each {x_name} occurs with each {y_name}",
                    x_ticks=charts.ticks_of(*ends[pair[0]], at_x),
                    y_ticks=charts.ticks_of(*ends[pair[1]], at_y),
                    cells=charts.density(counts),
                )
                joint["itm" in pair].append(chart)
    return {"score_histograms": further, "joint": joint[True], "other_joint": joint[False]}


SHARES = [Tick(float(at_x(share)), f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)]


def filter_charts(title: str, curves: Mapping[str, FilterCurve], true: str, false: str, **marks: Any) -> list[Chart]:
    """ROC and precision-recall curves of scores by name; `true` and `false` say which texts are told apart."""
    drawn: dict[bool, list[Curve]] = {True: [], False: []}  # whether it is ROC
    for number, (name, curve) in enumerate(curves.items()):
        rates, recall = (np.append(0, each) for each in (curve.false_positive_rate, curve.recall))
        for is_roc, xs, ys in ((True, rates, recall), (False, curve.recall, curve.precision)):
            drawn[is_roc].append(Curve(name, f"series-{number}", charts.line_path(at_x(xs), at_y(ys))))
    roc = Chart(
        title=title,
        detail=f"ROC: {true} accepted, by {false} accepted",
        label=f"ROC: the share of {true} that is accepted by the share of {false}",
        x_ticks=SHARES,
        y_ticks=charts.share_ticks(),
        lines=drawn[True],
        **marks,
    )
    precision = Chart(
        title=title,
        detail=f"precision, by {true} accepted",
        label=f"Precision and recall: the share of {true} among what is accepted, by their share that is accepted",
        x_ticks=SHARES,
        y_ticks=charts.share_ticks(),
        lines=drawn[False],
    )
    return [roc, precision]


def roc_charts(inspected: "InspectedImages") -> list[tuple[list[Chart], ReportTable]]:
    """Of each source whose texts are known to be true or false, how well every score tells them apart."""
    found = []
    for source in SOURCES:
        rows = [row for row in inspected.judged_rows() if row["source"] == source]
        is_true = np.array([row["is_true"] for row in rows], bool)
        if not rows or is_true.all() or not is_true.any():
            continue
        found_scores = []
        for name in inspected.score_names:
            values = np.array([np.nan if row.get(name) is None else row[name] for row in rows], np.float64)
            valid = np.isfinite(values)
            if (area := auc(values[valid], is_true[valid])) is not None:
                found_scores.append((area, name, values[valid], is_true[valid]))
        found_scores.sort(key=lambda score: (-score[0], score[1]))
        curves = {
            SCORE_NAMES.get(name, name): curve
            for _, name, values, truth in found_scores[:MAX_CURVES]
            if (curve := filter_curve(values, truth)) is not None
        }
        areas = [
            (SCORE_NAMES.get(name, name), f"{area:.3f}", f"{average_precision(values, truth):.3f}", f"{len(values):,}")
            for area, name, values, truth in found_scores
        ]
        kept = np.array([row["kept"] for row in rows], bool)
        rates = [float(kept[is_true == truth].mean()) for truth in (False, True)]
        points = [(float(at_x(rates[0])), float(at_y(rates[1])), "what is kept now")]
        drawn = filter_charts(NAMES[source], curves, "true texts", "false texts", points=points)
        found.append((drawn, ReportTable(("Score", "AUC", "Average precision", "Texts"), areas, numbers=(1, 2, 3))))
    return found


def filter_check(folder: CapFiltFolder, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the check of the filter on clean pairs found before the run: values with intervals, and the curves."""
    found = manifest.get("filter_check")
    if found is None:
        return None

    def said(value: Mapping[str, float] | None) -> str:
        return NOTHING if value is None else "{value:.3f} ({low:.3f} to {high:.3f})".format(**value)

    kinds = {"random": "captions of random other images", "hard": "captions of the most similar other images"}
    rows = [
        (against, said(found[kind]["auc"]), said(found[kind]["precision"]), said(found["recall"]))
        for kind, against in kinds.items()
        if kind in found
    ]
    headers = ("Own captions against", "AUC", "Precision at the threshold", "Recall at the threshold")
    curves: dict[str, FilterCurve] = {}
    if (path := folder.root / "filter_check.json").is_file():
        checked = [CheckedPair(**pair) for pair in read_json(path)["scores"]]
        for kind, of_scores in check_curves(checked).items():
            curves |= {f"{SCORE_NAMES[score]}, {kinds[kind]}": curve for score, curve in of_scores.items()}
    drawn = filter_charts("Filter check", curves, "own captions", "others") if curves else []
    return {"found": found, "table": ReportTable(headers, rows, numbers=(1, 2, 3)), "charts": drawn}


def noise_table(inspected: "InspectedImages") -> ReportTable | None:
    """Of each kind of noise in web texts, how well ITM tells it from true texts."""
    rows = [(row, image.noise) for image in inspected.judged for row in image.rows if row["source"] == "web"]
    itm = np.array([row["itm"] for row, _ in rows], np.float64)
    kinds = sorted({noise for _, noise in rows if noise is not None})
    if not kinds:
        return None
    cells = []
    for kind in kinds:
        has_kind = np.array([noise == kind for _, noise in rows])
        is_true = np.array([noise is None for _, noise in rows])
        area = auc(itm[has_kind | is_true], is_true[has_kind | is_true])
        kept = np.mean([row["kept"] for row, noise in rows if noise == kind])
        cells.append((kind.replace("_", " "), f"{has_kind.sum():,}", f"{kept:.1%}", f"{area:.3f}" if area else NOTHING))
    return ReportTable(("Kind", "Texts", "Kept", "AUC of ITM"), cells, numbers=(1, 2, 3))


def fate_rows(scores: RunScores) -> Iterator[tuple[str, str, str]]:
    """How many images there are of each fate, of those with web and synthetic texts."""
    total = sum(scores.combinations.values())
    for fate, title in FATES.items():
        if fate in scores.combinations:
            count = scores.combinations[fate]
            yield title, f"{count:,}", f"{count / total:.1%}" if total else NOTHING


def label_table(sample: TextSample) -> ReportTable:
    """Flags and names that further scores gave the texts."""
    rows = [
        (label.column, label.value, *(NOTHING if share is None else f"{share:.1%}" for share in label[2:]))
        for label in statistics.label_shares(sample)
    ]
    return ReportTable(("Column", "Value", "Web", "Synthetic", "Kept"), rows, numbers=(2, 3, 4))


# Texts


def text_tables(sample: TextSample) -> dict[str, Any]:
    """Lengths and words of the texts before CapFilt, which are the web's, and after it, which are those kept."""
    if not len(sample):
        return {}
    web, synthetic = (sample.of_source(name) for name in SOURCES)
    groups = {
        "Web, before": web,
        "Web kept": web & sample.kept,
        "Synthetic kept": synthetic & sample.kept,
        "All kept, after": sample.kept,
    }
    counted = {name: statistics.text_statistics(sample.captions(rows)) for name, rows in groups.items()}
    num_words = min((len(each.sequence) for each in counted.values() if each.sequence), default=0)
    rows: list[tuple[object, ...]] = [
        ("Texts", *(f"{each.texts:,}" for each in counted.values())),
        ("Different texts", *(_share(each.distinct_texts, each.texts) for each in counted.values())),
        ("Words in a text, mean", *(f"{each.mean_length:.1f}" for each in counted.values())),
        ("Words in a text, median", *(each.median_length for each in counted.values())),
        ("Different words", *(f"{len(each.words):,}" for each in counted.values())),
        (
            f"Different words among {num_words:,}",
            *(f"{each.distinct_words(num_words):,}" if each.sequence else NOTHING for each in counted.values()),
        ),
    ]
    before, after = counted["Web, before"], counted["All kept, after"]
    more, less = statistics.changed_words(before, after)
    repeated = [
        (NAMES[each.source], each.text, f"{each.times:,}", f"{each.times / len(sample):.2%}", f"{each.kept:,}")
        for each in statistics.repeated_texts(sample)
    ]
    return {
        "statistics": ReportTable(("", *groups), rows, numbers=(1, 2, 3, 4)),
        "lengths": length_chart({"before": before, "after": after}),
        "more": more,
        "less": less,
        "repeated": ReportTable(("Source", "Text", "Times", "Of all texts", "Kept"), repeated, numbers=(2, 3, 4)),
    }


def length_chart(groups: Mapping[str, TextStatistics]) -> Chart:
    """The share of texts of each length, of every group."""
    shares = {name: each.lengths / max(each.texts, 1) for name, each in groups.items()}
    tallest = max(float(each.max()) for each in shares.values()) or 1.0
    longest = statistics.MOST_LENGTH
    edges = np.repeat(np.arange(longest + 2), 2)[1:-1]  # a step for each length
    lines = [
        Curve(name, name, charts.line_path(at_x(edges, 0, longest + 1), at_y(np.repeat(share, 2), 0, tallest)))
        for name, share in shares.items()
    ]
    ticks = [
        Tick(float(at_x(length + 0.5, 0, longest + 1)), f"{length}{'+' if length == longest else ''}")
        for length in range(0, longest + 1, 10)
    ]
    return Chart(
        title="Words in a text",
        detail="share of the texts before and after",
        label="Share of the texts with each number of words, of web texts before and of kept texts after",
        x_ticks=ticks,
        y_ticks=charts.share_ticks(tallest),
        lines=lines,
    )


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if whole else NOTHING


# How it was made


@dataclass
class ShardReports:
    """What the reports of finished shards say together: rejects by reason, seconds by stage, and what ran where."""

    num_rejects: int = 0
    images: int = 0
    reasons: dict[str, RejectedReason] = field(default_factory=dict)
    seconds: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    devices: Counter[str] = field(default_factory=Counter)

    @classmethod
    def read(cls, folder: CapFiltFolder, shards: Sequence[str]) -> "ShardReports":
        """Read one report after the other."""
        found = cls()

        def rejects() -> Iterator[tuple[str, str, str]]:
            for shard in shards:
                report = folder.read_report(shard)
                found.images += report["counts"]["images"]
                found.num_rejects += len(report["rejects"])
                found.seconds.update(report["seconds"])
                found.versions[str(report.get("openblip"))] += 1
                found.devices[str(report.get("device"))] += 1
                for reject in report["rejects"]:
                    yield shard, reject["key"], reject["reason"]

        found.reasons = statistics.count_reasons(rejects())
        return found

    def timing(self) -> Iterator[tuple[str, float, float | None]]:
        """Each stage with its seconds and its share of all."""
        total = self.seconds.get("total", 0.0)
        for stage, spent in self.seconds.items():
            if stage != "total":
                yield stage, spent, spent / total if total else None

    @property
    def rate(self) -> float | None:
        """Images in a second, of all shards one after another."""
        total = self.seconds.get("total", 0.0)
        return self.images / total if total else None


def provenance(manifest: Mapping[str, Any], work: ShardReports) -> dict[str, ReportTable]:
    """Models, settings and programs of the run."""
    models = [
        (role, model["checkpoint"], f"{model['parameters']:,}", model.get("dtype"), model["sha256"])
        for role, model in manifest["models"].items()
    ]
    decided = asdict(Decision.of_manifest(manifest)).items()
    settings = [*manifest["config"].items(), *((name, value) for name, value in decided if value is not None)]
    programs = [("openblip", manifest.get("openblip")), *manifest.get("versions", {}).items()]
    for name, counts in (("openblip, of the shards", work.versions), ("device, of the shards", work.devices)):
        programs.append((name, ", ".join(f"{value} ({count:,})" for value, count in counts.most_common(8))))
    return {
        "models": ReportTable(("Model", "Checkpoint", "Parameters", "Precision", "SHA-256"), models, numbers=(2,)),
        "settings": ReportTable((), settings),
        "programs": ReportTable((), programs),
    }


# The gallery: images for each fate of their texts, chosen by hash, and those whose scores are close to the threshold.


@dataclass
class ShownImage:
    """An image of the gallery, or one whose texts are known to be true or false, with the rows of its texts."""

    shard: str
    key: str
    rows: list[dict[str, Any]]
    """Of the caption file, each with `kept` and `is_true`, which is None where nobody knows."""
    is_borderline: bool = False
    is_shown: bool = False
    noise: str | None = None
    thumbnail: str | None = None
    """A data URI; None when the original can no longer be read."""

    @property
    def fate(self) -> Fate:
        kept: dict[str, bool] = {}
        for row in self.rows:
            kept.setdefault(row["source"], row["kept"])
        return kept.get("web"), kept.get("synthetic")

    def distance(self, thresholds: Mapping[str, float | None]) -> float:
        """How far the ITM of the text that is closest to its threshold is from it; infinite where there is none."""
        limits = ((row["itm"], thresholds[row["source"]]) for row in self.rows)
        return min((abs(itm - limit) for itm, limit in limits if limit is not None), default=float("inf"))

    @property
    def is_mistaken(self) -> bool:
        """Whether a text is known to be true and not kept, or the reverse."""
        return any(row["is_true"] is not None and row["is_true"] != row["kept"] for row in self.rows)

    def judge(self, truth: KnownTruth) -> None:
        """Say of every text whether it is true."""
        self.noise = truth.noise
        for row in self.rows:
            row["is_true"] = truth.holds_for(row["source"], row["caption"])


@dataclass
class InspectedImages:
    """The images of the gallery, in its order, and all texts that are known to be true or false."""

    images: list[ShownImage] = field(default_factory=list)
    judged: list[ShownImage] = field(default_factory=list)
    score_names: list[str] = field(default_factory=list)

    def judged_rows(self) -> Iterator[dict[str, Any]]:
        return (row for image in self.judged for row in image.rows)


def inspect_images(folder: CapFiltFolder, manifest: Mapping[str, Any]) -> InspectedImages:
    """Choose images for the gallery, the same for the same rows and decision, and read them and what is true of them.

    They are among the first `INSPECTED_IMAGES` images of `INSPECTED_SHARDS` shards that are drawn by hash. Thumbnails
    are made from the original shards; where those are gone, the texts are shown without.
    """
    decision = Decision.of_manifest(manifest)
    inspected = InspectedImages()
    by_shard: dict[str, list[ShownImage]] = {}
    names: dict[str, None] = {}
    for shard in sorted(folder.done_shards(), key=hash_int)[:INSPECTED_SHARDS]:
        table = read_judged(folder.root, shard, decision)
        starts = statistics.first_rows(table["key"].combine_chunks())
        end = table.num_rows if len(starts) <= INSPECTED_IMAGES else int(starts[INSPECTED_IMAGES])
        table = table.slice(0, end)
        names |= dict.fromkeys(TextSample(table, 1.0).score_names())
        rows = [{**row, "is_true": None} for row in table.to_pylist()]
        ends = [*starts[1:INSPECTED_IMAGES], end]
        by_shard[shard] = [
            ShownImage(shard, rows[first]["key"], rows[first:last])
            for first, last in zip(starts[:INSPECTED_IMAGES], ends[: len(starts)], strict=True)
        ]
    choose_images(by_shard, {name: decision.threshold_of(name) for name in SOURCES})
    for shard, images in by_shard.items():
        read_originals(manifest, shard, images)
    everything = [image for images in by_shard.values() for image in images]
    order = list(FATES)
    shown = [image for image in everything if image.is_shown and image.fate in FATES]
    inspected.images = sorted(shown, key=lambda image: order.index(image.fate))
    inspected.judged = [image for image in everything if image.rows[0]["is_true"] is not None]
    inspected.score_names = list(names)
    return inspected


def choose_images(by_shard: Mapping[str, Sequence[ShownImage]], thresholds: Mapping[str, float | None]) -> None:
    """Mark which images are shown: some of each fate, and those with a text whose ITM is closest to its threshold."""
    ranked: dict[Fate, list[tuple[int, str, int]]] = defaultdict(list)
    close: list[tuple[float, str, int]] = []
    for shard, images in by_shard.items():
        ranks: Counter[Fate] = Counter()
        for number in np.random.default_rng(hash_int(shard)).permutation(len(images)).tolist():
            image = images[number]
            # The rank comes first, so that every shard gives its first image before one gives its second.
            ranked[image.fate].append((ranks[image.fate], shard, number))
            ranks[image.fate] += 1
            close.append((image.distance(thresholds), shard, number))
    for _, shard, number in (each for fate in FATES for each in sorted(ranked[fate])[:IMAGES_PER_FATE]):
        by_shard[shard][number].is_shown = True
    for distance, shard, number in sorted(close)[:BORDERLINE_IMAGES]:
        if distance <= MOST_BORDERLINE:
            by_shard[shard][number].is_shown = by_shard[shard][number].is_borderline = True


def read_originals(manifest: Mapping[str, Any], shard: str, images: Sequence[ShownImage]) -> None:
    """Give a shard's images their thumbnails and what is known to be true of them, as far as the source still has it.

    Where the first sample does not say what is true, only the images that are shown are read.
    """
    by_key = {image.key: image for image in images}
    shown = {image.key for image in images if image.is_shown}
    unread = set(by_key)

    def read(sample: Sample) -> tuple[KnownTruth | None, str | None]:
        return known_truth(sample), thumbnail(sample) if sample.key in shown else None

    try:
        source = open_source(manifest["source"], **SourceOptions.stated(manifest).reading)
        with closing(read_source(source, read, shards=[shard], skip=lambda _, key: key not in unread)) as entries:
            for entry in entries:
                if isinstance(entry, Reject):
                    unread.discard(entry.key)
                else:
                    sample, (truth, encoded) = entry
                    unread.discard(sample.key)
                    by_key[sample.key].thumbnail = encoded
                    if truth is None:
                        unread &= shown
                    else:
                        by_key[sample.key].judge(truth)
                if not unread:
                    break
    except (OpenBlipError, OSError):
        pass  # the originals have moved: the page says so at each image


def thumbnail(sample: Sample) -> str:
    """The image as a data URI, small enough for a page that holds many."""
    with read_image(sample.image, name=sample.key) as image:
        for size in THUMBNAIL_SIZES:
            image.thumbnail((size, size))
            jpeg = io.BytesIO()
            image.save(jpeg, "JPEG", quality=80)
            if jpeg.tell() <= THUMBNAIL_BYTES:
                break
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
