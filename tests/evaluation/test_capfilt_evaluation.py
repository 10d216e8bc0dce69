"""A CapFilt run held against what its samples say is true."""

import json
from itertools import chain
from pathlib import Path

import pytest

from openblip.data.captions import CaptionRow, write_captions
from openblip.errors import SourceError
from openblip.evaluation.filtering import has_ground_truth, measure_capfilt
from shared_files import as_json, write_tar


def write_run(folder: Path, rows: list[CaptionRow], infos: dict[str, dict[str, object]]) -> Path:
    (folder / "captions").mkdir(parents=True)
    members = [[(f"{key}.jpg", b"image"), (f"{key}.json", as_json(**info))] for key, info in infos.items()]
    write_tar(folder / "s.tar", chain.from_iterable(members))
    manifest = {"source": str(folder / "s.tar"), "images": None, "threshold": 0.5}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_captions(folder / "captions" / "s.parquet", rows)
    (folder / "captions" / "s.report.json").write_text("{}")
    return folder


def row(key: str, source: str, caption: str, itm: float) -> CaptionRow:
    logprob = None if source == "web" else -1.0
    return CaptionRow(key=key, shard="s", index=0, source=source, caption=caption, itm=itm, itc=0.0, logprob=logprob)


def test_noise_is_counted_over_both_sources(tmp_path: Path) -> None:
    infos: dict[str, dict[str, object]] = {
        "a": {"caption": "a dog", "references": ["a dog", "one dog"], "noise": None},
        "b": {"caption": "img 1", "references": ["a cat"], "noise": "file_name"},
        "c": {"caption": "a cow", "references": ["a fox"], "noise": "wrong_object"},
    }
    rows = [
        row("a", "web", "a dog", 0.9), row("a", "synthetic", "One dog.", 0.8),
        row("b", "web", "img 1", 0.2), row("b", "synthetic", "a cat", 0.4),
        row("c", "web", "a cow", 0.6), row("c", "synthetic", "a cow", 0.7),
    ]  # fmt: skip
    run = write_run(tmp_path, rows, infos)
    assert has_ground_truth(run)
    measured = measure_capfilt(run)
    assert measured["noise_before"] == pytest.approx(2 / 3)
    assert measured["num_kept"] == 4
    assert measured["noise_after"] == pytest.approx(2 / 4)  # both texts of c
    assert measured["web"]["auc"] == 1.0
    assert measured["synthetic"]["correct"] == pytest.approx(2 / 3)
    assert measured["synthetic"]["correct_kept"] == pytest.approx(1 / 2)


def test_samples_that_do_not_know_are_said_so(tmp_path: Path) -> None:
    run = write_run(tmp_path, [row("a", "web", "a dog", 0.9)], {"a": {"caption": "a dog"}})
    assert not has_ground_truth(run)
    with pytest.raises(SourceError, match="does not say what is true"):
        measure_capfilt(run)
