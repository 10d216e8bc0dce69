"""`openblip evaluate` against a tiny real checkpoint and a few pairs with known truth."""

import json
from pathlib import Path
from typing import Any

import pytest

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
    run: Any, task: str, names: set[str], checkpoint: Path, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captioning, "java_runs", lambda: False)  # METEOR takes ten seconds
    if task == "caption":
        pytest.importorskip("pycocoevalcap")
    out = tmp_path / "scores" / f"{task}.json"
    printed = json.loads(run("evaluate", task, "--model", checkpoint, "--data", shard, "--out", out).out)
    written = json.loads(out.read_text())
    assert names <= printed.keys()
    if "calibration" in written:  # whose curve is in the file alone
        assert written["calibration"].pop("reliability")
    assert {name: written[name] for name in printed} == printed
    assert (written["task"], written["dtype"]) == (task, "float32")
    assert len(written.get("predictions", PAIRS)) == len(PAIRS)


def test_several_sources_are_measured_together(run: Any, refusal: Any, checkpoint: Path, shard: Path) -> None:
    other = shard.parent / "other" / shard.name
    other.parent.mkdir()
    other.write_bytes(shard.read_bytes())
    words = ["evaluate", "retrieval", "--model", checkpoint, "--data"]
    assert json.loads(run(*words, f"{shard},{other}").out)["num_images"] == 2 * len(PAIRS)
    assert "leave out the weights" in refusal(*words, f"{shard}@1,{other}@2")


def test_limit_takes_the_first_samples(run: Any, checkpoint: Path, shard: Path) -> None:
    printed = run("evaluate", "retrieval", "--model", checkpoint, "--data", shard, "--limit", "2").out
    assert json.loads(printed)["num_images"] == 2


def test_nothing_to_score_is_an_error_unless_results_are_written(
    run: Any, refusal: Any, checkpoint: Path, answerer: Path, image_folder: Path, tmp_path: Path
) -> None:
    rows = [{"image": f"images/{name}", "question": "what is it?", "question_id": 5} for name, _, _ in PAIRS]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data", tmp_path / "test.jsonl", "--model"]
    for task, missing in (("caption", "captions"), ("retrieval", "captions"), ("vqa", "answers"), ("nlvr", "a label")):
        assert f"no sample has {missing}" in refusal("evaluate", task, *words, checkpoint)
    results = tmp_path / "results.json"
    run("evaluate", "vqa", *words, answerer, "--results", results)
    assert len(json.loads(results.read_text())) == len(PAIRS)


def test_an_unknown_task_names_the_known(refusal: Any, checkpoint: Path, shard: Path) -> None:
    assert "retrieval" in refusal("evaluate", "poetry", "--model", checkpoint, "--data", shard)
