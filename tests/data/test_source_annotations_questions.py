"""VQAv2, OK-VQA, Visual Genome, A-OKVQA and lists and tables of questions, in miniature as distributed."""

import json
import pickle
from pathlib import Path

import pytest
from annotation_files import describe, read_all, read_samples, write, write_lines

from openblip.data.sources import open_source
from openblip.errors import SourceError
from source_items import items_of

INFO = {"description": "This is v2.0 of the VQA dataset.", "version": "2.0", "year": 2017}
ANSWERS = ["net", "net", "net", "netting", "net", "net", "mesh", "net", "net", "net"]


def questions(*rows, subtype="train2014", **fields):
    return {"info": INFO, "task_type": "Open-Ended", "data_subtype": subtype, "questions": list(rows), **fields}


def question(question_id, image_id, text, **fields):
    return {"image_id": image_id, "question": text, "question_id": question_id, **fields}


def annotation(question_id, image_id, answers=ANSWERS):
    listed = [{"answer": answer, "answer_confidence": "maybe", "answer_id": n} for n, answer in enumerate(answers, 1)]
    types = {"question_type": "what is this", "answer_type": "other", "multiple_choice_answer": answers[0]}
    return {**types, "answers": listed, "image_id": image_id, "question_id": question_id}


@pytest.fixture
def vqa(tmp_path, write_images):
    """Two questions about one image and one about another, which nobody answered."""
    write_images(*(f"train2014/COCO_train2014_{n:012d}.jpg" for n in (9, 458752)))
    rows = [
        question(458752000, 458752, "What is this photo taken looking through?"),
        question(458752001, 458752, "What position is this man playing?"),
        question(9000, 9, "Why?"),
    ]
    answers = [annotation(458752001, 458752, ["pitcher"] * 9 + ["catcher"]), annotation(458752000, 458752)]
    write(tmp_path / "v2_mscoco_train2014_annotations.json", {"info": INFO, "annotations": answers})
    return write(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json", questions(*rows))


def test_vqa(vqa, images):
    samples = read_samples(vqa, images)
    assert [s.key for s in samples] == ["458752000", "458752001", "9000"]
    assert samples[0].info == {
        "question": "What is this photo taken looking through?",
        "answers": ANSWERS,
        "question_id": 458752000,
        "image_id": 458752,
        "question_type": "what is this",
        "answer_type": "other",
    }
    assert samples[1].info["answers"] == ["pitcher"] * 9 + ["catcher"]
    assert samples[2].info["answers"] == []
    assert samples[0].image == (images / "train2014" / "COCO_train2014_000000458752.jpg").read_bytes()
    assert samples[0].image_id == samples[1].image_id != samples[2].image_id
    assert all(s.captions == () for s in samples)
    found = describe(vqa, images)
    assert found["format"] == "VQAv2 questions with annotations"
    assert Path(found["annotations"]).name == "v2_mscoco_train2014_annotations.json"


def test_vqa_images_directly_in_the_folder(vqa, images):
    for file in (images / "train2014").iterdir():
        file.rename(images / file.name)
    assert len(read_samples(vqa, images)) == 3
    (images / "train2014").rmdir()
    assert len(read_samples(vqa, images)) == 3


def test_the_missing_annotations_are_named(vqa, images, tmp_path):
    with pytest.raises(SourceError, match="give the questions file"):
        open_source(str(tmp_path / "v2_mscoco_train2014_annotations.json"), images=str(images))
    (tmp_path / "v2_mscoco_train2014_annotations.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(SourceError, match=r"there is no .*/v2_mscoco_train2014_annotations\.json"):
        open_source(str(vqa), images=str(images))
    with pytest.raises(SourceError, match=r"asked\.json: .*has to end in questions\.json"):
        open_source(str(vqa.rename(tmp_path / "asked.json")), images=str(images))


@pytest.mark.parametrize(("subtype", "folder"), [("test2015", "test2015"), ("test-dev2015", "test2015")])
def test_a_test_set_has_no_answers(tmp_path, images, write_images, subtype, folder):
    write_images(f"{folder}/COCO_test2015_000000262144.jpg")
    path = write(
        tmp_path / f"v2_OpenEnded_mscoco_{subtype}_questions.json",
        questions(question(262144000, 262144, "Is the ball flying?"), subtype=subtype),
    )
    samples = read_samples(path, images)
    assert [s.info["answers"] for s in samples] == [[]]
    assert describe(path, images) == {"format": "VQAv2 questions of a test set, without annotations"}


def test_ok_vqa(tmp_path, images, write_images):
    write_images("COCO_val2014_000000297147.jpg")
    info = {"description": "This is v1.0 of the OK-VQA dataset."}
    row = annotation(2971475, 297147, ["race", "race", "race"])
    for answer in row["answers"]:
        answer["raw_answer"] = "racing"
    write(tmp_path / "mscoco_val2014_annotations.json", {"info": info, "annotations": [row]})
    rows = [question(2971475, 297147, "What sport can you use this for?")]
    path = write(tmp_path / "OpenEnded_mscoco_val2014_questions.json", questions(*rows, subtype="val2014", info=info))
    samples = read_samples(path, images)
    assert samples[0].info["answers"] == ["race", "race", "race"]
    assert describe(path, images)["format"] == "OK-VQA questions with annotations"


def test_broken_questions_are_named(tmp_path, images, write_images):
    write_images("COCO_train2014_000000000009.jpg")
    rows = [
        question(1, 9, "Fine?"),
        question(1, 9, "Again?"),
        question(2, "nine", "Which image?"),
        question(3, 9, ["no", "text"]),
        question(None, 9, "Who?"),
        question(5, 9, "Answers?"),
        question(6, 404, "Where?"),
        "question",
    ]
    broken = [{"question_id": 5, "answers": 7}, annotation(1, 9), annotation(77, 9), "row", {"question_id": []}]
    write(tmp_path / "v2_mscoco_train2014_annotations.json", {"annotations": broken})
    path = write(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json", questions(*rows))
    samples, rejects = read_all(path, images)
    assert [s.key for s in samples] == ["1"]
    assert samples[0].info["question"] == "Fine?"
    reasons = {r.key: r.reason for r in rejects}
    assert reasons.keys() == {"1", "6", *(f"questions[{n}]" for n in (2, 3, 4, 5, 7))}
    assert reasons["questions[2]"] == "questions[2]: image_id must be a number, not 'nine'"
    assert "answers must be" in reasons["questions[5]"]
    assert "COCO_train2014_000000000404.jpg" in reasons["6"]


@pytest.mark.parametrize("content", ["[]", "{}", '{"annotations": 5}', "{"])
def test_a_broken_annotations_file_is_named(vqa, images, tmp_path, content):
    (tmp_path / "v2_mscoco_train2014_annotations.json").write_text(content)
    with pytest.raises(SourceError, match=r"v2_mscoco_train2014_annotations\.json"):
        open_source(str(vqa), images=str(images))


def test_questions_that_do_not_say_which_images(tmp_path, images, write_images):
    write_images("x.jpg")
    path = write(tmp_path / "questions.json", questions(question(1, 9, "Fine?"), subtype=None))
    with pytest.raises(SourceError, match=r"questions\.json: no data_subtype"):
        open_source(str(path), images=str(images))


def test_another_process_opens_the_file_anew(vqa, images):
    source = open_source(str(vqa), images=str(images))
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000
    assert items_of(pickle.loads(pickled)) == items_of(source)


def genome_question(qa_id, image_id, question, answer):
    objects = {"a_objects": [], "q_objects": []}
    return {"question": question, "image_id": image_id, "qa_id": qa_id, "answer": answer, **objects}


CLOCK = [genome_question(986768, 1, "What color is the clock?", "Green."), genome_question(2, 1, "How tall?", "Very.")]
VISUAL_GENOME = [
    {"id": 1, "qas": CLOCK},
    {"id": 2, "qas": []},
    {"id": 3, "qas": [genome_question(5, 3, "Who?", "A man.")]},
]


def test_visual_genome(tmp_path, images, write_images):
    write_images("VG_100K_2/1.jpg", "VG_100K/3.jpg")
    path = write(tmp_path / "question_answers.json", VISUAL_GENOME)
    samples = read_samples(path, images)
    assert [s.info["answers"] for s in samples] == [["Green."], ["Very."], ["A man."]]
    assert all(s.info["weight"] == 0.2 for s in samples)
    assert samples[0].info["question_id"] == 986768
    assert samples[0].image == (images / "VG_100K_2" / "1.jpg").read_bytes()
    assert samples[2].image == (images / "VG_100K" / "3.jpg").read_bytes()


def test_a_visual_genome_image_that_is_in_no_folder(tmp_path, images, write_images):
    write_images("VG_100K_2/1.jpg", "VG_100K/4.jpg")
    samples, rejects = read_all(write(tmp_path / "question_answers.json", VISUAL_GENOME), images)
    assert len(samples) == 2
    for folder in ("VG_100K/", "VG_100K_2/", ""):
        assert f"{images}/{folder}3.jpg" in rejects[0].reason


def test_broken_visual_genome_rows(tmp_path, images, write_images):
    write_images("VG_100K/3.jpg")
    broken = {"id": 5, "qas": [{"qa_id": 5, "question": "No answer?", "image_id": 3}, 5]}
    content = [VISUAL_GENOME[2], {"id": 4}, "image", broken]
    samples, rejects = read_all(write(tmp_path / "question_answers.json", content), images)
    assert len(samples) == 1
    assert [r.key for r in rejects] == ["[1].qas[0]", "[2].qas[0]", "[3].qas[0]", "[3].qas[1]"]
    assert rejects[2].reason == "[3].qas[0]: no answer"


def aokvqa(question_id, image_id, split, **fields):
    text, choices = "What is the man by the bags awaiting?", ["skateboarder", "train", "delivery", "cab"]
    row = {"split": split, "image_id": image_id, "question_id": question_id, "question": text, "choices": choices}
    return {**row, "difficult_direct_answer": False, **fields}


def test_aokvqa(tmp_path, images, write_images):
    write_images("train2017/000000299207.jpg")
    row = aokvqa("22MexNkBPpdZGX6sxbxVBH", 299207, "train", correct_choice_idx=3, direct_answers=["ride"] * 10)
    row["rationales"] = ["A train would not be on the street."]
    path = write(tmp_path / "aokvqa_v1p0_train.json", [row])
    samples = read_samples(path, images)
    assert samples[0].key == samples[0].info["question_id"] == "22MexNkBPpdZGX6sxbxVBH"
    assert samples[0].info["answers"] == ["ride"] * 10
    assert samples[0].info["choices"][samples[0].info["correct_choice"]] == "cab"
    assert samples[0].info["rationales"] == row["rationales"]
    assert describe(path, images) == {"format": "A-OKVQA questions"}


def test_aokvqa_test_set_and_images_without_folders(tmp_path, images, write_images):
    write_images("000000000009.jpg")
    samples = read_samples(write(tmp_path / "test.json", [aokvqa("a", 9, "test")]), images)
    assert samples[0].info["answers"] == []
    assert "correct_choice" not in samples[0].info


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"correct_choice_idx": 4}, "number 4 of 4 choices"),
        ({"correct_choice_idx": -1}, "number -1 of 4 choices"),
        ({"correct_choice_idx": "cab"}, "must be a number"),
        ({"choices": "cab", "correct_choice_idx": 1}, "number 1 of 1"),
        ({"choices": [1, 2]}, "choices must be"),
        ({"direct_answers": [1]}, "direct_answers must be"),
        ({"image_id": "x"}, "image_id must be a number"),
    ],
)
def test_broken_aokvqa_rows(tmp_path, images, write_images, fields, reason):
    write_images("train2017/000000000009.jpg")
    rows = [aokvqa("good", 9, "train"), aokvqa("bad", 9, "train") | fields]
    samples, rejects = read_all(write(tmp_path / "aokvqa.json", rows), images)
    assert [s.key for s in samples] == ["good"]
    assert reason in rejects[0].reason


