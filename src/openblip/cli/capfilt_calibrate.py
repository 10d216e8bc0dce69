"""`openblip capfilt-sample` and `capfilt-calibrate`: labels of a person, and what they say of thresholds."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from openblip.cli.capfilt import Directory
from openblip.cli.options import check_output
from openblip.errors import ConfigError
from openblip.files import locate

Labels = Annotated[Path, tyro.conf.arg(metavar="LABELS", help="the answers, json or csv.", help_behavior_hint="")]


def sample_run(
    directory: Directory, /, *, out: Path | None = None, num_texts: int = 200, by: str = "itm", seed: int = 0
) -> int:
    """Writes a page on which a person says of sampled texts whether they are true of their images.

    The sample has texts of all scores, more where the score is undecided. The page is one file with its images; it
    loads and sends nothing, works with the keyboard, and downloads the answers for `openblip capfilt-calibrate`.

    Args:
        out: the page; DIR/labels.html when not given.
        num_texts: texts to label.
        by: the score by which the sample is stratified.
        seed: another seed draws other texts.
    """
    if num_texts < 1:
        raise ConfigError(f"--num-texts is {num_texts}; it must be at least 1")
    target = locate(directory) / "labels.html" if out is None else out
    check_output("--out", str(target))
    from openblip.capfilt.labels import write_label_page

    page = write_label_page(directory, target, num_texts, by=by, seed=seed)
    print(f"wrote {page.path}, which asks about {page.texts:,} texts; open it in a browser")
    print(f"then: openblip capfilt-calibrate {shlex.quote(str(directory))} labels.json")
    if page.missing:
        print(f"{page.missing:,} texts are left out, because their images can no longer be read", file=sys.stderr)
    return 1 if page.missing else 0


def calibrate_run(
    directory: Directory,
    labels: Labels,
    /,
    *,
    precision: float | None = None,
    keep_rate: float | None = None,
    features: tuple[str, ...] = (),
    mix: bool = True,
    seed: int = 0,
) -> int:
    """Says which threshold has a wanted precision, by labels of a person; learns a mix of all scores.

    The mix is the logistic regression of the labels over all scores; it becomes the column `mix`, a probability. Each
    threshold comes with the 95% interval of its precision, and with the command that chooses it. Nothing is selected.

    Args:
        precision: the share of kept texts that shall be true; 0.9 when neither this nor a keep rate is given.
        keep_rate: the share of all texts that shall be kept.
        features: the columns of the mix; all numbers and flags when not given.
        mix: learn a mix, and write it to DIR/scores/mix.
        seed: of the cross-validation and of the intervals.
    """
    if precision is None and keep_rate is None:
        precision = 0.9
    from openblip.capfilt.calibration import calibrate

    if features and not mix:
        raise ConfigError("--features has no effect here: without a mix no score is a feature")
    summary = calibrate(
        directory, labels, precision=precision, keep_rate=keep_rate, features=features or None, learn_mix=mix, seed=seed
    )
    unsure = f", and {summary.num_unsure:,} without an answer" if summary.num_unsure else ""
    print(f"{summary.num_labels:,} labels{unsure}; of all texts {summary.true_share} are true")
    from rich.console import Console
    from rich.table import Table

    table = Table("score", "AUC", "threshold", "precision", "kept of all texts")
    for each in summary.scores:
        cells = ["none reaches it", f"at most {each.best:.3f}", ""]
        if each.chosen is not None:
            cells = [str(each.chosen.threshold), str(each.chosen.precision), f"{each.chosen.keep_rate:.1%}"]
        table.add_row(each.score, f"{each.auc:.3f}", *cells)
    Console().print(table)
    for each in summary.scores:
        if each.chosen is not None:
            value = each.chosen.threshold.value
            rule = f"--threshold {value!r}" if each.score == "itm" else f'--where "{each.score} > {value!r}"'
            print(f"openblip capfilt-select {shlex.quote(str(directory))} {rule}")
    if summary.mix is not None:
        weights = sorted(zip(summary.mix.coefficients, summary.mix.names, strict=True), key=lambda each: -abs(each[0]))
        print("mix: " + ", ".join(f"{name} {weight:+.2f}" for weight, name in weights[:8]))
    print(f"numbers: {summary.path}")
    return 0 if any(each.chosen is not None for each in summary.scores) else 1
