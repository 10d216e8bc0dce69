"""`openblip match` against a tiny real checkpoint."""

import json
from pathlib import Path

import pytest

import openblip
from openblip.cli.main import main

TEXTS = ["a red dog", "the small cat below a big tree"]


def test_one_line_per_text_with_both_scores(
    checkpoint: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(pictures / "a.png")
    assert main(["match", image, *TEXTS, "--model", str(checkpoint)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model = openblip.load(checkpoint)
    assert [line["text"] for line in lines] == TEXTS
    assert [line["match"] for line in lines] == pytest.approx(
        model.match([image] * 2, TEXTS).tolist(), abs=1e-5
    )
    assert [line["similarity"] for line in lines] == pytest.approx(
        model.similarity(image, TEXTS)[0].tolist(), abs=1e-5
    )


def test_a_checkpoint_that_cannot_match_says_what_it_can(
    captioner: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["match", str(pictures / "a.png"), *TEXTS, "--model", str(captioner)]) == 2
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


def test_a_text_is_needed(checkpoint: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["match", str(pictures / "a.png"), "--model", str(checkpoint)]) == 2
    assert "no text" in capsys.readouterr().err
