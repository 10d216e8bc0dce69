"""`openblip caption --sidecar`: text files beside the images, left alone, continued, refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import openblip
from openblip.cli.caption import SidecarOptions
from openblip.cli.main import main
from shared_files import read_lines


@pytest.fixture
def words(captioner: Path, image_folder: Path) -> list[str]:
    return ["caption", str(image_folder), "--model", str(captioner), "--sidecar"]


def texts(folder: Path, suffix: str = ".txt") -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob(f"*{suffix}"))}


def expected(captioner: Path, image_folder: Path) -> dict[str, str]:
    model = openblip.load(captioner)
    return {
        str(Path(name).with_suffix(".txt")): model.caption(image_folder / name)
        for name in ("a.png", "b.jpg", "deeper/c.webp")
    }


def count_captioned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that reach the model from now on."""
    sizes: list[int] = []
    caption = openblip.BlipPredictor.caption

    def counting(self: openblip.BlipPredictor, images: Any, *rest: Any, **options: Any) -> Any:
        sizes.append(len(images))
        return caption(self, images, *rest, **options)

    monkeypatch.setattr(openblip.BlipPredictor, "caption", counting)
    return sizes


def test_each_image_gets_its_caption_beside_it_and_nothing_is_printed(
    words: list[str], captioner: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    assert texts(image_folder) == {name: f"{text}\n" for name, text in expected(captioner, image_folder).items()}
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "captioned 3 images, skipped 0" in captured.err
    assert sorted(file.suffix for file in image_folder.rglob("*") if file.is_file()) == [
        ".jpg", ".png", ".txt", ".txt", ".txt", ".webp",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prefix", "suffix", "line"),
    [
        ("", "", "a dog"),
        ("ohwx", "", "ohwx a dog"),
        ("ohwx,", "film grain", "ohwx, a dog film grain"),
        ("ohwx, ", ", film grain", "ohwx, a dog, film grain"),
        ("", " film grain", "a dog film grain"),
        ("", ".", "a dog."),
    ],
)
def test_prefix_and_suffix_are_joined_by_one_blank_where_there_is_none(prefix: str, suffix: str, line: str) -> None:
    assert SidecarOptions(sidecar=True, prefix=prefix, suffix=suffix).line("a dog") == line


def test_an_empty_caption_leaves_no_doubled_blanks() -> None:
    assert SidecarOptions(sidecar=True, prefix="ohwx,", suffix="film").line("") == "ohwx, film"


def test_prefix_and_suffix_are_in_the_files_and_not_in_the_lines(
    words: list[str], captioner: Path, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "lines.jsonl"
    more = ["--prefix", "ohwx,", "--suffix", ", film", "--extension", ".caption", "--out", str(out)]
    assert main([*words, *more]) == 0
    captions = expected(captioner, image_folder)
    assert texts(image_folder, ".caption") == {
        str(Path(name).with_suffix(".caption")): f"ohwx, {text}, film\n" for name, text in captions.items()
    }
    lines = [line["caption"] for line in read_lines(out)]
    assert lines == list(captions.values())


def test_several_captions_are_lines_of_the_file(words: list[str], image_folder: Path) -> None:
    assert main([*words, "--num-captions", "2", "--prefix", "x"]) == 0
    for text in texts(image_folder).values():
        assert text.endswith("\n")
        assert [line.startswith("x ") for line in text.splitlines()] == [True, True]


def test_images_that_have_a_text_file_are_left_alone(
    words: list[str], image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "a.txt").write_text("mine")
    sizes = count_captioned(monkeypatch)
    assert main(words) == 0
    assert (image_folder / "a.txt").read_text() == "mine"
    assert sum(sizes) == 2
    assert "captioned 2 images, skipped 0, left 1 alone that have a .txt file" in capsys.readouterr().err
    assert main(words) == 0
    assert sum(sizes) == 2
    assert "left 3 alone" in capsys.readouterr().err


def test_overwrite_writes_them_anew(words: list[str], captioner: Path, image_folder: Path) -> None:
    (image_folder / "a.txt").write_text("mine")
    assert main([*words, "--overwrite"]) == 0
    assert (image_folder / "a.txt").read_text() == expected(captioner, image_folder)["a.txt"] + "\n"


def test_a_stopped_run_goes_on_by_the_text_files(
    words: list[str], image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert main([*words, "--batch-size", "1"]) == 130
    assert list(texts(image_folder)) == ["a.txt"]
    sizes = count_captioned(monkeypatch)
    assert main(words) == 0
    assert sum(sizes) == 2
    assert len(texts(image_folder)) == 3


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_lines_whose_text_files_a_stopped_run_did_not_write_give_them(
    words: list[str], captioner: Path, image_folder: Path, tmp_path: Path, more: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "lines.jsonl"
    words = [*words, "--out", str(out), *more]
    with monkeypatch.context() as patch:
        stop_after(patch, 1)  # after the lines of all three
        assert main(words) == 130
    assert len(texts(image_folder)) == 1
    assert len(out.read_text().splitlines()) == 3
    whole = {name: f"{text}\n" for name, text in expected(captioner, image_folder).items()}
    sizes = count_captioned(monkeypatch)
    assert main(words) == 0
    assert sum(sizes) == 0
    assert texts(image_folder) == whole
    assert len(out.read_text().splitlines()) == 3


def stop_after(patch: pytest.MonkeyPatch, count: int) -> None:
    """Ctrl-C once so many text files are written."""
    write = SidecarOptions.write
    written: list[str] = []

    def stopping(self: SidecarOptions, *what: Any) -> None:
        if len(written) == count:
            raise KeyboardInterrupt
        write(self, *what)
        written.append("")

    patch.setattr(SidecarOptions, "write", stopping)


def test_a_text_file_is_never_half_there(words: list[str], image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (image_folder / "a.txt").write_text("mine")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    assert main([*words, "--overwrite"]) == 130
    assert texts(image_folder) == {"a.txt": "mine"}


def test_two_images_of_one_text_file_are_refused_before_anything_is_written(
    words: list[str], image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(image_folder / "b.jpg", image_folder / "a.jpg")
    assert main(words) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1
    assert all(str(image_folder / name) in captured for name in ("a.jpg", "a.png", "a.txt"))
    assert texts(image_folder) == {}


def test_an_unreadable_image_is_named_and_gets_no_text_file(
    words: list[str], image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "bad.jpg").write_bytes(b"no image")
    words.insert(1, str(tmp_path / "nowhere" / "gone.png"))
    assert main(words) == 1
    captured = capsys.readouterr().err
    assert "bad.jpg" in captured
    assert "gone.png" in captured
    assert "captioned 3 images, skipped 2" in captured
    assert list(texts(image_folder)) == ["a.txt", "b.txt", "deeper/c.txt"]


def test_a_folder_that_cannot_be_written_into_is_named(
    words: list[str], image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "deeper" and access(path, mode))
    assert main(words) == 2
    captured = capsys.readouterr().err
    assert str(image_folder / "deeper") in captured
    assert captured.count("\n") == 1
    assert texts(image_folder) == {}


def test_a_data_source_has_no_place_beside_its_images(
    captioner: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "rows.jsonl"
    table.write_text(json.dumps({"image": str(image_folder / "a.png"), "caption": "x"}) + "\n")
    assert main(["caption", str(table), "--model", str(captioner), "--sidecar"]) == 2
    captured = capsys.readouterr().err
    assert "rows.jsonl is no image file" in captured
    assert "--sidecar" in captured
    assert captured.count("\n") == 1
    url = "memory://folder/a.png"
    assert main(["caption", url, "--model", str(captioner), "--sidecar"]) == 2
    assert url in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prefix", "x", "--no-sidecar"], "--prefix"),
        (["--overwrite", "--no-sidecar"], "--overwrite"),
        (["--extension", "txt"], "'txt'"),
        (["--extension", "."], "'.'"),
        (["--extension", "./x"], "'./x'"),
        (["--extension", ".PNG"], ".PNG"),
        (["--suffix", "a\nb"], "one line"),
    ],
)
def test_contradicting_options_are_one_line(
    words: list[str], image_folder: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(image_folder.rglob("*"))
    assert main([*words, *more]) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1
    assert sorted(image_folder.rglob("*")) == before
