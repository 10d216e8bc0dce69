"""`openblip caption --sidecar`: text files beside the images, left alone, continued, refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import openblip
from openblip.cli.caption import SidecarOptions
from shared_files import read_lines


@pytest.fixture
def words(captioner: Path, image_folder: Path) -> list[object]:
    return ["caption", image_folder, "--model", captioner, "--sidecar"]


@pytest.fixture
def captions(captioner: Path, image_folder: Path) -> dict[str, str]:
    """What is written for each image, by the image's name without its ending."""
    model = openblip.load(captioner)
    names = ("a.png", "b.jpg", "deeper/c.webp")
    return {str(Path(name).with_suffix("")): model.caption(image_folder / name) for name in names}


def texts(folder: Path, suffix: str = ".txt") -> dict[str, str]:
    files = sorted(folder.rglob(f"*{suffix}"))
    return {str(file.relative_to(folder)).removesuffix(suffix): file.read_text() for file in files}


def test_each_image_gets_its_caption_beside_it_and_nothing_is_printed(
    run: Any, words: list[object], captions: dict[str, str], image_folder: Path
) -> None:
    printed = run(*words)
    assert texts(image_folder) == {name: f"{text}\n" for name, text in captions.items()}
    assert printed.out == ""
    assert "captioned 3 images, skipped 0" in printed.err
    suffixes = sorted(file.suffix for file in image_folder.rglob("*") if file.is_file())
    assert suffixes == [".jpg", ".png", ".txt", ".txt", ".txt", ".webp"]


@pytest.mark.parametrize(
    ("prefix", "suffix", "caption", "line"),
    [
        ("", "", "a dog", "a dog"),
        ("ohwx", "", "a dog", "ohwx a dog"),
        ("ohwx,", "film grain", "a dog", "ohwx, a dog film grain"),
        ("ohwx, ", ", film grain", "a dog", "ohwx, a dog, film grain"),
        ("", " film grain", "a dog", "a dog film grain"),
        ("", ".", "a dog", "a dog."),
        ("ohwx,", "film", "", "ohwx, film"),
    ],
)
def test_prefix_and_suffix_are_joined_by_one_space_where_there_is_none(
    prefix: str, suffix: str, caption: str, line: str
) -> None:
    assert SidecarOptions(sidecar=True, prefix=prefix, suffix=suffix).line(caption) == line


