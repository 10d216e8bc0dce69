"""The commands with a tiny BLIP-2 checkpoint: what they print is what the predictor says."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import openblip
from openblip.checkpoints.checkpoint import save_native
from openblip.metrics import captioning
from shared_files import as_json, write_tar
from tiny_blip2 import tiny_blip2

QUESTIONS = ["what is it?", "how many cats are there?"]
TEXTS = ["a red dog", "a green tree"]
PAIRS = [("a.png", "a red dog"), ("b.jpg", "a photo of two cats"), ("deeper/c.webp", "a blue car")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It can do everything."""
    path = tmp_path_factory.mktemp("blip2")
    save_native(path, tiny_blip2(("itc", "itm", "itg"), "opt"))
    return path


@pytest.fixture
def shard(tmp_path: Path, image_folder: Path) -> Path:
    members = []
    for index, (name, caption) in enumerate(PAIRS):
        question, label = QUESTIONS[index % 2], ["dog", "cat"][index % 2]
        noise = None if index else "shop"
        info = as_json(caption=caption, question=question, answers=["two", "yes"], label=label, noise=noise)
        image = (image_folder / name).read_bytes()
        members += [(f"{index:04}{Path(name).suffix}", image), (f"{index:04}.json", info)]
    return write_tar(tmp_path / "00000.tar", members)


def test_caption(run: Any, folder: Path, image_folder: Path) -> None:
    image = image_folder / "a.png"
    [line] = run("caption", image, "--model", folder, "--prompt", "a small", "--num-beams", "2").lines
    caption = openblip.load(folder).caption(image, "a small", openblip.Beam(num_beams=2), return_scores=True)
    assert (line["caption"], line["logprob"]) == (caption.text, pytest.approx(caption.logprob, abs=1e-4))


@pytest.mark.parametrize("more", [[], ["--num-beams", "2"]])
def test_answer(run: Any, folder: Path, image_folder: Path, more: list[str]) -> None:
    """By the paper's decoding, five beams and a length penalty of -1, but for what is given."""
    image, num_beams = image_folder / "a.png", 2 if more else 5
    decoding = openblip.Beam(num_beams=num_beams, max_new_tokens=10, min_new_tokens=1, length_penalty=-1.0)
    lines = run("answer", image, *QUESTIONS, "--model", folder, *more).lines
    assert [line["answer"] for line in lines] == openblip.load(folder).answer(image, QUESTIONS, decoding=decoding)


def test_match(run: Any, folder: Path, image_folder: Path, shard: Path) -> None:
    """Texts for one image, and every image with its own caption."""
    model, pairs = openblip.load(folder), [("a.png", text) for text in TEXTS] + PAIRS
    lines = run("match", image_folder / "a.png", *TEXTS, "--model", folder).lines
    lines += run("match", shard, "--model", folder).lines
    for line, (name, text) in zip(lines, pairs, strict=True):
        image = image_folder / name
        assert line["match"] == pytest.approx(model.match(image, text).item(), abs=1e-5)
        assert line["similarity"] == pytest.approx(model.similarity(image, text).item(), abs=1e-5)


@pytest.mark.parametrize(
    ("task", "score"),
    [
        ("caption", "cider"),
        ("retrieval", "itc"),
        ("filter", "auc"),
        ("vqa", "accuracy"),
        ("classification", "num_classes"),
    ],
)
def test_evaluate(run: Any, folder: Path, shard: Path, monkeypatch: pytest.MonkeyPatch, task: str, score: str) -> None:
    monkeypatch.setattr(captioning, "java_runs", lambda: False)  # METEOR takes ten seconds
    scores = json.loads(run("evaluate", task, "--model", folder, "--data", shard).out)
    assert score in json.dumps(scores)
    assert scores["num_rejects"] == 0


def test_evaluate_says_what_it_cannot(run: Any, folder: Path, shard: Path) -> None:
    run("evaluate", "nlvr", "--model", folder, "--data", shard, code=2)


def test_capfilt(run: Any, folder: Path, shard: Path, tmp_path: Path, image_folder: Path) -> None:
    """Captioner and filter are one checkpoint; each score is that of the pair alone."""
    out = tmp_path / "out"
    words = ["capfilt", shard, "--captioner", folder, "--filter", folder, "--out", out, "--num-captions", "2"]
    run(*words)
    rows = pq.read_table(out / "captions" / "00000.parquet").to_pylist()
    assert [row["source"] for row in rows] == ["web", "synthetic", "synthetic"] * 3
    model = openblip.load(folder)
    for row in rows:
        image = image_folder / PAIRS[int(row["key"])][0]
        if row["caption"].strip():
            assert row["itm"] == pytest.approx(model.match(image, row["caption"]).item(), abs=1e-5)
            assert row["itc"] == pytest.approx(model.similarity(image, row["caption"]).item(), abs=1e-5)
        assert (row["logprob"] is None) == (row["source"] == "web")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["models"]["captioner"] == manifest["models"]["filter"]
    run(*words)  # resumes: nothing to do
