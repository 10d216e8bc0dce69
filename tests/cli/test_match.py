"""`openblip match` against a tiny real checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

import openblip
from marks import slow
from shared_files import read_lines

TEXTS = ["a red dog", "the small cat below a big tree"]


def same_scores(lines: list[dict[str, Any]], match: Any, similarity: Any) -> None:
    assert [line["match"] for line in lines] == pytest.approx(match.flatten().tolist(), abs=1e-5)
    assert [line["similarity"] for line in lines] == pytest.approx(similarity.flatten().tolist(), abs=1e-5)


def test_one_line_per_text_with_both_scores(run: Any, checkpoint: Path, image_folder: Path) -> None:
    image = image_folder / "a.png"
    lines = run("match", image, *TEXTS, "--model", checkpoint).lines
    model = openblip.load(checkpoint)
    assert [line["text"] for line in lines] == TEXTS
    same_scores(lines, model.match([image] * 2, TEXTS), model.similarity(image, TEXTS))


@pytest.mark.parametrize("own", [True, False])
def test_clips_are_scored_by_their_frames(run: Any, checkpoint: Path, clips: Path, own: bool) -> None:
    for name in ("one", "two", "photo"):
        (clips / f"{name}.txt").write_text(f"{TEXTS[0]}\n")
    lines = run("match", clips, *TEXTS[: not own], "--model", checkpoint, "--num-frames", 3, code=1).lines
    assert [Path(line["key"]).name for line in lines] == ["one.mp4", "photo.png", "two.mp4"]
    model = openblip.load(checkpoint)
    one = model.encode_videos(str(clips / "one.mp4"), 3)
    same_scores(lines[:1], model.match(one, TEXTS[:1]), model.similarity(one, TEXTS[:1]))


def test_what_cannot_be_matched_is_refused(
    refusal: Any, checkpoint: Path, captioner: Path, image_folder: Path, tmp_path: Path
) -> None:
    image = image_folder / "a.png"
    assert "caption" in refusal("match", image, *TEXTS, "--model", captioner)  # says what it can do
    (tmp_path / "text.png").write_text("no image")
    for name in ("gone.png", "text.png"):
        assert name in refusal("match", tmp_path / name, *TEXTS, "--model", checkpoint)
    for source in (image, image_folder):
        assert "no text" in refusal("match", source, "--model", checkpoint)


def test_every_image_of_a_folder_is_scored_with_the_texts(
    run: Any, checkpoint: Path, image_folder: Path, tmp_path: Path
) -> None:
    words = ["match", image_folder, *TEXTS, "--model", checkpoint, "--batch-size", "2"]
    lines = run(*words).lines
    images = [image_folder / name for name in ("a.png", "b.jpg", "deeper/c.webp")]
    assert [list(line) for line in lines] == [["key", "text", "match", "similarity"]] * 6
    assert [(line["key"], line["text"]) for line in lines] == [(str(i), t) for i in images for t in TEXTS]
    model = openblip.load(checkpoint)
    same_scores(lines, model.match_matrix(images, TEXTS), model.similarity(images, TEXTS))
    run(*words, "--out", tmp_path / "scores.jsonl")
    assert [line["text"] for line in read_lines(tmp_path / "scores.jsonl")] == TEXTS * 3


def test_without_texts_each_sample_is_scored_with_its_own_captions(
    run: Any, checkpoint: Path, image_folder: Path, tmp_path: Path
) -> None:
    captions = {"a.png": ["a red dog"], "b.jpg": ["two cars", "a tree", "a cat"]}
    rows = [{"image": f"images/{name}", "captions": texts, "key": name} for name, texts in captions.items()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "scores.jsonl"
    run("match", tmp_path / "rows.jsonl", "--model", checkpoint, "--out", out)
    lines = read_lines(out)
    assert [list(line) for line in lines] == [["shard", "key", "caption", "match", "similarity"]] * 4
    pairs = [(name, text) for name, texts in captions.items() for text in texts]
    assert [(line["key"], line["caption"]) for line in lines] == pairs
    model = openblip.load(checkpoint)
    images, texts = [image_folder / name for name, _ in pairs], [text for _, text in pairs]
    same_scores(lines, model.match(images, texts), model.similarity(images, texts).diagonal())


def test_the_captions_of_a_folder_are_beside_its_images(run: Any, checkpoint: Path, image_folder: Path) -> None:
    (image_folder / "a.txt").write_text("a red dog\n")
    (image_folder / "b.json").write_text('{"captions": ["two cars", "a tree"]}')
    printed = run("match", image_folder, "--model", checkpoint, code=1)
    pairs = [("a.png", "a red dog"), ("b.jpg", "two cars"), ("b.jpg", "a tree")]
    assert [(Path(line["key"]).name, line["caption"]) for line in printed.lines] == pairs
    assert "deeper/c.webp: it has no caption to score" in printed.err
    assert "scored 2 images, skipped 1" in printed.err


@pytest.mark.parametrize(("model", "missing"), [("matcher", "similarity"), ("embedder", "match")])
def test_a_score_without_weights_is_null(
    run: Any, model: str, missing: str, image_folder: Path, request: pytest.FixtureRequest
) -> None:
    for name in ("a.txt", "b.txt", "deeper/c.txt"):
        (image_folder / name).write_text("a red dog\n")
    more = ["--model", request.getfixturevalue(model)]
    for words in ([image_folder / "a.png", TEXTS[0]], [image_folder, TEXTS[0]], [image_folder]):
        line = run("match", *words, *more).lines[0]
        assert line.pop(missing) is None
        assert None not in line.values()


def test_unreadable_images_are_named_skipped_and_counted(
    run: Any, checkpoint: Path, image_folder: Path, tmp_path: Path
) -> None:
    (image_folder / "bad.jpg").write_bytes(b"no image")
    out = tmp_path / "scores.jsonl"
    printed = run("match", image_folder, *TEXTS, "--model", checkpoint, "--out", out, code=1)
    assert printed.out == ""
    assert "bad.jpg" in printed.err
    assert "scored 3 images, skipped 1" in printed.err
    assert len(read_lines(out)) == 6


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("cut", [30, *slow(0)])
def test_a_killed_run_is_continued_to_the_same_file(
    run: Any, checkpoint: Path, image_folder: Path, tmp_path: Path, own: bool, cut: int
) -> None:
    for name in ("a", "b", "deeper/c"):
        (image_folder / f"{name}.json").write_text(json.dumps({"captions": [f"{name} dog", "a cat", "a tree"]}))
    out, field = tmp_path / "scores.jsonl", "caption" if own else "text"
    words = ["match", image_folder, *([] if own else TEXTS), "--model", checkpoint, "--out", out]
    run(*words)
    whole = [(line["key"], line[field]) for line in read_lines(out)]
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == (9 if own else 6)
    for count in range(len(lines)):
        out.write_bytes(b"".join(lines[:count]) + lines[count][:cut])
        run(*words)
        assert [(line["key"], line[field]) for line in read_lines(out)] == whole


def test_a_file_of_other_texts_or_of_captions_is_not_touched(
    run: Any, refusal: Any, checkpoint: Path, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.jsonl"
    common = ["--model", checkpoint, "--out", out]
    run("match", image_folder, *TEXTS, *common)
    before = out.read_bytes()
    (image_folder / "a.txt").write_text("a red dog\n")
    for texts in (TEXTS[::-1], []):
        assert "texts was ['a red dog'," in refusal("match", image_folder, *texts, *common)
        assert out.read_bytes() == before


def test_one_image_with_out_is_a_source_of_one(run: Any, checkpoint: Path, image_folder: Path, tmp_path: Path) -> None:
    image, out = image_folder / "a.png", tmp_path / "scores.jsonl"
    run("match", image, *TEXTS, "--model", checkpoint, "--out", out)
    assert [(line["key"], line["text"]) for line in read_lines(out)] == [(str(image), text) for text in TEXTS]


def test_the_encoder_token_reaches_the_model(run: Any, checkpoint: Path, image_folder: Path) -> None:
    image, scores = image_folder / "a.png", {}
    for token in ("[ENC]", "[CLS]"):
        [line] = run("match", image, TEXTS[0], "--model", checkpoint, "--encoder-token", token).lines
        scores[token] = line["match"]
        model = openblip.load(checkpoint, encoder_token=token)
        assert scores[token] == pytest.approx(model.match([image], TEXTS[:1]).item(), abs=1e-5)
    assert scores["[ENC]"] != pytest.approx(scores["[CLS]"], abs=1e-6)


def test_a_file_without_an_images_ending_is_still_an_image(run: Any, checkpoint: Path, image_folder: Path) -> None:
    (image_folder / "a.png").rename(image_folder / "image")
    lines = run("match", image_folder / "image", *TEXTS, "--model", checkpoint).lines
    assert [list(line) for line in lines] == [["text", "match", "similarity"]] * 2
