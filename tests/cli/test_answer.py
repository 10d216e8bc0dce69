"""`openblip answer` against a tiny real checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

import openblip
from shared_files import as_json, read_lines, write_tar

QUESTIONS = ["what is beside the tree?", "how many cars"]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "answers.jsonl"


def logprobs_of(answers: list[Any]) -> Any:
    return pytest.approx([answer.logprob for answer in answers], abs=1e-5)


def test_one_line_per_question_about_one_image(run: Any, answerer: Path, image_folder: Path) -> None:
    image = image_folder / "a.png"
    lines = run("answer", image, *QUESTIONS, "--model", answerer).lines
    expected = openblip.load(answerer).answer([image] * 2, QUESTIONS, return_scores=True)
    assert [list(line) for line in lines] == [["question", "answer", "logprob"]] * 2
    assert [line["question"] for line in lines] == QUESTIONS
    assert [line["answer"] for line in lines] == [answer.text for answer in expected]
    assert [line["logprob"] for line in lines] == logprobs_of(expected)


def test_the_options_of_writing_reach_the_model(run: Any, answerer: Path, image_folder: Path) -> None:
    image, decoding = image_folder / "a.png", openblip.Beam(num_beams=2, max_new_tokens=2, min_new_tokens=1)
    more = ["--num-beams", "2", "--max-new-tokens", "2", "--encoder-token", "[CLS]"]
    [line] = run("answer", image, QUESTIONS[0], "--model", answerer, *more).lines
    expected, other = (
        openblip.load(answerer, encoder_token=token).answer(image, QUESTIONS[0], decoding=decoding, return_scores=True)
        for token in ("[CLS]", "[ENC]")
    )
    assert (line["answer"], line["logprob"]) == (expected.text, pytest.approx(expected.logprob, abs=1e-5))
    assert line["logprob"] != pytest.approx(other.logprob, abs=1e-5)


def test_the_best_of_the_candidates_is_chosen(run: Any, answerer: Path, image_folder: Path, tmp_path: Path) -> None:
    image, candidates = image_folder / "a.png", ["a red dog", "blue", "two cars"]
    (tmp_path / "answers.json").write_text(json.dumps(candidates))
    lines = run("answer", image, *QUESTIONS, "--model", answerer, "--candidates", tmp_path / "answers.json").lines
    expected = openblip.load(answerer).answer(image, QUESTIONS, candidates)
    assert [line["answer"] for line in lines] == expected
    assert set(expected) <= set(candidates)


def test_a_table_of_questions_gives_a_line_each(run: Any, answerer: Path, image_folder: Path, out: Path) -> None:
    names, questions = ["a.png", "b.jpg", "a.png"], [*QUESTIONS, "is it red?"]
    rows = [
        {"id": number, "image": f"images/{name}", "question": question, "question_id": 10 * number}
        for number, (name, question) in enumerate(zip(names, questions, strict=True), start=1)
    ]
    del rows[2]["question_id"]
    table = write_table(image_folder.parent / "asked.jsonl", rows)
    run("answer", table, "--model", answerer, "--out", out)
    lines = read_lines(out)
    assert [list(line) for line in lines] == [["shard", "key", "question_id", "question", "answer", "logprob"]] * 3
    assert [line["question_id"] for line in lines] == [10, 20, "3"]
    assert [(line["shard"], line["key"]) for line in lines] == [("asked", str(n)) for n in (1, 2, 3)]
    assert [line["question"] for line in lines] == questions
    expected = openblip.load(answerer).answer([image_folder / name for name in names], questions)
    assert [line["answer"] for line in lines] == expected


def test_every_image_of_a_folder_is_asked_the_questions_given(
    run: Any, answerer: Path, image_folder: Path, out: Path
) -> None:
    words = ["answer", image_folder, *QUESTIONS, "--model", answerer]
    lines = run(*words).lines
    names = ["a.png", "b.jpg", "deeper/c.webp"]
    assert [line["key"] for line in lines] == [str(image_folder / name) for name in names for _ in QUESTIONS]
    assert [line["question"] for line in lines] == QUESTIONS * 3
    model = openblip.load(answerer)
    expected = [answer for name in names for answer in model.answer(image_folder / name, QUESTIONS)]
    assert [line["answer"] for line in lines] == expected
    run(*words, "--batch-size", "2", "--out", out)
    assert read_lines(out) == [{**line, "logprob": pytest.approx(line["logprob"], abs=1e-5)} for line in lines]


@pytest.mark.parametrize("cut", [0, 25])
def test_a_killed_run_is_continued_to_the_same_file(
    run: Any, watch: Any, answerer: Path, image_folder: Path, out: Path, cut: int
) -> None:
    words = ["answer", image_folder, *QUESTIONS, "--model", answerer, "--out", out]
    run(*words)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:cut])
    counts = watch("answer")
    run(*words)
    assert out.read_bytes() == whole
    assert sum(counts) == 4  # two questions about the second image, whose lines were not whole, and the third


def test_an_interrupt_leaves_what_is_done(
    run: Any, answerer: Path, image_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["answer", image_folder, QUESTIONS[0], "--model", answerer, "--out", out, "--batch-size", "1"]
    answer = openblip.BlipPredictor.answer
    written: list[int] = []

    def stopping(self: openblip.BlipPredictor, *rest: Any, **options: Any) -> Any:
        written.append(len(read_lines(out)) if out.exists() else -1)
        if len(written) == 4:
            raise KeyboardInterrupt
        return answer(self, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(openblip.BlipPredictor, "answer", stopping)
        run(*words, code=130)
    # The first call has no image and lets the model look at the options. A kill would leave as many lines.
    assert written == [-1, 0, 1, 2]
    assert len(read_lines(out)) == 2
    run(*words)
    assert [Path(line["key"]).name for line in read_lines(out)] == ["a.png", "b.jpg", "c.webp"]


def test_a_file_of_other_questions_is_not_touched(
    run: Any, refusal: Any, answerer: Path, image_folder: Path, out: Path
) -> None:
    common = ["--model", answerer, "--out", out]
    run("answer", image_folder, *QUESTIONS, *common)
    before = out.read_bytes()
    for other in (["is it red?"], [*QUESTIONS, "is it red?"], [QUESTIONS[1], QUESTIONS[0]]):
        assert "questions was [" in refusal("answer", image_folder, *other, *common)
        assert out.read_bytes() == before


def test_rows_that_cannot_be_answered_are_named_skipped_and_counted(
    run: Any, answerer: Path, image_folder: Path, out: Path
) -> None:
    (image_folder / "bad.png").write_bytes(b"no image")
    rows: list[dict[str, Any]] = [
        {"id": "good", "image": "images/a.png", "question": "what is it"},
        {"id": "bad", "image": "images/bad.png", "question": "what is it"},
        {"id": "gone", "image": "images/gone.png", "question": "what is it"},
        {"id": "silent", "image": "images/a.png", "caption": "a dog"},
        {"id": "nothing", "question": "what is it"},
        {"id": "number", "image": "images/a.png", "question": 5},
    ]
    table = write_table(image_folder.parent / "asked.jsonl", rows)
    messages = run("answer", table, "--model", answerer, "--out", out, code=1).err
    assert [line["key"] for line in read_lines(out)] == ["good"]
    for name in ("asked/bad", "asked/gone", "asked/silent", "line 5", "line 6"):
        assert name in messages
    assert "it has no question" in messages
    assert "answered about 1 images, skipped 5" in messages


def test_shards_are_asked_too(run: Any, answerer: Path, image_folder: Path, tmp_path: Path, out: Path) -> None:
    members = {"x.png": (image_folder / "a.png").read_bytes(), "x.json": as_json(question=QUESTIONS[0], answers=[])}
    run("answer", write_tar(tmp_path / "00000.tar", members.items()), "--model", answerer, "--out", out)
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
        (["A", "what", "--no-repeat-ngram-size", "-1"], "no_repeat_ngram_size"),
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
    refusal: Any, words: list[str], message: str, answerer: Path, image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "NONE").write_text("[]")
    places = {name: tmp_path / name for name in ("EMPTY", "NONE")}
    places |= {"A": image_folder / "a.png", "IMAGES": image_folder}
    assert message in refusal("answer", *(places.get(word, word) for word in words), "--model", answerer)


def test_a_checkpoint_that_cannot_answer_says_what_it_can_before_a_file_is_made(
    refusal: Any, captioner: Path, image_folder: Path, out: Path
) -> None:
    assert "it can do caption" in refusal("answer", image_folder, "what", "--model", captioner, "--out", out)
    assert not out.exists()


def test_a_clip_is_asked_about_its_frames(run: Any, answerer: Path, clips: Path) -> None:
    lines = run("answer", clips / "one.mp4", *QUESTIONS, "--model", answerer, "--num-frames", "3").lines
    model = openblip.load(answerer)
    expected = model.answer(model.encode_videos(str(clips / "one.mp4"), 3), QUESTIONS, return_scores=True)
    assert [line["answer"] for line in lines] == [answer.text for answer in expected]
    assert [line["logprob"] for line in lines] == logprobs_of(expected)


def test_clips_and_images_of_a_folder_are_asked_in_order(run: Any, answerer: Path, clips: Path, out: Path) -> None:
    more = ["--model", answerer, "--num-frames", "3", "--batch-size", "4", "--out", out]
    assert "bad.mp4" in run("answer", clips, QUESTIONS[0], *more, code=1).err
    lines = read_lines(out)
    assert [Path(line["key"]).name for line in lines] == ["one.mp4", "photo.png", "two.mp4"]
    model = openblip.load(answerer)
    one, two = (model.encode_videos(clips / name, 3) for name in ("one.mp4", "two.mp4"))
    images = [one, model.encode(clips / "photo.png"), two]
    expected = [model.answer(image, QUESTIONS[:1], return_scores=True)[0] for image in images]
    assert [line["logprob"] for line in lines] == logprobs_of(expected)
    assert len({line["logprob"] for line in lines}) == 3
