"""`openblip answer` against a tiny real checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

import openblip
from openblip.cli.main import main
from shared_files import as_json, printed, read_lines, write_tar

QUESTIONS = ["what is beside the tree?", "how many cars"]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def table(image_folder: Path) -> Path:
    """Three questions about two images, by their places beside the table."""
    names = ["images/a.png", "images/b.jpg", "images/a.png"]
    asked = [*QUESTIONS, "is it red?"]
    rows = [
        {"id": number, "image": name, "question": question}
        for number, (name, question) in enumerate(zip(names, asked, strict=True), start=1)
    ]
    return write_table(image_folder.parent / "asked.jsonl", rows)


def test_one_line_per_question_about_one_image(
    answerer: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(image_folder / "a.png")
    assert main(["answer", image, *QUESTIONS, "--model", str(answerer)]) == 0
    lines = printed(capsys)
    expected = openblip.load(answerer).answer([image] * 2, QUESTIONS, return_scores=True)
    assert [list(line) for line in lines] == [["question", "answer", "logprob"]] * 2
    assert [line["question"] for line in lines] == QUESTIONS
    assert [line["answer"] for line in lines] == [answer.text for answer in expected]
    assert [line["logprob"] for line in lines] == pytest.approx([a.logprob for a in expected], abs=1e-5)


def test_the_options_of_writing_reach_the_model(
    answerer: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(image_folder / "a.png")
    more = ["--num-beams", "2", "--max-new-tokens", "2", "--encoder-token", "[CLS]"]
    assert main(["answer", image, QUESTIONS[0], "--model", str(answerer), *more]) == 0
    [line] = printed(capsys)
    decoding = openblip.Beam(num_beams=2, max_new_tokens=2, min_new_tokens=1)
    model = openblip.load(answerer, encoder_token="[CLS]")
    expected = model.answer(image, QUESTIONS[0], decoding=decoding, return_scores=True)
    assert (line["answer"], line["logprob"]) == (expected.text, pytest.approx(expected.logprob, abs=1e-5))
    other = openblip.load(answerer, encoder_token="[ENC]").answer(
        image, QUESTIONS[0], decoding=decoding, return_scores=True
    )
    assert line["logprob"] != pytest.approx(other.logprob, abs=1e-5)


def test_the_best_of_the_candidates_is_chosen(
    answerer: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    candidates = ["a red dog", "blue", "two cars"]
    (tmp_path / "answers.json").write_text(json.dumps(candidates))
    more = ["--model", str(answerer), "--candidates", str(tmp_path / "answers.json")]
    image = str(image_folder / "a.png")
    assert main(["answer", image, *QUESTIONS, *more]) == 0
    expected = openblip.load(answerer).answer(image, QUESTIONS, candidates)
    assert [line["answer"] for line in printed(capsys)] == expected
    assert set(expected) <= set(candidates)


def test_a_table_of_questions_gives_a_line_each(answerer: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "answers.jsonl"
    assert main(["answer", str(table), "--model", str(answerer), "--out", str(out)]) == 0
    lines = read_lines(out)
    assert [list(line) for line in lines] == [["shard", "key", "question", "answer", "logprob"]] * 3
    assert [(line["shard"], line["key"]) for line in lines] == [("asked", str(n)) for n in (1, 2, 3)]
    assert [line["question"] for line in lines] == [*QUESTIONS, "is it red?"]
    images = [table.parent / "images" / name for name in ("a.png", "b.jpg", "a.png")]
    expected = openblip.load(answerer).answer(images, [line["question"] for line in lines])
    assert [line["answer"] for line in lines] == expected


def test_every_image_of_a_folder_is_asked_the_questions_given(
    answerer: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["answer", str(image_folder), *QUESTIONS, "--model", str(answerer)]
    assert main(words) == 0
    lines = printed(capsys)
    names = ["a.png", "b.jpg", "deeper/c.webp"]
    assert [line["key"] for line in lines] == [str(image_folder / name) for name in names for _ in QUESTIONS]
    assert [line["question"] for line in lines] == QUESTIONS * 3
    model = openblip.load(answerer)
    expected = [answer for name in names for answer in model.answer(image_folder / name, QUESTIONS)]
    assert [line["answer"] for line in lines] == expected
    out = tmp_path / "out.jsonl"
    assert main([*words, "--batch-size", "2", "--out", str(out)]) == 0
    assert read_lines(out) == [{**line, "logprob": pytest.approx(line["logprob"], abs=1e-5)} for line in lines]


@pytest.mark.parametrize("cut", [0, 25])
def test_a_killed_run_is_continued_to_the_same_file(
    answerer: Path, image_folder: Path, tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "answers.jsonl"
    words = ["answer", str(image_folder), *QUESTIONS, "--model", str(answerer), "--out", str(out)]
    assert main(words) == 0
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:cut])
    asked: list[int] = []
    answer = openblip.BlipPredictor.answer

    def counting(self: openblip.BlipPredictor, images: Any, questions: Any, *rest: Any, **options: Any) -> Any:
        asked.append(len(questions))
        return answer(self, images, questions, *rest, **options)

    monkeypatch.setattr(openblip.BlipPredictor, "answer", counting)
    assert main(words) == 0
    assert out.read_bytes() == whole
    assert sum(asked) == 4  # two questions about the second image, whose lines were not whole, and the third


def test_an_interrupt_leaves_what_is_done(
    answerer: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "answers.jsonl"
    words = ["answer", str(image_folder), QUESTIONS[0], "--model", str(answerer), "--out", str(out)]
    words += ["--batch-size", "1"]
    answer = openblip.BlipPredictor.answer
    written: list[int] = []

    def stopping(self: openblip.BlipPredictor, *rest: Any, **options: Any) -> Any:
        written.append(len(read_lines(out)) if out.exists() else -1)
        if len(written) == 4:
            raise KeyboardInterrupt
        return answer(self, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(openblip.BlipPredictor, "answer", stopping)
        assert main(words) == 130
    # The first call has no image and lets the model look at the options. A kill would leave as many lines.
    assert written == [-1, 0, 1, 2]
    assert len(read_lines(out)) == 2
    assert main(words) == 0
    assert [Path(line["key"]).name for line in read_lines(out)] == ["a.png", "b.jpg", "c.webp"]


@pytest.mark.parametrize("other", [["is it red?"], [*QUESTIONS, "is it red?"], [QUESTIONS[1], QUESTIONS[0]]])
def test_a_file_of_other_questions_is_not_touched(
    answerer: Path, image_folder: Path, tmp_path: Path, other: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.jsonl"
    common = ["--model", str(answerer), "--out", str(out)]
    assert main(["answer", str(image_folder), *QUESTIONS, *common]) == 0
    before = out.read_bytes()
    capsys.readouterr()
    assert main(["answer", str(image_folder), *other, *common]) == 2
    assert out.read_bytes() == before
    captured = capsys.readouterr().err
    assert f"{out}:1" in captured
    assert captured.count("\n") == 1


def test_rows_that_cannot_be_answered_are_named_skipped_and_counted(
    answerer: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "bad.png").write_bytes(b"no image")
    folder = image_folder.parent
    rows: list[dict[str, Any]] = [
        {"id": "good", "image": "images/a.png", "question": "what is it"},
        {"id": "bad", "image": "images/bad.png", "question": "what is it"},
        {"id": "gone", "image": "images/gone.png", "question": "what is it"},
        {"id": "silent", "image": "images/a.png", "caption": "a dog"},
        {"id": "nothing", "question": "what is it"},
        {"id": "number", "image": "images/a.png", "question": 5},
    ]
    table = write_table(folder / "asked.jsonl", rows)
    out = tmp_path / "answers.jsonl"
    assert main(["answer", str(table), "--model", str(answerer), "--out", str(out)]) == 1
    assert [line["key"] for line in read_lines(out)] == ["good"]
    captured = capsys.readouterr().err
    for name in ("asked/bad", "asked/gone", "asked/silent", "line 5", "line 6"):
        assert name in captured
    assert "it has no question" in captured
    assert "answered about 1 images, skipped 5" in captured


def test_shards_are_asked_too(answerer: Path, image_folder: Path, tmp_path: Path) -> None:
    members = {"x.png": (image_folder / "a.png").read_bytes(), "x.json": as_json(question=QUESTIONS[0], answers=[])}
    shard, out = write_tar(tmp_path / "00000.tar", members.items()), tmp_path / "answers.jsonl"
    assert main(["answer", str(shard), "--model", str(answerer), "--out", str(out)]) == 0
    assert [(line["key"], line["question"]) for line in read_lines(out)] == [("x", QUESTIONS[0])]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["A"], "no question"),
        (["A", " "], "empty"),
        (["IMAGES"], "no question"),
        (["EMPTY", "what"], "EMPTY"),
        (["gone.png", "what"], "gone.png"),
        (["nowhere.jsonl"], "nowhere.jsonl"),
        (["A", "what", "--num-beams", "0"], "num_beams"),
        (["A", "what", "--num-frames", "0"], "--num-frames"),
        (["IMAGES", "what", "--batch-size", "0"], "--batch-size"),
        (["A", "what", "--max-new-tokens", "500"], "500"),
        (["A", "what", "--candidates", "gone.json"], "gone.json"),
        (["A", "what", "--candidates", "A"], "--candidates"),
        (["A", "what", "--candidates", "NONE"], "--candidates"),
        (["A", "what", "--encoder-token", "[SEP]"], "[SEP]"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str],
    message: str,
    answerer: Path,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "NONE").write_text("[]")
    places = {"A": image_folder / "a.png", "IMAGES": image_folder, "EMPTY": tmp_path / "EMPTY"}
    places["NONE"] = tmp_path / "NONE"
    words = [str(places.get(word, word)) for word in words]
    out = tmp_path / "out.jsonl"
    assert main(["answer", *words, "--model", str(answerer)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not out.exists()


def test_a_checkpoint_that_cannot_answer_says_what_it_can_before_a_file_is_made(
    captioner: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    words = ["answer", str(image_folder), "what", "--model", str(captioner), "--out", str(out)]
    assert main(words) == 2
    assert "it can do caption" in capsys.readouterr().err
    assert not out.exists()


@pytest.fixture
def clips(image_folder: Path) -> Path:
    """one.mp4 and two.mp4 of noise, beside a image and a clip that is none."""
    av = pytest.importorskip("av")
    import numpy as np

    folder = image_folder.parent / "clips"
    folder.mkdir()
    random = np.random.default_rng(1)
    for name in ("one.mp4", "two.mp4"):
        with av.open(str(folder / name), "w") as output:
            stream = output.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for _ in range(8):
                colour = random.integers(0, 256, (1, 1, 3), dtype=np.uint8)
                frame = av.VideoFrame.from_ndarray(np.tile(colour, (48, 64, 1)), format="rgb24")
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
    (folder / "bad.mp4").write_bytes((folder / "one.mp4").read_bytes()[:500])
    (folder / "photo.png").write_bytes((image_folder / "a.png").read_bytes())
    return folder


def test_a_clip_is_asked_about_its_frames(answerer: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = str(clips / "one.mp4")
    assert main(["answer", clip, *QUESTIONS, "--model", str(answerer), "--num-frames", "3"]) == 0
    model = openblip.load(answerer)
    expected = model.answer(model.encode_videos(clip, 3), QUESTIONS, return_scores=True)
    lines = printed(capsys)
    assert [line["answer"] for line in lines] == [answer.text for answer in expected]
    assert [line["logprob"] for line in lines] == pytest.approx([a.logprob for a in expected], abs=1e-5)


def test_clips_and_images_of_a_folder_are_asked_in_order(
    answerer: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.jsonl"
    more = ["--model", str(answerer), "--num-frames", "3", "--batch-size", "4", "--out", str(out)]
    assert main(["answer", str(clips), QUESTIONS[0], *more]) == 1
    assert "bad.mp4" in capsys.readouterr().err
    lines = read_lines(out)
    assert [Path(line["key"]).name for line in lines] == ["one.mp4", "photo.png", "two.mp4"]
    model = openblip.load(answerer)
    images = [
        model.encode_videos(clips / "one.mp4", 3),
        model.encode(clips / "photo.png"),
        model.encode_videos(clips / "two.mp4", 3),
    ]
    expected = [model.answer(image, QUESTIONS[:1], return_scores=True)[0].logprob for image in images]
    assert [line["logprob"] for line in lines] == pytest.approx(expected, abs=1e-5)
    assert len({line["logprob"] for line in lines}) == 3
