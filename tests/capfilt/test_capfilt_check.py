"""A filter that cannot tell is never used in silence: `capfilt --check`."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from capfilt_world import WORDS, sample_members

from openblip.capfilt import check
from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.local import run_capfilt
from openblip.capfilt.selection import select
from openblip.errors import ConfigError, FilterCheckError
from shared_files import write_tar

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> str:
    """120 images, each with a text of its own."""
    folder, rng = tmp_path_factory.mktemp("clean"), np.random.default_rng(7)
    members = [sample_members(f"{n:04d}", n, [" ".join(rng.choice(WORDS, 5))]) for n in range(120)]
    write_tar(folder / "00000.tar", [file for sample in members for file in sample])
    return str(folder)


def test_a_filter_near_chance_stops_the_run_before_it_captions(
    config: CapFiltConfig, clean: str, tmp_path: Path
) -> None:
    checked = replace(config, check=clean)
    with pytest.raises(FilterCheckError, match=r"AUC is 0\.\d+ \(.*more clean pairs.*--no-check"):
        run_capfilt(checked, tmp_path)
    assert not list(tmp_path.glob("captions/*"))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["filter_check"]["random"]["auc"]["low"] < 0.8
    with pytest.raises(FilterCheckError):  # nor does it go on without the check that failed
        run_capfilt(config, tmp_path)
    summary = run_capfilt(replace(checked, no_check=True), tmp_path)
    assert len(summary.done) == 3


def test_a_check_that_passes_stands_in_the_manifest_at_any_threshold(
    config: CapFiltConfig, clean: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    checked = replace(config, check=clean, check_floor=0.1)
    run_capfilt(checked, tmp_path)
    assert "the filter was checked: on 120 clean pairs its AUC is 0." in capsys.readouterr().err
    scores = json.loads((tmp_path / "filter_check.json").read_text())["scores"]
    assert len(scores) == 120
    select(tmp_path, 0.7)
    found = json.loads((tmp_path / "manifest.json").read_text())["filter_check"]
    assert (found["threshold"], found["floor"]) == (0.7, 0.1)
    assert found["recall"]["value"] == pytest.approx(sum(pair["own"] > 0.7 for pair in scores) / 120, abs=1e-6)
    monkeypatch.setattr(check, "score_pairs", None)  # a resumed run scores nothing again
    run_capfilt(replace(checked, threshold=0.7), tmp_path)


def test_too_few_pairs_are_refused_before_a_model_is_loaded(
    config: CapFiltConfig, web: Path, clean: str, tmp_path: Path
) -> None:
    few = replace(config, check=str(web), captioner="no-such-model")
    with pytest.raises(ConfigError, match=r"has 15 images with captions, and fewer than 100.*--no-check"):
        run_capfilt(few, tmp_path)
    with pytest.raises(ConfigError, match=r"\[99%:\] has \d images"):
        run_capfilt(replace(config, check=f"{clean}[99%:]"), tmp_path)
    run_capfilt(replace(config, check=str(web), no_check=True), tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["filter_check"]["num_pairs"] == 15


def test_a_run_without_a_check_says_so(
    config: CapFiltConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_capfilt(config, tmp_path / "a")
    assert "the filter was not checked" in capsys.readouterr().err
    run_capfilt(replace(config, no_check=True), tmp_path / "b")
    assert "not checked" not in capsys.readouterr().err
