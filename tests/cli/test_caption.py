"""`openblip caption` against a tiny real checkpoint."""

import csv
import json
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

import openblip
from openblip.cli.lines import OutputLines
from openblip.cli.main import main
from openblip.nn.attention import SelfAttention
from shared_files import read_lines, write_tar


@pytest.fixture
def words(checkpoint: Path, image_folder: Path) -> list[object]:
    return ["caption", image_folder, "--model", checkpoint]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "captions.jsonl"


def write_shard(path: Path, *images_of: Path) -> Path:
    """Samples x and y, and one whose image is no image."""
    images = {**dict(zip("xy", (file.read_bytes() for file in images_of), strict=True)), "z": b"none"}
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
        out = tmp_path / f"{'_'.join(more)}.jsonl"
        run(*words, "--decoding", "nucleus", "--num-captions", "2", *more, "--out", out)
        captions.append([line["caption"] for line in read_lines(out)])
    one, three, other = captions
    assert len(one) == 6
    assert one == three
    assert one != other


def test_options_of_decoding_reach_the_model(
    run: Any, words: list[object], checkpoint: Path, image_folder: Path
) -> None:
    model, image = openblip.load(checkpoint), image_folder / "a.png"
    for more, decoding in (
        (["--no-repeat-ngram-size", "1"], openblip.Beam(no_repeat_ngram_size=1)),
        (["--decoding", "nucleus", "--top-k", "1", "--top-p", "1"], openblip.Greedy()),
    ):
        lines = {line["key"]: line["caption"] for line in run(*words, *more).lines}
        assert lines[str(image)] == model.caption(image, decoding=decoding)


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
    shard = write_shard(tmp_path / "00000.tar", image_folder / "a.png", image_folder / "b.jpg")
    printed = run("caption", shard, "--model", checkpoint, code=1)
    assert [(line["shard"], line["key"]) for line in printed.lines] == [("00000", "x"), ("00000", "y")]
    assert "00000/z" in printed.err


def test_confidences_are_of_each_token(
    run: Any, words: list[object], checkpoint: Path, image_folder: Path, out: Path
) -> None:
    run(*words, "--out", out, "--confidences")
    [first, *_] = read_lines(out)
    expected = openblip.load(checkpoint).caption(image_folder / "a.png", return_scores=True)
    assert list(first) == ["key", "caption", "logprob", "tokens", "token_logprobs"]
    assert first["tokens"] == list(expected.tokens)
    assert first["token_logprobs"] == pytest.approx(expected.token_logprobs, abs=1e-4)
    assert sum(first["token_logprobs"]) == pytest.approx(first["logprob"], abs=1e-4)


def test_the_precision_reaches_the_model(run: Any, checkpoint: Path, image_folder: Path) -> None:
    image, logprobs = image_folder / "a.png", {}
    for dtype in ("float32", "bfloat16", "auto"):
        [line] = run("caption", image, "--model", checkpoint, "--device", "cpu", "--dtype", dtype).lines
        logprobs[dtype] = line["logprob"]
        expected = openblip.load(checkpoint, device="cpu", dtype=dtype).caption(image, return_scores=True)
        assert logprobs[dtype] == pytest.approx(expected.logprob, abs=1e-5)
    assert logprobs["float32"] == logprobs["auto"] != logprobs["bfloat16"]


