"""The check of a run's filter, before it is used: `DIR/filter_check.json`, and the key of that name in the manifest.

The file has every score, so that the check is not made again when a run resumes or takes another threshold.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import openblip
from openblip.capfilt.config import FilterCheckOptions
from openblip.data.config import SourceOptions
from openblip.data.sources import open_source
from openblip.data.sources.opening import absolute_spec, reading_of
from openblip.errors import ConfigError, FilterCheckError, SourceError
from openblip.evaluation.filter_check import (
    CheckedPair,
    check_curves,
    check_report,
    choose_pairs,
    count_pairs,
    score_pairs,
)
from openblip.files import locate, read_json, write_json

MIN_PAIRS = 100
CHECK_FILE = "filter_check.json"


def require_pairs(pairs: str, options: SourceOptions) -> None:
    """Raise `ConfigError` for a source with fewer than `MIN_PAIRS` images that have a caption; images are not read."""
    try:
        number = count_pairs(open_source(pairs, **reading_of(pairs, options)), MIN_PAIRS)
    except SourceError as error:
        if "too small" not in str(error):  # for a part of it
            raise
        number = 0
    if number < MIN_PAIRS:
        raise ConfigError(
            f"{pairs} has {number} images with captions, and fewer than {MIN_PAIRS} cannot say whether the filter "
            "works. Name more pairs with --check; or use the filter unchecked, with --no-check"
        )


def check_filter(
    pairs: str,
    checkpoint: str,
    directory: str | Path,
    *,
    options: SourceOptions,
    threshold: float,
    filter_facts: Mapping[str, Any] | None = None,
    device: str | None = None,
    dtype: str = "auto",
    batch_size: int = 64,
) -> dict[str, Any]:
    """Score `pairs` with a filter, keep the scores in `directory`, and return what `check_report` makes of them.

    filter_facts: the filter's entry in a manifest. Where it is that of the scores which are there, nothing is loaded.
    """
    path = locate(directory) / CHECK_FILE
    source_facts = {"pairs": absolute_spec(pairs), "images": options.images}
    if filter_facts is not None and path.is_file():
        stored = read_json(path)
        known = {name: filter_facts.get(name) for name in ("sha256", "dtype")}
        if stored["source"] == source_facts and stored["filter"] == known:
            return report_at(directory, threshold)
    predictor = openblip.load(checkpoint, device=device, dtype=dtype)
    source = open_source(pairs, **reading_of(pairs, options))
    checked, rejects = score_pairs(predictor, source, choose_pairs(source), batch_size=batch_size)
    write_json(
        path,
        {
            "source": source_facts,
            "filter": {"sha256": predictor.fingerprint(), "dtype": predictor.precision},
            "num_rejects": len(rejects),
            "scores": [asdict(pair) for pair in checked],
            "curves": {
                kind: {score: curve.points() for score, curve in curves.items()}
                for kind, curves in check_curves(checked).items()
            },
        },
    )
    return report_at(directory, threshold)


def report_at(directory: str | Path, threshold: float) -> dict[str, Any]:
    """The check in a folder at a threshold, as the manifest has it."""
    stored = read_json(locate(directory) / CHECK_FILE)
    report = check_report([CheckedPair(**pair) for pair in stored["scores"]], threshold)
    return {**stored["source"], "filter": stored["filter"], "num_rejects": stored["num_rejects"], **report}


def require_passed(report: Mapping[str, Any], options: FilterCheckOptions) -> None:
    """Raise `FilterCheckError` for a filter whose AUC may lie below the floor, unless it shall be used anyway."""
    auc = report["random"]["auc"] or {"value": math.nan, "low": -math.inf}
    if options.no_check or auc["low"] >= options.check_floor:
        return
    raise FilterCheckError(
        f"the filter cannot be trusted: {describe(report)}. The lower end of the interval of the AUC on "
        f"random captions must be {options.check_floor:g} (--check-floor). What helps: more clean pairs to fine-tune "
        "it on, a pre-trained checkpoint to start from, or longer fine-tuning. --no-check uses it as it is"
    )


def describe(report: Mapping[str, Any]) -> str:
    """A check in a sentence, with its intervals."""

    def said(value: Mapping[str, float] | None) -> str:
        return "unknown" if value is None else "{value:.3f} ({low:.3f} to {high:.3f})".format(**value)

    random, hard = report["random"], report["hard"]
    return (
        f"on {report['num_pairs']:,} clean pairs its AUC is {said(random['auc'])} against captions of random other "
        f"images and {said(hard['auc'])} against hard ones; at threshold {report['threshold']:g} its precision is "
        f"{said(random['precision'])} and {said(hard['precision'])}, its recall {said(report['recall'])}"
    )
