"""`openblip match` against a tiny real checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

import openblip
from marks import slow
from openblip.cli.main import main
from shared_files import json_lines, printed, read_lines

TEXTS = ["a red dog", "the small cat below a big tree"]


def test_one_line_per_text_with_both_scores(
    checkpoint: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(image_folder / "a.png")
    assert main(["match", image, *TEXTS, "--model", str(checkpoint)]) == 0
    lines = printed(capsys)
    model = openblip.load(checkpoint)
    assert [line["text"] for line in lines] == TEXTS
    assert [line["match"] for line in lines] == pytest.approx(model.match([image] * 2, TEXTS).tolist(), abs=1e-5)
    assert [line["similarity"] for line in lines] == pytest.approx(model.similarity(image, TEXTS)[0].tolist(), abs=1e-5)


def test_a_checkpoint_that_cannot_match_says_what_it_can(
    captioner: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["match", str(image_folder / "a.png"), *TEXTS, "--model", str(captioner)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "caption" in captured.err


@pytest.mark.parametrize("image", ["gone.png", "text.png"])
def test_an_unreadable_image_is_named(
    checkpoint: Path, tmp_path: Path, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no image")
    assert main(["match", str(tmp_path / image), *TEXTS, "--model", str(checkpoint)]) == 2
    captured = capsys.readouterr().err
    assert image in captured
    assert captured.count("\n") == 1


def test_a_text_is_needed(checkpoint: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["match", str(image_folder / "a.png"), "--model", str(checkpoint)]) == 2
    assert "no text" in capsys.readouterr().err


def same_scores(found: list[dict[str, Any]], match: list[float], similarity: list[float]) -> None:
    assert [line["match"] for line in found] == pytest.approx(match, abs=1e-5)
    assert [line["similarity"] for line in found] == pytest.approx(similarity, abs=1e-5)


def test_every_image_of_a_folder_is_scored_with_the_texts(
    checkpoint: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["match", str(image_folder), *TEXTS, "--model", str(checkpoint), "--batch-size", "2"]
    assert main(words) == 0
    lines = printed(capsys)
    images = [image_folder / name for name in ("a.png", "b.jpg", "deeper/c.webp")]
    assert [list(line) for line in lines] == [["key", "text", "match", "similarity"]] * 6
    assert [(line["key"], line["text"]) for line in lines] == [(str(i), t) for i in images for t in TEXTS]
    model = openblip.load(checkpoint)
    same_scores(
        lines, model.match_matrix(images, TEXTS).flatten().tolist(), model.similarity(images, TEXTS).flatten().tolist()
    )
    out = tmp_path / "scores.jsonl"
    assert main([*words, "--out", str(out)]) == 0
    assert [line["text"] for line in read_lines(out)] == TEXTS * 3


def test_without_texts_each_sample_is_scored_with_its_own_captions(
    checkpoint: Path, image_folder: Path, tmp_path: Path
) -> None:
    captions = {"a.png": ["a red dog"], "b.jpg": ["two cars", "a tree", "a cat"]}
    table = tmp_path / "rows.jsonl"
    table.write_text(
        "".join(
            json.dumps({"image": f"images/{name}", "captions": texts, "key": name}) + "\n"
            for name, texts in captions.items()
        )
    )
    out = tmp_path / "scores.jsonl"
    assert main(["match", str(table), "--model", str(checkpoint), "--out", str(out)]) == 0
    lines = read_lines(out)
    assert [list(line) for line in lines] == [["shard", "key", "caption", "match", "similarity"]] * 4
    pairs = [(name, text) for name, texts in captions.items() for text in texts]
    assert [(line["key"], line["caption"]) for line in lines] == pairs
    model = openblip.load(checkpoint)
    images, texts = [image_folder / name for name, _ in pairs], [text for _, text in pairs]
    same_scores(lines, model.match(images, texts).tolist(), model.similarity(images, texts).diagonal().tolist())


def test_the_captions_of_a_folder_are_beside_its_images(
    checkpoint: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "a.txt").write_text("a red dog\n")
    (image_folder / "b.json").write_text('{"captions": ["two cars", "a tree"]}')
    assert main(["match", str(image_folder), "--model", str(checkpoint)]) == 1
    captured = capsys.readouterr()
    lines = json_lines(captured.out)
    assert [(Path(line["key"]).name, line["caption"]) for line in lines] == [
        ("a.png", "a red dog"),
        ("b.jpg", "two cars"),
        ("b.jpg", "a tree"),
    ]
    assert "deeper/c.webp: it has no caption to score" in captured.err
    assert "scored 2 images, skipped 1" in captured.err


def test_a_folder_without_any_text_is_refused(
    checkpoint: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["match", str(image_folder), "--model", str(checkpoint)]) == 2
    captured = capsys.readouterr()
    assert "no text" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(("model", "missing"), [("matcher", "similarity"), ("embedder", "match")])
def test_a_score_without_weights_is_null(
    model: str, missing: str, image_folder: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    (image_folder / "a.txt").write_text("a red dog\n")
    source = str(request.getfixturevalue(model))
    for words in ([str(image_folder / "a.png"), TEXTS[0]], [str(image_folder), TEXTS[0]], [str(image_folder)]):
        main(["match", *words, "--model", source])
        line = json.loads(capsys.readouterr().out.splitlines()[0])
        assert line.pop(missing) is None
        assert None not in line.values()


def test_unreadable_images_are_named_skipped_and_counted(
    checkpoint: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "bad.jpg").write_bytes(b"no image")
    out = tmp_path / "scores.jsonl"
    assert main(["match", str(image_folder), *TEXTS, "--model", str(checkpoint), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "bad.jpg" in captured.err
    assert "scored 3 images, skipped 1" in captured.err
    assert len(read_lines(out)) == 6


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("cut", [30, *slow(0)])
def test_a_killed_run_is_continued_to_the_same_file(
    checkpoint: Path, image_folder: Path, tmp_path: Path, own: bool, cut: int
) -> None:
    for name in ("a", "b", "deeper/c"):
        (image_folder / f"{name}.json").write_text(json.dumps({"captions": [f"{name} dog", "a cat", "a tree"]}))
    out = tmp_path / "scores.jsonl"
    words = ["match", str(image_folder), *([] if own else TEXTS), "--model", str(checkpoint), "--out", str(out)]
    assert main(words) == 0
    whole = read_lines(out)
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == (9 if own else 6)
    for count in range(len(lines)):
        out.write_bytes(b"".join(lines[:count]) + lines[count][:cut])
        assert main(words) == 0
        assert [(line["key"], line.get("text", line.get("caption"))) for line in read_lines(out)] == [
            (line["key"], line.get("text", line.get("caption"))) for line in whole
        ]


def test_a_file_of_other_texts_or_of_captions_is_not_touched(
    checkpoint: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.jsonl"
    common = ["--model", str(checkpoint), "--out", str(out)]
    assert main(["match", str(image_folder), *TEXTS, *common]) == 0
    before = out.read_bytes()
    (image_folder / "a.txt").write_text("a red dog\n")
    for words in (
        ["match", str(image_folder), *TEXTS[::-1]],
        ["match", str(image_folder)],
        ["caption", str(image_folder)],
    ):
        capsys.readouterr()
        assert main([*words, *common]) == 2
        captured = capsys.readouterr().err
        assert f"{out}:1" in captured
        assert captured.count("\n") == 1
        assert out.read_bytes() == before


def test_one_image_with_out_is_a_source_of_one(checkpoint: Path, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    image = str(image_folder / "a.png")
    assert main(["match", image, *TEXTS, "--model", str(checkpoint), "--out", str(out)]) == 0
    assert [(line["key"], line["text"]) for line in read_lines(out)] == [(image, text) for text in TEXTS]


def test_the_encoder_token_reaches_the_model(
    checkpoint: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, found = str(image_folder / "a.png"), {}
    for token in ("[ENC]", "[CLS]"):
        assert main(["match", image, TEXTS[0], "--model", str(checkpoint), "--encoder-token", token]) == 0
        found[token] = json.loads(capsys.readouterr().out)["match"]
        model = openblip.load(checkpoint, encoder_token=token)
        assert found[token] == pytest.approx(model.match([image], TEXTS[:1]).item(), abs=1e-5)
    assert found["[ENC]"] != pytest.approx(found["[CLS]"], abs=1e-6)


def test_a_file_without_an_images_ending_is_still_an_image(
    checkpoint: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "a.png").rename(image_folder / "image")
    assert main(["match", str(image_folder / "image"), *TEXTS, "--model", str(checkpoint)]) == 0
    assert [list(line) for line in printed(capsys)] == [["text", "match", "similarity"]] * 2