def test_the_decoder_is_at_most_fifteen_frames_away(
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
    assert 0 < len(stacks[0]) + 1 <= 15, stacks[0]  # and the attention's own


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


def test_a_file_of_other_settings_is_not_touched_and_they_are_named(
    run: Any, refusal: Any, words: list[object], captioner: Path, out: Path
) -> None:
    run(*words, "--out", out, "--prompt", "a")
    before = out.read_bytes()
    for named, *more in [
        ("prompt was 'a', is now ''", "--prompt", ""),
        ("num_captions was 1, is now 2", "--num-captions", 2),
        ("confidences", "--confidences"),
        ("num_beams was 3, is now 4", "--num-beams", 4),
        ("decoding was 'beam', is now 'nucleus'", "--decoding", "nucleus"),
        ("dtype was 'float32', is now 'bfloat16'", "--dtype", "bfloat16"),
        ("num_frames was 8, is now 2", "--num-frames", 2),
        ("jpeg was 'scaled', is now 'exact'", "--jpeg", "exact"),
        (str(captioner), "--model", captioner),
    ]:
        assert named in refusal(*words, "--out", out, "--prompt", "a", *more)
    assert "command was 'caption', is now 'match'" in refusal("match", words[1], "a", *words[2:], "--out", out)
    assert out.read_bytes() == before
    run(*words, "--out", out, "--prompt", "a", "--batch-size", 1, "--num-workers", 1)
    assert out.read_bytes() == before


def test_lines_of_exactly_decoded_images_are_continued_so(
    run: Any, refusal: Any, words: list[object], image_folder: Path, out: Path
) -> None:
    """Versions that do not say how JPEG files were decoded decoded them exactly."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), np.uint8)).save(image_folder / "b.jpg")
    run(*words, "--out", out)
    scaled = out.read_bytes()
    out.unlink()
    run(*words, "--out", out, "--jpeg", "exact")
    exact = out.read_bytes()
    assert exact != scaled
    stamp = out.with_name("captions.jsonl.settings.json")
    settings = json.loads(stamp.read_text())
    assert settings.pop("jpeg") == "exact"
    stamp.write_text(json.dumps(settings))
    assert "jpeg was 'exact', is now 'scaled'" in refusal(*words, "--out", out)
    run(*words, "--out", out, "--jpeg", "exact")
    assert out.read_bytes() == exact


@pytest.mark.slow
def test_ctrl_c_ends_all_threads_and_the_same_command_continues(
    run: Any, words: list[object], image_folder: Path, out: Path
) -> None:
    for number in range(2400):
        (image_folder / f"{number:03d}.png").write_bytes((image_folder / "a.png").read_bytes())
    program = "import sys; from openblip.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *map(str, words), "--out", str(out), "--batch-size", "4"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not out.exists() or not out.stat().st_size:
        assert process.poll() is None, "it ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in printed
    assert 0 < len(read_lines(out)) < 2403
    run(*words, "--out", out)
    keys = [line["key"] for line in read_lines(out)]
    assert len(keys) == len(set(keys)) == 2403


def test_lines_of_unknown_settings_are_not_continued(run: Any, refusal: Any, words: list[object], out: Path) -> None:
    stamp = out.with_name("captions.jsonl.settings.json")
    run(*words, "--out", out)
    stamp.unlink()
    assert stamp.name in refusal(*words, "--out", out)
    out.write_text("")  # a run that was killed before its first line
    run(*words, "--out", out)
    assert json.loads(stamp.read_text())["model"]["checkpoint"] == str(words[3])


def test_clips_are_captioned_by_their_frames(
    run: Any, words: list[object], checkpoint: Path, clips: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = openblip.load(checkpoint)
    one, two = (model.encode_videos(str(clips / name), 3) for name in ("one.mp4", "two.mp4"))
    expected = [
        model.caption(images, return_scores=True)[0] for images in (one, model.encode(clips / "photo.png"), two)
    ]
    words = ["caption", clips / "one.mp4", clips, *words[2:], "--num-frames", "3", "--batch-size", "4", "--out", out]
    assert "bad.mp4" in run(*words, code=1).err
    assert [Path(line["key"]).name for line in read_lines(out)] == ["one.mp4", "photo.png", "two.mp4"]
    assert [line["logprob"] for line in read_lines(out)] == pytest.approx([each.logprob for each in expected], abs=1e-5)
    out.unlink()
    monkeypatch.setitem(sys.modules, "av", None)
    messages = run(*words, code=1).err
    assert "one.mp4: " in messages
    assert "openblip[video]" in messages
    assert [Path(line["key"]).name for line in read_lines(out)] == ["photo.png"]


def test_two_sources_with_the_same_shard_are_refused(
    refusal: Any, checkpoint: Path, image_folder: Path, tmp_path: Path
) -> None:
    files = [image_folder / "a.png", image_folder / "b.jpg"]
    shards = [write_shard(tmp_path / name / "00000.tar", *files) for name in ("web", "human")]
    assert "shard 00000" in refusal("caption", *shards, "--model", checkpoint)


@pytest.mark.parametrize(("ending", "cut"), [(".jsonl", 1), (".json", 40), (".jsonl", 0), (".csv", 40), (".tsv", 0)])
def test_a_killed_run_is_continued_to_the_same_file(
    run: Any, watch: Any, words: list[object], out: Path, ending: str, cut: int
) -> None:
    out = out.with_suffix(ending)
    words += ["--out", out, "--num-captions", "2"]
    run(*words)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    first = len(lines) - 6  # after the names of a table's columns
    # the second image's second caption is half-written, or not even begun
    out.write_bytes(b"".join(lines[: first + 3]) + lines[first + 3][:cut])
    counts = watch("caption")
    run(*words)
    assert out.read_bytes() == whole
    assert sum(counts) == 2  # the first image was not captioned again


def test_tables_hold_what_lines_hold(run: Any, words: list[object], image_folder: Path, out: Path) -> None:
    (image_folder / "a.png").rename(image_folder / 'one, "two"\nthree.png')
    words.insert(2, write_shard(image_folder.parent / "00000.tar", image_folder / "b.jpg", image_folder / "b.jpg"))
    tables = {}
    for ending, delimiter in ((".jsonl", ""), (".csv", ","), (".tsv", "\t")):
        for _ in range(2):  # the second time all is there
            run(*words, "--confidences", "--out", out.with_suffix(ending), code=1)
        with out.with_suffix(ending).open(newline="") as file:
            if delimiter:
                tables[ending] = list(csv.DictReader(file, delimiter=delimiter))
                assert list(tables[ending][0]) == ["shard", "key", "caption", "logprob", "tokens", "token_logprobs"]
            else:
                rows = read_lines(out)
                texts = ({name: as_text(value) for name, value in row.items()} for row in rows)
                tables[ending] = [{"shard": "", **row} for row in texts]
    assert len(tables[".jsonl"]) == 5
    assert tables[".jsonl"] == tables[".csv"] == tables[".tsv"]


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def test_a_damaged_file_is_not_touched(run: Any, refusal: Any, words: list[object], out: Path) -> None:
    run(*words, "--out", out)
    lines = out.read_text().splitlines(keepends=True)
    for number, damaged in (
        (2, [lines[0], "my notes\n"]),
        (3, [*lines[:2], lines[0]]),
        (1, [lines[0], lines[0]]),
        (1, ["[]\n"]),
    ):
        out.write_text("".join(damaged))
        assert any(f"{out}{place}{number}" in refusal(*words, "--out", out) for place in (":", ", line "))
        assert out.read_text() == "".join(damaged)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no image"),
        (["nowhere"], "nowhere"),
        (["IMAGES", "--batch-size", "0"], "--batch-size"),
        (["IMAGES", "--decoding", "nucleus", "--top-p", "2"], "top_p"),
        (["IMAGES", "--dtype", "int3"], "int3"),
        (["IMAGES", "--out", "captions.parquet"], ".jsonl, .json, .csv, .tsv"),
        (["IMAGES", "--out", "captions"], ".jsonl, .json, .csv, .tsv"),
        (["IMAGES", "--num-frames", "0"], "--num-frames"),
        (["IMAGES", "--num-captions", "0"], "num_captions is 0"),
        (["IMAGES", "--num-captions", "4"], "Beam with num_beams 3"),
        (["IMAGES", "--num-captions", "2", "--decoding", "greedy"], "Greedy writes one"),
    ],
)
def test_bad_input_is_one_line(
    refusal: Any, words: list[object], message: str, checkpoint: Path, image_folder: Path
) -> None:
    words = [image_folder if word == "IMAGES" else word for word in words]
    assert message in refusal("caption", *words, "--model", checkpoint)


def test_of_lines_about_shards_a_resume_keeps_the_keys_alone(
    run: Any, words: list[object], image_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words[1] = write_shard(image_folder.parent / "00000.tar", image_folder / "b.jpg", image_folder / "b.jpg")
    kept: list[dict[tuple[str, str], list[object]]] = []
    monkeypatch.setattr(OutputLines, "finish", lambda self, *texts: kept.append(self.present) or 0)
    for _ in range(2):
        run(*words, "--out", out)
    assert kept == [{}, {("00000", "x"): [], ("00000", "y"): []}]
