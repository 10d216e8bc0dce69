"""What version 0.1 wrote is read, and gives what version 0.1 computed (tests/fixtures/v0.1)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import openblip
from openblip.capfilt.folder import CapFiltFolder
from openblip.cli.main import main
from openblip.data.captions import read_texts
from openblip.data.inspect import inspect_source
from openblip.data.sample import Sample
from openblip.data.sources import open_source
from source_items import items_of

FIXTURES = Path(__file__).parent / "fixtures" / "v0.1"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
SHIPPED = ("--captioner", "openblip-mini-captioner", "--filter", "openblip-mini-filter")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all files, in which CapFilt's output names the source where it is now."""
    folder = shutil.copytree(FIXTURES, tmp_path / "old")
    monkeypatch.chdir(folder)
    manifest = json.loads((folder / "cleaned/manifest.json").read_text())
    (folder / "cleaned/manifest.json").write_text(json.dumps(manifest | {"source": str(folder / "web")}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blip", "blip2", "run/model"])
def test_models(name: str) -> None:
    expected, texts = EXPECTED[name.partition("/")[0]], EXPECTED["texts"]
    model: Any = openblip.load(FIXTURES / name, device="cpu")
    images = sorted((FIXTURES / "images").iterdir())
    assert model.tasks >= set(expected["tasks"])
    assert model.caption(images, decoding=openblip.Greedy()) == expected["captions"]
    beams = model.caption(images, decoding=openblip.Beam(), return_scores=True)
    assert [caption.text for caption in beams] == [text for text, _ in expected["beams"]]
    assert [caption.logprob for caption in beams] == pytest.approx([x for _, x in expected["beams"]], abs=1e-3)
    for call in ("match", "similarity"):
        found = model.match_matrix(images, texts) if call == "match" else model.similarity(images, texts)
        torch.testing.assert_close(found, torch.tensor(expected[call]), atol=1e-4, rtol=1e-3)
    if "answers" in expected:
        assert model.answer(images, [EXPECTED["question"]] * len(images)) == expected["answers"]


@pytest.mark.parametrize("threshold", ["0.9", "0.5"])
def test_texts_of_capfilt_are_selected_anew(threshold: str, old: Path) -> None:
    assert main(["capfilt-select", "cleaned", "--threshold", threshold]) == 0
    source = open_source("capfilt:cleaned")
    samples = items_of(source)
    assert [[s.shard, s.key, *s.captions] for s in samples if isinstance(s, Sample)] == EXPECTED["kept"][threshold]
    assert "repeated keys" not in inspect_source(source).facts()


@pytest.mark.slow
def test_capfilt_goes_on_with_the_settings_of_then(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("cleaned", "before")
    (old / "cleaned/captions/0001.report.json").unlink()
    command = ["capfilt", "web", *SHIPPED, "--out", "cleaned", "--num-captions", "2", "--seed", "3"]
    assert main(command) == 2
    refusal = capsys.readouterr().err
    assert "jpeg was 'exact', is now 'scaled'. Repeat the earlier settings to resume it" in refusal
    assert refusal.count("\n") == 1
    assert main([*command, "--jpeg", "exact", "--dtype", "float32"]) == 0
    assert CapFiltFolder("cleaned").done_shards() == ["0000", "0001"]
    for shard in ("0000", "0001"):
        ours, theirs = (read_texts(folder, shard).to_pylist() for folder in ("cleaned", "before"))
        assert [row["caption"] for row in ours] == [row["caption"] for row in theirs]
        assert [row["itm"] for row in ours] == pytest.approx([row["itm"] for row in theirs], abs=1e-4)


def test_a_finished_run_is_finished(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", "run"]) == 0
    assert capsys.readouterr().err == "trained: run/model\n"


def test_an_unfinished_run_is_refused(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("run/model")
    assert main(["train", "--resume", "run"]) == 2
    refusal = capsys.readouterr().err
    assert "step_00000004 was written by OpenBLIP 0.1" in refusal
    assert refusal.count("\n") == 1
