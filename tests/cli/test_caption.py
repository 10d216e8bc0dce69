"""`openblip caption` against a tiny real checkpoint."""

import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

import openblip
from openblip.cli.main import main
from openblip.nn.attention import SelfAttention
from shared_files import json_lines, printed, read_lines, write_tar


def write_shard(path: Path, image_folder: Path) -> Path:
    """Two samples, x and y, and one whose image is no image."""
    images = [
        ("x", (image_folder / "a.png").read_bytes()),
        ("y", (image_folder / "b.jpg").read_bytes()),
        ("z", b"none"),
    ]
    return write_tar(
        path, [member for key, image in images for member in ((f"{key}.png", image), (f"{key}.txt", b"a"))]
    )


def test_files_and_folders_give_one_line_each_in_order(
    checkpoint: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = str(image_folder / "b.jpg")
    assert main(["caption", first, str(image_folder), "--model", str(checkpoint)]) == 0
    lines = printed(capsys)
    assert [line["key"] for line in lines] == [first, str(image_folder / "a.png"), str(image_folder / "deeper/c.webp")]
    expected = openblip.load(checkpoint).caption(first, return_scores=True)
    assert lines[0]["caption"] == expected.text
    assert lines[0]["logprob"] == pytest.approx(expected.logprob, abs=1e-4)


def test_batches_do_not_change_sampled_captions(checkpoint: Path, image_folder: Path, tmp_path: Path) -> None:
    common = ["caption", str(image_folder), "--model", str(checkpoint), "--decoding", "nucleus", "--num-captions", "2"]
    assert main([*common, "--out", str(tmp_path / "one"), "--batch-size", "1"]) == 0
    assert main([*common, "--out", str(tmp_path / "three"), "--batch-size", "3"]) == 0
    assert main([*common, "--out", str(tmp_path / "other"), "--seed", "7"]) == 0
    one, three, other = (
        [line["caption"] for line in read_lines(tmp_path / name)] for name in ("one", "three", "other")
    )
    assert len(one) == 6
    assert one == three
    assert one != other


def test_unreadable_images_are_named_skipped_and_counted(
    checkpoint: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "bad.jpg").write_bytes(b"no image")
    out = tmp_path / "captions.jsonl"
    words = ["caption", str(image_folder), str(tmp_path / "gone.png"), "--model", str(checkpoint), "--out", str(out)]
    assert main(words) == 1
    assert len(read_lines(out)) == 3
    messages = capsys.readouterr().err
    assert "bad.jpg" in messages
    assert "gone.png" in messages
    assert "captioned 3 images, skipped 2" in messages


def test_a_data_source_gives_shard_and_key(
    checkpoint: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_shard(tmp_path / "00000.tar", image_folder)
    assert main(["caption", str(shard), "--model", str(checkpoint)]) == 1
    captured = capsys.readouterr()
    lines = json_lines(captured.out)
    assert [(line["shard"], line["key"]) for line in lines] == [("00000", "x"), ("00000", "y")]
    assert "00000/z" in captured.err


def test_confidences_are_of_each_token(
    checkpoint: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "captions.jsonl"
    words = ["caption", str(image_folder), "--model", str(checkpoint), "--out", str(out)]
    assert main([*words, "--confidences"]) == 0
    [first, *_] = read_lines(out)
    expected = openblip.load(checkpoint).caption(image_folder / "a.png", return_scores=True)
    assert list(first) == ["key", "caption", "logprob", "tokens", "token_logprobs"]
    assert first["tokens"] == list(expected.tokens)
    assert first["token_logprobs"] == pytest.approx(expected.token_logprobs, abs=1e-4)
    assert sum(first["token_logprobs"]) == pytest.approx(first["logprob"], abs=1e-4)
    before = out.read_bytes()
    assert main(words) == 2  # lines without them do not go into the same file
    assert out.read_bytes() == before
    assert f"{out}:1" in capsys.readouterr().err


def test_the_precision_reaches_the_model(
    checkpoint: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, logprobs = str(image_folder / "a.png"), {}
    for dtype in ("float32", "bfloat16", "auto"):
        assert main(["caption", image, "--model", str(checkpoint), "--device", "cpu", "--dtype", dtype]) == 0
        logprobs[dtype] = json.loads(capsys.readouterr().out)["logprob"]
        model = openblip.load(checkpoint, device="cpu", dtype=dtype)
        expected = model.caption(image, return_scores=True).logprob
        assert logprobs[dtype] == pytest.approx(expected, abs=1e-5)
    assert logprobs["float32"] == logprobs["auto"] != logprobs["bfloat16"]


def test_the_decoder_is_at_most_twelve_frames_away(
    checkpoint: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command to the decoder's first self-attention, counted in our files."""
    stacks: list[list[str]] = []
    forward = SelfAttention.forward

    def counting(*args: Any, **options: Any) -> Any:
        stack = [frame.filename for frame in traceback.extract_stack()]
        if any("generation" in Path(name).parts for name in stack):
            stacks.append([name for name in stack if Path(openblip.__file__).parent in Path(name).parents])
        return forward(*args, **options)

    monkeypatch.setattr(SelfAttention, "forward", counting)
    assert main(["caption", str(image_folder / "a.png"), "--model", str(checkpoint)]) == 0
    assert 0 < len(stacks[0]) + 1 <= 12, stacks[0]  # and the attention's own


def test_a_url_is_read_and_is_its_key(checkpoint: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fsspec

    url = "memory://somewhere/a.png"
    fsspec.filesystem("memory").pipe_file("/somewhere/a.png", (image_folder / "a.png").read_bytes())
    assert main(["caption", url, "--model", str(checkpoint)]) == 0
    assert json.loads(capsys.readouterr().out)["key"] == url


def test_hidden_files_and_names_of_any_bytes(
    checkpoint: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "._a.png").write_bytes(b"what another system keeps")
    (image_folder / "b.jpg").rename(image_folder / b"b\xff.jpg".decode(errors="surrogateescape"))
    assert main(["caption", str(image_folder), "--model", str(checkpoint)]) == 0
    keys = [line["key"] for line in printed(capsys)]
    assert [Path(key).name for key in keys] == ["a.png", "b\\udcff.jpg", "c.webp"]


@pytest.mark.parametrize("count", ["1", "3"])
def test_a_file_of_another_number_of_captions_is_not_touched(
    checkpoint: Path, image_folder: Path, tmp_path: Path, count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "captions.jsonl"
    words = ["caption", str(image_folder), "--model", str(checkpoint), "--out", str(out), "--num-captions"]
    assert main([*words, "2"]) == 0
    before = out.read_bytes()
    assert main([*words, count]) == 2
    assert out.read_bytes() == before
    assert f"{out}:1" in capsys.readouterr().err


def test_two_sources_with_the_same_shard_are_refused(
    checkpoint: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = []
    for name in ("web", "human"):
        (tmp_path / name).mkdir()
        shards.append(str(write_shard(tmp_path / name / "00000.tar", image_folder)))
    assert main(["caption", *shards, "--model", str(checkpoint)]) == 2
    assert "shard 00000" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [1, 40, 0])
def test_a_killed_run_is_continued_to_the_same_file(
    checkpoint: Path, image_folder: Path, tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "captions.jsonl"
    words = ["caption", str(image_folder), "--model", str(checkpoint), "--out", str(out), "--num-captions", "2"]
    assert main(words) == 0
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    # the second image's second caption is half-written, or not even begun
    out.write_bytes(b"".join(lines[:3]) + lines[3][:cut])

    prepared: list[int] = []
    caption = openblip.BlipPredictor.caption

    def counting(self: openblip.BlipPredictor, images: torch.Tensor, *rest: Any, **options: Any) -> Any:
        prepared.append(len(images))
        return caption(self, images, *rest, **options)

    monkeypatch.setattr(openblip.BlipPredictor, "caption", counting)
    assert main(words) == 0
    assert out.read_bytes() == whole
    assert sum(prepared) == 2  # the first image was not captioned again


def test_a_foreign_file_is_not_touched(
    checkpoint: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "notes.txt"
    out.write_text("my notes\n")
    assert main(["caption", str(image_folder), "--model", str(checkpoint), "--out", str(out)]) == 2
    assert out.read_text() == "my notes\n"
    assert "notes.txt, line 1: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no image"),
        (["nowhere"], "nowhere"),
        (["IMAGES", "--batch-size", "0"], "--batch-size"),
        (["IMAGES", "--decoding", "nucleus", "--top-p", "2"], "top_p"),
        (["IMAGES", "--dtype", "int3"], "int3"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, checkpoint: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(image_folder) if word == "IMAGES" else word for word in words]
    assert main(["caption", *words, "--model", str(checkpoint)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
