"""Thresholds from labels, their intervals, and the learned mix."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from capfilt_world import all_rows

from openblip.capfilt.calibration import MixModel, PrecisionCurve, fit_mix, weighted_auc
from openblip.capfilt.labels import stratify
from openblip.cli.main import main
from openblip.data.captions import finished_shards, read_texts
from openblip.metrics.ranking import auc

LABELS_PER_STRATUM = 5


def labelled_population(rng: np.random.Generator) -> tuple[np.ndarray[Any, Any], ...]:
    """Scores and truth of 20,000 texts by a filter that is too sure of itself, and the strata."""
    true_logits = rng.normal(0.8, 3, 20_000)
    truth = rng.random(20_000) < 1 / (1 + np.exp(-true_logits))
    scores = 1 / (1 + np.exp(-2 * true_logits - 1))
    return scores, truth, stratify(scores, is_probability=True)


@pytest.mark.slow
def test_a_threshold_has_the_precision_that_was_wanted_and_keeps_most_of_what_it_could() -> None:
    rng = np.random.default_rng(0)
    scores, truth, strata = labelled_population(rng)
    shares = np.bincount(strata) / len(strata)
    order = np.argsort(-scores)
    precisions = np.cumsum(truth[order]) / np.arange(1, len(truth) + 1)
    most = (np.flatnonzero(precisions >= 0.9)[-1] + 1) / len(truth)
    successes, covered = 0, 0
    for draw in range(40):
        rows = np.concatenate([rng.choice(np.flatnonzero(strata == each), LABELS_PER_STRATUM) for each in range(40)])
        weights = shares[strata[rows]] / LABELS_PER_STRATUM
        curve = PrecisionCurve.fit(
            scores, scores[rows], truth[rows], weights, strata[rows], seed=draw, num_resamples=60
        )
        chosen = curve.at_precision(0.9)
        assert chosen is not None
        kept = scores > chosen.threshold.value
        assert chosen.keep_rate == pytest.approx(kept.mean())
        successes += truth[kept].mean() >= 0.87 and kept.mean() >= 0.8 * most
        covered += chosen.precision.low <= truth[kept].mean() <= chosen.precision.high
        assert chosen.threshold.low <= chosen.threshold.value <= chosen.threshold.high
    assert successes >= 34  # a weak filter: emoji scenes reach more (benchmarks/calibration.py)
    assert covered >= 34


def test_a_keep_rate_is_counted_and_its_precision_estimated() -> None:
    rng = np.random.default_rng(1)
    scores, truth, _ = labelled_population(rng)
    rows = rng.choice(len(scores), 400)
    curve = PrecisionCurve.fit(scores, scores[rows], truth[rows], np.ones(400), np.zeros(400, np.int64))
    chosen = curve.at_keep_rate(0.5)
    kept = scores > chosen.threshold.value
    assert 0.5 <= kept.mean() < 0.502
    assert chosen.precision.low < truth[kept].mean() < chosen.precision.high
    assert curve.at_precision(0.9999999) is None
    assert curve.best() < 1
    assert curve.true_share().low < truth.mean() < curve.true_share().high


def test_equal_scores_are_kept_together() -> None:
    scores = np.array([0.0] * 10 + [0.5] * 10 + [1.0] * 10)
    truth = scores > 0.2
    curve = PrecisionCurve.fit(scores, scores, truth, np.ones(30), np.zeros(30, np.int64), num_resamples=5)
    assert curve.keep_rates.tolist() == [1.0, 2 / 3, 1 / 3]
    for wanted, count in ((0.3, 10), (0.34, 20), (0.6, 20)):
        assert int((scores > curve.at_keep_rate(wanted).threshold.value).sum()) == count
    assert curve.at_keep_rate(0.7).keep_rate == 1.0


@pytest.mark.slow
def test_a_mix_learns_from_scores_that_itm_lacks_and_from_what_is_missing() -> None:
    rng = np.random.default_rng(2)
    truth = rng.random(3000) < 0.6
    is_web = rng.random(3000) < 0.5
    helpful = rng.normal(size=3000) + 2 * truth
    table = pa.table(
        {
            "source": np.where(is_web, "web", "synthetic"),
            "itm": pa.array(1 / (1 + np.exp(-rng.normal(size=3000) - truth)), pa.float32()),
            "helpful": pa.array(np.where(is_web, helpful, np.nan), from_pandas=True),
            "flag": pa.array(rng.random(3000) < 0.5),
            "constant": np.ones(3000),
        }
    )
    model = MixModel.describe(table, ["itm", "helpful", "flag", "constant"])
    assert model.names == ("itm", "helpful", "helpful is missing", "flag", "is_web")
    labelled, known = table.slice(0, 300), truth[:300]
    fitted, held_out = fit_mix(model, labelled, known, np.ones(300))
    probability = fitted.probability(table)
    alone, mixed = auc(np.array(table["itm"]), truth), auc(probability, truth)
    assert alone is not None
    assert mixed is not None
    assert mixed > alone + 0.05
    assert weighted_auc(held_out, known, np.ones(300)) < weighted_auc(probability[:300], known, np.ones(300)) + 0.02
    assert weighted_auc(held_out, known, np.ones(300)) == pytest.approx(auc(held_out, known))


@pytest.fixture
def answers(run_copy: Path, tmp_path: Path) -> Path:
    """Answers about all texts of a run: those with an ITM above the middle are true, with some mistakes."""
    rows = [row for row in all_rows(run_copy) if row["caption"].strip()]
    middle, rng = np.median([row["itm"] for row in rows]), np.random.default_rng(0)
    lines = ["shard,key,source,index,label"]
    for row in rows:
        is_true = (row["itm"] > middle) != (rng.random() < 0.15)
        lines.append(f"{row['shard']},{row['key']},{row['source']},{row['index']},{'yes' if is_true else 'no'}")
    path = tmp_path / "answers.csv"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_the_command_writes_the_mix_and_says_what_selects(
    run_copy: Path, answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["capfilt-calibrate", str(run_copy), str(answers), "--precision", "0.7"]) == 0
    printed = capsys.readouterr().out
    number = float(printed.split('--where "mix > ')[1].split('"')[0])
    for shard in finished_shards(run_copy):
        texts = read_texts(run_copy, shard)
        assert texts.schema.field("mix").type == pa.float32()
        assert texts["mix"].null_count == 0
    found = json.loads((run_copy / "calibration.json").read_text())
    assert found["precision"] == 0.7
    assert found["scores"]["mix"]["chosen"]["threshold"]["value"] == number
    assert main(["capfilt-select", str(run_copy), "--where", f"mix > {number!r}"]) == 0
    assert "kept" in capsys.readouterr().out
    # Again, with other features: the column is of the new model alone.
    assert main(["capfilt-calibrate", str(run_copy), str(answers), "--keep-rate", "0.5", "--features", "itc"]) == 0
    assert json.loads((run_copy / "scores/mix/model.json").read_text())["columns"] == ["itc"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "1.5"], "precision is 1.5"),
        (["--precision", "0.9", "--keep-rate", "0.5"], "either a precision or a keep rate"),
        (["--features", "nope"], "no number in every shard is called nope; there are"),
        (["--features", "itm", "--no-mix"], "--features has no effect"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line(
    run_copy: Path, answers: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["capfilt-calibrate", str(run_copy), str(answers), *words]) == 2
    assert message in capsys.readouterr().err
    few = answers.with_name("few.csv")
    few.write_text("\n".join(answers.read_text().splitlines()[:9]))
    assert main(["capfilt-calibrate", str(run_copy), str(few)]) == 2
    assert "Label more texts" in capsys.readouterr().err
    other = answers.with_name("other.csv")
    other.write_text(answers.read_text().replace("00001,0000,web,0", "00001,nobody,web,0"))
    assert main(["capfilt-calibrate", str(run_copy), str(other)]) == 2
    assert "the labels are of another run" in capsys.readouterr().err
