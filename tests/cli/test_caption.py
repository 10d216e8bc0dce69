"""`openblip caption` against a tiny real checkpoint."""

import traceback
from pathlib import Path
from typing import Any

import fsspec
import pytest

import openblip
from openblip.cli.main import main
from openblip.nn.attention import SelfAttention
from shared_files import read_lines, write_tar


@pytest.fixture
def words(checkpoint: Path, image_folder: Path) -> list[object]:
    return ["caption", image_folder, "--model", checkpoint]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "captions.jsonl"


def write_shard(path: Path, image_folder: Path) -> Path:
    """Two samples, x and y, and one whose image is no image."""
    images = {"x": (image_folder / "a.png").read_bytes(), "y": (image_folder / "b.jpg").read_bytes(), "z": b"none"}
    members = [member for key, image in images.items() for member in ((f"{key}.png", image), (f"{key}.txt", b"a"))]
    return write_tar(path, members)


def test_files_and_folders_give_one_line_each_in_order(run: Any, checkpoint: Path, image_folder: Path) -> None:
    first = image_folder / "b.jpg"
    lines = run("caption", first, image_folder, "--model", checkpoint).lines
    names = ("b.jpg", "a.png", "deeper/c.webp")
    assert [line["key"] for line in lines] == [str(image_folder / name) for name in names]
    expected = openblip.load(checkpoint).caption(first, return_scores=True)
    assert lines[0]["caption"] == expected.text
    assert lines[0]["logprob"] == pytest.approx(expected.logprob, abs=1e-4)


def test_batches_do_not_change_sampled_captions(run: Any, words: list[object], tmp_path: Path) -> None:
    captions = []
    for more in (["--batch-size", "1"], ["--batch-size", "3"], ["--seed", "7"]):
        out = tmp_path / "_".join(more)
        run(*words, "--decoding", "nucleus", "--num-captions", "2", *more, "--out", out)
        captions.append([line["caption"] for line in read_lines(out)])
    one, three, other = captions
    assert len(one) == 6
    assert one == three
    assert one != other


@pytest.mark.parametrize("texts", [[], ["--sidecar"]])
def test_unreadable_images_are_named_skipped_and_counted(
    run: Any, words: list[object], image_folder: Path, tmp_path: Path, out: Path, texts: list[str]
) -> None:
    (image_folder / "bad.jpg").write_bytes(b"no image")
    words.insert(2, tmp_path / "nowhere" / "gone.png")
    messages = run(*words, "--out", out, *texts, code=1).err
    assert len(read_lines(out)) == 3
    assert "bad.jpg" in messages
    assert "gone.png" in messages
    assert "captioned 3 images, skipped 2" in messages
    assert sorted(file.name for file in tmp_path.rglob("*.txt")) == (["a.txt", "b.txt", "c.txt"] if texts else [])


def test_a_data_source_gives_shard_and_key(run: Any, checkpoint: Path, image_folder: Path, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "00000.tar", image_folder)
    printed = run("caption", shard, "--model", checkpoint, code=1)
    assert [(line["shard"], line["key"]) for line in printed.lines] == [("00000", "x"), ("00000", "y")]
    assert "00000/z" in printed.err


def test_confidences_are_of_each_token(
    run: Any, refusal: Any, words: list[object], checkpoint: Path, image_folder: Path, out: Path
) -> None:
    run(*words, "--out", out, "--confidences")
    [first, *_] = read_lines(out)
    expected = openblip.load(checkpoint).caption(image_folder / "a.png", return_scores=True)
    assert list(first) == ["key", "caption", "logprob", "tokens", "token_logprobs"]
    assert first["tokens"] == list(expected.tokens)
    assert first["token_logprobs"] == pytest.approx(expected.token_logprobs, abs=1e-4)
    assert sum(first["token_logprobs"]) == pytest.approx(first["logprob"], abs=1e-4)
    before = out.read_bytes()
    assert f"{out}:1" in refusal(*words, "--out", out)  # lines without them do not go into the same file
    assert out.read_bytes() == before


def test_the_precision_reaches_the_model(run: Any, checkpoint: Path, image_folder: Path) -> None:
    image, logprobs = image_folder / "a.png", {}
    for dtype in ("float32", "bfloat16", "auto"):
        [line] = run("caption", image, "--model", checkpoint, "--device", "cpu", "--dtype", dtype).lines
        logprobs[dtype] = line["logprob"]
        expected = openblip.load(checkpoint, device="cpu", dtype=dtype).caption(image, return_scores=True)
        assert logprobs[dtype] == pytest.approx(expected.logprob, abs=1e-5)
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


def test_a_url_is_read_and_is_its_key(run: Any, checkpoint: Path, image_folder: Path) -> None:
    url = "memory://somewhere/a.png"
    fsspec.filesystem("memory").pipe_file("/somewhere/a.png", (image_folder / "a.png").read_bytes())
    [line] = run("caption", url, "--model", checkpoint).lines
    assert line["key"] == url


def test_hidden_files_and_names_of_any_bytes(run: Any, words: list[object], image_folder: Path) -> None:
    (image_folder / "._a.png").write_bytes(b"what another system keeps")
    (image_folder / "b.jpg").rename(image_folder / b"b\xff.jpg".decode(errors="surrogateescape"))
    names = [Path(line["key"]).name for line in run(*words).lines]
    assert names == ["a.png", "b\\udcff.jpg", "c.webp"]


def test_a_file_of_another_number_of_captions_is_not_touched(
    run: Any, refusal: Any, words: list[object], out: Path
) -> None:
    words += ["--out", out, "--num-captions"]
    run(*words, "2")
    before = out.read_bytes()
    for count in ("1", "3"):
        assert f"{out}:1" in refusal(*words, count)
        assert out.read_bytes() == before


def test_two_sources_with_the_same_shard_are_refused(
    refusal: Any, checkpoint: Path, image_folder: Path, tmp_path: Path
) -> None:
    shards = [write_shard(tmp_path / name / "00000.tar", image_folder) for name in ("web", "human")]
    assert "shard 00000" in refusal("caption", *shards, "--model", checkpoint)


@pytest.mark.parametrize("cut", [1, 40, 0])
def test_a_killed_run_is_continued_to_the_same_file(
    run: Any, watch: Any, words: list[object], out: Path, cut: int
) -> None:
    words += ["--out", out, "--num-captions", "2"]
    run(*words)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    # the second image's second caption is half-written, or not even begun
    out.write_bytes(b"".join(lines[:3]) + lines[3][:cut])
    counts = watch("caption")
    run(*words)
    assert out.read_bytes() == whole
    assert sum(counts) == 2  # the first image was not captioned again


def test_a_foreign_file_is_not_touched(refusal: Any, words: list[object], tmp_path: Path) -> None:
    out = tmp_path / "notes.txt"
    out.write_text("my notes\n")
    assert "notes.txt, line 1: not JSON" in refusal(*words, "--out", out)
    assert out.read_text() == "my notes\n"


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
    refusal: Any, words: list[object], message: str, checkpoint: Path, image_folder: Path
) -> None:
    words = [image_folder if word == "IMAGES" else word for word in words]
    assert message in refusal("caption", *words, "--model", checkpoint)
