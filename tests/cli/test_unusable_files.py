"""What every command does with sources of which a part, or all, is nothing that it can use."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared_files import as_json, write_tar

pytestmark = pytest.mark.slow

Words = Callable[..., list[object]]


@pytest.fixture
def words(checkpoint: Path, tmp_path: Path) -> Words:
    """The words of each command for a source."""

    def words(command: str, source: object) -> list[object]:
        model = ["--model", checkpoint]
        train = ["--init", checkpoint, "--training.steps", 2, "--training.batch-size", 2, "--data.num-workers", 1]
        capfilt = ["--captioner", checkpoint, "--filter", checkpoint, "--out", tmp_path / "clean"]
        return {
            "caption": ["caption", source, *model],
            "match": ["match", source, "a dog", *model],
            "evaluate": ["evaluate", "retrieval", "--data", source, *model],
            "inspect": ["data", "inspect", source],
            "capfilt": ["capfilt", source, *capfilt],
            "train": ["train", "blip-mini", "--data.source", source, "--out", tmp_path / "run", *train],
        }[command]

    return words


def shard_members(image_folder: Path) -> list[tuple[str, bytes]]:
    image = (image_folder / "a.png").read_bytes()
    pairs = [member for n in range(2) for member in ((f"{n}.png", image), (f"{n}.json", as_json(caption=f"a dog {n}")))]
    return [*pairs, ("0.cls", b"3"), ("x.heic", b""), ("x.svg", b"")]


@pytest.mark.parametrize("command", ["caption", "match", "evaluate", "inspect", "capfilt", "train"])
def test_a_source_without_images_fails(run: Any, words: Words, tmp_path: Path, command: str) -> None:
    shard = write_tar(tmp_path / "empty.tar", [("a.svg", b"<svg/>")])
    printed = run(*words(command, shard), code=2 if command == "train" else 1)
    assert "empty.tar" in printed.out + printed.err or command == "train"
    assert "1 .svg" in printed.err or ".svg: 1" in printed.out
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("command", ["caption", "match", "evaluate", "inspect", "capfilt", "train"])
def test_a_shard_that_is_none_is_named_and_the_others_are_read(
    run: Any, words: Words, image_folder: Path, tmp_path: Path, command: str
) -> None:
    write_tar(tmp_path / "0.tar", shard_members(image_folder))
    (tmp_path / "1.tar").write_text("<html>404</html>" * 50)
    printed = run(*words(command, tmp_path / "{0,1}.tar"), code=0 if command in ("inspect", "train") else 1)
    said = (tmp_path / "run/rejects.jsonl").read_text() if command == "train" else printed.out + printed.err
    assert "a web page" in said
    assert "1 .cls, 1 .heic, 1 .svg (.heic, .svg cannot be read" in printed.err or command == "inspect"
    if command == "capfilt":  # not done: the same command reads it once it is there
        assert not (tmp_path / "clean/captions/1.report.json").exists()
        shutil.copy(tmp_path / "0.tar", tmp_path / "1.tar")
        run(*words(command, tmp_path / "{0,1}.tar"))


@pytest.mark.parametrize("command", ["caption", "match", "evaluate", "capfilt", "train"])
def test_rejects_are_named_in_the_end(run: Any, words: Words, image_folder: Path, tmp_path: Path, command: str) -> None:
    members = [*shard_members(image_folder), ("bad.jpg", b"none"), ("bad.json", as_json(caption="a cat"))]
    shard = write_tar(tmp_path / "0.tar", members)
    printed = run(*words(command, shard), code=0 if command in ("capfilt", "train") else 1)
    if command == "train":
        assert "draws met a sample that was skipped" in printed.err
    else:
        assert "0/bad: " in printed.err
    assert "1 reject, named in" in printed.err or command != "capfilt"


def test_an_empty_shard_among_others_is_done(run: Any, words: Words, image_folder: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [])
    write_tar(tmp_path / "1.tar", shard_members(image_folder))
    run(*words("capfilt", tmp_path / "{0,1}.tar"))
    assert (tmp_path / "clean/captions/0.report.json").exists()


def test_commands_agree_on_the_images_of_a_folder(run: Any, words: Words, image_folder: Path, tmp_path: Path) -> None:
    for name in ("a.jpg", "d.tiff", "e.gif", "deeper/f.jfif"):
        shutil.copy(image_folder / "b.jpg", image_folder / name)
    for name in ("x.heic", ".hidden.jpg", "notes.txt"):
        (image_folder / name).write_bytes(b"x")
    (image_folder / "linked").symlink_to(image_folder / "deeper")
    unused = "not used: 1 .heic, 1 .txt, 1 hidden"
    captioned = run(*words("caption", image_folder))
    assert (len(captioned.lines), unused in captioned.err) == (7, True)
    [facts] = run(*words("inspect", image_folder), "--as-json").lines
    assert (facts["samples"], facts["files not used"]) == (7, {".heic": 1, ".txt": 1, "hidden": 1})
    cleaned = run(*words("capfilt", image_folder))
    assert ("of 7 texts" in cleaned.out, unused in cleaned.err) == (True, True)


def test_captions_of_a_metadata_file_are_matched(run: Any, image_folder: Path, checkpoint: Path) -> None:
    (image_folder / "metadata.csv").write_text("file_name,text\na.png,a dog\ndeeper/c.webp,a cat\n")
    printed = run("match", image_folder, "--model", checkpoint, code=1)
    assert [line["caption"] for line in printed.lines] == ["a dog", "a cat"]
    assert "b.jpg: it has no caption" in printed.err


def test_a_folder_of_videos(run: Any, words: Words, clips: Path) -> None:
    printed = run(*words("caption", clips), code=1)
    assert [Path(line["key"]).name for line in printed.lines] == ["one.mp4", "photo.png", "two.mp4"]
    assert "bad.mp4" in printed.err