def test_prefix_and_suffix_are_in_the_files_and_not_in_the_lines(
    run: Any, words: list[object], captions: dict[str, str], image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "lines.jsonl"
    run(*words, "--prefix", "ohwx,", "--suffix", ", film", "--extension", ".caption", "--out", out)
    assert texts(image_folder, ".caption") == {name: f"ohwx, {text}, film\n" for name, text in captions.items()}
    assert [line["caption"] for line in read_lines(out)] == list(captions.values())


def test_several_captions_are_lines_of_the_file(run: Any, words: list[object], image_folder: Path) -> None:
    run(*words, "--num-captions", "2", "--prefix", "x")
    for text in texts(image_folder).values():
        assert text.endswith("\n")
        assert [line.startswith("x ") for line in text.splitlines()] == [True, True]


def test_images_that_have_a_text_file_are_left_alone(
    run: Any, watch: Any, words: list[object], image_folder: Path
) -> None:
    (image_folder / "a.txt").write_text("mine")
    sizes = watch("caption")
    assert "captioned 2 images, skipped 0, left 1 alone that have a .txt file" in run(*words).err
    assert (image_folder / "a.txt").read_text() == "mine"
    assert sum(sizes) == 2
    assert "left 3 alone" in run(*words).err
    assert sum(sizes) == 2


def test_overwrite_writes_them_anew(
    run: Any, words: list[object], captions: dict[str, str], image_folder: Path
) -> None:
    (image_folder / "a.txt").write_text("mine")
    run(*words, "--overwrite")
    assert (image_folder / "a.txt").read_text() == captions["a"] + "\n"


@pytest.mark.parametrize("text", ["", " \n", "\ufeff"])
def test_empty_text_files_are_filled(
    run: Any, words: list[object], captions: dict[str, str], image_folder: Path, text: str
) -> None:
    (image_folder / "a.txt").write_text(text)
    assert "captioned 3 images, skipped 0\n" in run(*words).err
    assert texts(image_folder)["a"] == captions["a"] + "\n"


def test_append_adds_what_a_text_file_lacks(
    run: Any, watch: Any, words: list[object], captions: dict[str, str], image_folder: Path, tmp_path: Path
) -> None:
    before = {"a": "ohwx, a girl", "b": f"\ufeffeins\r\nx {captions['b']}\r\n"}
    for name, text in before.items():
        (image_folder / f"{name}.txt").write_bytes(text.encode())
    added = {name: f"x {text}\n".encode() for name, text in captions.items()}
    expected = {"a": b"ohwx, a girl\n" + added["a"], "b": before["b"].encode(), "deeper/c": added["deeper/c"]}
    out = tmp_path / "lines.csv"
    sizes = watch("caption")
    for _ in range(2):
        run(*words, "--append", "--prefix", "x", "--out", out)
        assert {name: (image_folder / f"{name}.txt").read_bytes() for name in expected} == expected
    assert sum(sizes) == 3
    run(*words, "--append", "--prefix", "x")  # without --out the captions are made again, and are there
    assert {name: (image_folder / f"{name}.txt").read_bytes() for name in expected} == expected
    assert sum(sizes) == 6


def test_captions_with_line_breaks_are_one_line() -> None:
    assert SidecarOptions(sidecar=True, prefix="x").line("a dog\nand a cat") == "x a dog and a cat"


def test_text_that_cannot_be_added_to_is_named(refusal: Any, words: list[object], image_folder: Path) -> None:
    (image_folder / "a.txt").write_bytes(b"caf\xe9")
    assert "a.txt is not UTF-8" in refusal(*words, "--append")
    assert (image_folder / "a.txt").read_bytes() == b"caf\xe9"


def test_a_stopped_run_goes_on_by_the_text_files(
    run: Any, watch: Any, words: list[object], image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        run(*words, "--batch-size", "1", code=130)
    assert list(texts(image_folder)) == ["a"]
    sizes = watch("caption")
    run(*words)
    assert sum(sizes) == 2
    assert len(texts(image_folder)) == 3


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_lines_whose_text_files_a_stopped_run_did_not_write_give_them(
    run: Any, watch: Any, words: list[object], captions: dict[str, str], image_folder: Path, tmp_path: Path,
    more: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "lines.jsonl"
    words += ["--out", out, *more]
    with monkeypatch.context() as patch:
        stop_after(patch, 1)  # after the lines of all three
        run(*words, code=130)
    assert len(texts(image_folder)) == 1
    assert len(read_lines(out)) == 3
    sizes = watch("caption")
    run(*words)
    assert sum(sizes) == 0
    assert texts(image_folder) == {name: f"{text}\n" for name, text in captions.items()}
    assert len(read_lines(out)) == 3


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


def test_a_text_file_is_never_half_there(
    run: Any, words: list[object], image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image_folder / "a.txt").write_text("mine")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    run(*words, "--overwrite", code=130)
    assert texts(image_folder) == {"a": "mine"}


def test_two_images_of_one_text_file_are_refused_before_anything_is_written(
    refusal: Any, words: list[object], image_folder: Path
) -> None:
    shutil.copy(image_folder / "b.jpg", image_folder / "a.jpg")
    message = refusal(*words)
    assert all(str(image_folder / name) in message for name in ("a.jpg", "a.png", "a.txt"))
    assert texts(image_folder) == {}


def test_a_folder_that_cannot_be_written_into_is_named(
    refusal: Any, words: list[object], image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "deeper" and access(path, mode))
    assert str(image_folder / "deeper") in refusal(*words)
    assert texts(image_folder) == {}


def test_a_data_source_has_no_place_beside_its_images(
    refusal: Any, captioner: Path, image_folder: Path, tmp_path: Path
) -> None:
    table, url = tmp_path / "rows.jsonl", "memory://folder/a.png"
    table.write_text(json.dumps({"image": str(image_folder / "a.png"), "caption": "x"}) + "\n")
    message = refusal("caption", table, "--model", captioner, "--sidecar")
    assert "rows.jsonl is no image file" in message
    assert "--sidecar" in message
    assert url in refusal("caption", url, "--model", captioner, "--sidecar")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prefix", "x", "--no-sidecar"], "--prefix"),
        (["--overwrite", "--no-sidecar"], "--overwrite"),
        (["--append", "--no-sidecar"], "--append"),
        (["--append", "--overwrite"], "--append"),
        (["--extension", ".mp4"], ".mp4"),
        (["--extension", "txt"], "'txt'"),
        (["--extension", "."], "'.'"),
        (["--extension", "./x"], "'./x'"),
        (["--extension", ".PNG"], ".PNG"),
        (["--suffix", "a\nb"], "one line"),
    ],
)
def test_contradicting_options_are_one_line(
    refusal: Any, words: list[object], image_folder: Path, more: list[str], message: str
) -> None:
    before = sorted(image_folder.rglob("*"))
    assert message in refusal(*words, *more)
    assert sorted(image_folder.rglob("*")) == before
