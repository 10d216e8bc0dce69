"""What is kept: the manifest's threshold decides at reading, and changing it runs no model."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from capfilt_world import all_rows

from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.folder import COMBINATIONS, NUM_BINS, RunScores
from openblip.capfilt.local import run_capfilt
from openblip.capfilt.selection import select
from openblip.data.sources import open_source
from openblip.errors import ConfigError
from source_items import items_of


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.62])
def test_the_source_reads_exactly_the_kept_rows(run_copy: Path, web: Path, threshold: float) -> None:
    select(run_copy, threshold)
    originals = {(s.shard, s.key): s for s in items_of(open_source(str(web)))}
    expected = [
        (row["shard"], f"{row['key']}-{row['source']}-{row['index']}", row["caption"])
        for row in all_rows(run_copy)
        if row["itm"] > threshold
    ]
    samples = list(items_of(open_source(f"capfilt:{run_copy}")))
    assert [(sample.shard, sample.key, sample.captions[0]) for sample in samples] == expected
    assert all(sample.image == originals[sample.shard, sample.key.rsplit("-", 2)[0]].image for sample in samples)


def test_select_needs_no_model_and_no_original(
    config: CapFiltConfig, web: Path, captioner: str, tmp_path: Path
) -> None:
    source = shutil.copytree(web, tmp_path / "web")
    model = shutil.copytree(captioner, tmp_path / "captioner")
    out = tmp_path / "run"
    run_capfilt(dataclasses.replace(config, source=str(source), captioner=str(model)), out)
    rows = all_rows(out)
    shutil.rmtree(source)
    shutil.rmtree(model)
    before = json.loads((out / "manifest.json").read_text())
    scores = select(out, 0.6)
    for name, found in scores.sources.items():
        itm = [row["itm"] for row in rows if row["source"] == name]
        assert (found.texts, found.kept) == (len(itm), sum(score > 0.6 for score in itm))
    assert json.loads((out / "manifest.json").read_text()) == before | {"threshold": 0.6}
    assert all_rows(out) == rows
    page = (out / "report.html").read_text()
    assert "threshold 0.6" in page
    assert "image not found at its source" in page


def test_selected_runs_resume_with_their_threshold(config: CapFiltConfig, run_copy: Path) -> None:
    select(run_copy, 0.6)
    summary = run_capfilt(dataclasses.replace(config, threshold=0.6), run_copy)
    assert len(summary.skipped) == 3


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_is_a_probability(run_copy: Path, threshold: float) -> None:
    before = (run_copy / "manifest.json").read_bytes()
    with pytest.raises(ConfigError, match="threshold"):
        select(run_copy, threshold)
    assert (run_copy / "manifest.json").read_bytes() == before


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        select(tmp_path, 0.5)


@pytest.mark.parametrize("shard", ["00000", "00001", "00002"])
def test_scores_against_a_plain_count(finished_run: Path, shard: str) -> None:
    rows = [row for row in all_rows(finished_run) if row["shard"] == shard]
    scores = RunScores()
    first_rows = scores.add_shard(finished_run / "captions" / f"{shard}.parquet", 0.5)
    for name, found in scores.sources.items():
        itm = [row["itm"] for row in rows if row["source"] == name]
        assert found.histogram.tolist() == [
            sum(min(int(score * NUM_BINS), NUM_BINS - 1) == position for score in itm) for position in range(NUM_BINS)
        ]
    fates: dict[tuple[bool, bool], list[int]] = {combination: [] for combination in COMBINATIONS}
    for key in {row["key"] for row in rows}:
        own = [(number, row) for number, row in enumerate(rows) if row["key"] == key]
        first = {row["source"]: row["itm"] > 0.5 for _, row in reversed(own)}
        if "web" in first:
            fates[first["web"], first["synthetic"]].append(own[0][0])
    assert {name: found.tolist() for name, found in first_rows.items()} == {
        name: sorted(found) for name, found in fates.items()
    }
    assert scores.combinations == {name: len(found) for name, found in fates.items()}
    assert scores.images == 6
