"""`openblip evaluate` against a tiny real checkpoint and a few pairs with known truth."""

import json
from pathlib import Path

import pytest

from openblip.cli.main import main
from openblip.metrics import captioning
from shared_files import as_json, write_tar

PAIRS = [("a.png", "a red dog", None), ("b.jpg", "buy shoes now", "shop"), ("deeper/c.webp", "a blue car", None)]


@pytest.fixture
def shard(tmp_path: Path, image_folder: Path) -> Path:
    members = []
    for index, (name, caption, noise) in enumerate(PAIRS):
        info = as_json(caption=caption, references=[caption], noise=noise)
        image = (image_folder / name).read_bytes()
        members += [(f"{index:04}{Path(name).suffix}", image), (f"{index:04}.json", info)]
    return write_tar(tmp_path / "test.tar", members)


@pytest.mark.parametrize(
    ("task", "names"),
    [("caption", {"cider", "bleu_4", "exact_match"}), ("retrieval", {"itc", "itm"}), ("filter", {"auc", "recall"})],
)
def test_scores_are_printed_and_written(
    task: str,
    names: set[str],
    checkpoint: Path,
    shard: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(captioning, "java_runs", lambda: False)  # METEOR takes ten seconds
    if task == "caption":
        pytest.importorskip("pycocoevalcap")
    out = tmp_path / "scores" / f"{task}.json"
    words = ["evaluate", task, "--model", str(checkpoint), "--data", str(shard), "--out", str(out)]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads(out.read_text())
    assert names <= printed.keys()
    assert {name: written[name] for name in printed} == printed
    assert written["task"] == task
    assert len(written.get("predictions", PAIRS)) == len(PAIRS)


def test_limit_takes_the_first_samples(checkpoint: Path, shard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "retrieval", "--model", str(checkpoint), "--data", str(shard), "--limit", "2"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 2


def test_an_unknown_task_names_the_known(checkpoint: Path, shard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "poetry", "--model", str(checkpoint), "--data", str(shard)]) == 2
    message = capsys.readouterr().err
    assert "retrieval" in message
    assert message.count("\n") == 1