def test_the_authors_lists(tmp_path, images, write_images):
    write_images("train2014/a.jpg", "VG_100K/1.jpg")
    rows = [
        {"question_id": 1, "question": "What?", "answer": ANSWERS, "image": "train2014/a.jpg", "dataset": "vqa"},
        {"question_id": 2, "question": "Who?", "answer": "a man", "image": "VG_100K/1.jpg", "dataset": "vg"},
        {"question": "No id?", "image": "train2014/a.jpg", "dataset": "vqa"},
    ]
    path = write(tmp_path / "vqa_train.json", rows)
    samples = read_samples(path, images)
    assert [s.info["answers"] for s in samples] == [ANSWERS, ["a man"], []]
    assert [s.info.get("weight", 1.0) for s in samples] == [1.0, 0.2, 1.0]
    assert [s.info["question_id"] for s in samples] == [1, 2, 2]
    assert [s.key for s in samples] == ["1", "2", "000000002"]
    assert describe(path, images) == {"format": "list of questions"}


def test_a_jsonl_table_of_questions(tmp_path, write_images):
    write_images("a.jpg")
    rows = [
        {"image": "images/a.jpg", "question": "What?", "answers": ["x", "y", "x"]},
        {"image": "images/a.jpg", "question": "Who?", "answer": "z", "weight": 0.5, "extra": [1]},
        {"image": "images/a.jpg", "question": 5},
        {"image": "images/a.jpg", "question": "?", "answers": {"x": 1}},
        {"image": "images/a.jpg", "question": "?", "weight": -1},
        {"image": "images/a.jpg", "question": "?", "choices": ["x"], "correct_choice": 1},
    ]
    samples, rejects = read_all(write_lines(tmp_path / "t.jsonl", rows))
    assert [s.info["answers"] for s in samples] == [["x", "y", "x"], ["z"]]
    assert samples[1].info["weight"] == 0.5
    assert samples[1].info["extra"] == [1]
    reasons = [r.reason for r in rejects]
    for line, what in ((3, "question"), (4, "answers"), (5, "weight"), (6, "correct choice")):
        assert any(f"t.jsonl line {line}: the {what}" in r or f"line {line}: {what}" in r for r in reasons)


def test_a_csv_table_of_questions(tmp_path, write_images):
    write_images("a.jpg")
    lines = [
        "image,question,answers,weight",
        'images/a.jpg,What?,"[""x"", ""y""]",0.5',
        "images/a.jpg,Who?,a man,",
        "images/a.jpg,Where?,,",
        "images/a.jpg,Bracket?,[sic,",
    ]
    samples = read_samples(write_lines(tmp_path / "t.csv", lines))
    assert [s.info["answers"] for s in samples] == [["x", "y"], ["a man"], [], ["[sic"]]
    assert samples[0].info["weight"] == 0.5
    assert all("weight" not in s.info for s in samples[1:])


def test_a_json_of_lines_is_a_table(tmp_path, write_images):
    write_images("a.jpg")
    rows = [{"image": "a.jpg", "question": "What?", "answers": ["x"]}] * 2
    assert len(read_all(write_lines(tmp_path / "t.json", rows), tmp_path / "images")[0]) == 2
    path = write(tmp_path / "list.jsonl", json.dumps(rows, indent=1))
    assert len(read_all(path, tmp_path / "images")[0]) == 2
