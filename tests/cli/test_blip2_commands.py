"""The commands with a tiny BLIP-2 checkpoint: what they print is what the predictor says."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import openblip
from openblip.checkpoints.checkpoint import save_native
from openblip.cli.main import main
from openblip.metrics import captioning
from shared_files import as_json, printed, write_tar
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
        info = as_json(
            caption=caption,
            question=QUESTIONS[index % 2],
            answers=["two", "yes"],
            label=["dog", "cat"][index % 2],
            noise=None if index else "shop",
        )
        image = (image_folder / name).read_bytes()
        members += [(f"{index:04}{Path(name).suffix}", image), (f"{index:04}.json", info)]
    return write_tar(tmp_path / "00000.tar", members)


def test_caption(folder: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(image_folder / "a.png")
    assert main(["caption", image, "--model", str(folder), "--prompt", "a small", "--num-beams", "2"]) == 0
    [line] = printed(capsys)
    decoding = openblip.Beam(num_beams=2)
    caption = openblip.load(folder).caption(image, "a small", decoding, return_scores=True)
    assert (line["caption"], line["logprob"]) == (caption.text, pytest.approx(caption.logprob, abs=1e-4))


@pytest.mark.parametrize("more", [[], ["--num-beams", "2"]])
def test_answer(folder: Path, image_folder: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    """By the paper's decoding, five beams and a length penalty of -1, but for what is given."""
    image = str(image_folder / "a.png")
    assert main(["answer", image, *QUESTIONS, "--model", str(folder), *more]) == 0
    num_beams = 2 if more else 5
    decoding = openblip.Beam(num_beams=num_beams, max_new_tokens=10, min_new_tokens=1, length_penalty=-1.0)
    expected = openblip.load(folder).answer(image, QUESTIONS, decoding=decoding)
    assert [line["answer"] for line in printed(capsys)] == expected


def test_match(folder: Path, image_folder: Path, shard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts for one image, and every image with its own caption."""
    image, model = str(image_folder / "a.png"), openblip.load(folder)
    assert main(["match", image, *TEXTS, "--model", str(folder)]) == 0
    for line, text in zip(printed(capsys), TEXTS, strict=True):
        assert line["match"] == pytest.approx(model.match(image, text).item(), abs=1e-5)
        assert line["similarity"] == pytest.approx(model.similarity(image, text).item(), abs=1e-5)
    assert main(["match", str(shard), "--model", str(folder)]) == 0
    for line, (name, caption) in zip(printed(capsys), PAIRS, strict=True):
        image = image_folder / name
        assert line["match"] == pytest.approx(model.match(image, caption).item(), abs=1e-5)
        assert line["similarity"] == pytest.approx(model.similarity(image, caption).item(), abs=1e-5)


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
def test_evaluate(
    folder: Path,
    shard: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    score: str,
) -> None:
    monkeypatch.setattr(captioning, "java_runs", lambda: False)  # METEOR takes ten seconds
    assert main(["evaluate", task, "--model", str(folder), "--data", str(shard)]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert score in json.dumps(scores)
    assert scores["num_rejects"] == 0


def test_evaluate_says_what_it_cannot(folder: Path, shard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "nlvr", "--model", str(folder), "--data", str(shard)]) != 0


def test_capfilt(folder: Path, shard: Path, tmp_path: Path, image_folder: Path) -> None:
    """Captioner and filter are one checkpoint; each score is that of the pair alone."""
    out = tmp_path / "out"
    command = ["capfilt", str(shard), "--captioner", str(folder), "--filter", str(folder), "--out", str(out)]
    assert main([*command, "--num-captions", "2"]) == 0
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
    assert manifest["captioner"]["sha256"] == manifest["filter"]["sha256"]
    assert main([*command, "--num-captions", "2"]) == 0  # resumes: nothing to do
