"""VisDial with its dense annotations, NLVR2, and instructions in every form, in miniature as distributed."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotation_files import describe, read_all, read_samples, write, write_lines

from openblip.data.inspect import inspect_source
from openblip.data.sources import open_source
from openblip.data.texts import Turn, turns_of
from openblip.errors import SourceError

QUESTIONS = ["is the photo in color", "are there people ", "what time is it"]
ANSWERS = ["yes", "no", "can't tell", "2 men ", "noon"]


def turn(question, answer=None, options=None, gt_index=None):
    found = {"question": question, "answer": answer, "answer_options": options, "gt_index": gt_index}
    return {name: value for name, value in found.items() if value is not None}


def dialog(image_id, *rounds, caption="a man on a bike"):
    return {"image_id": image_id, "caption": caption, "dialog": list(rounds)}


def visdial(*dialogs, split="val2018"):
    return {"data": {"questions": QUESTIONS, "dialogs": list(dialogs), "answers": ANSWERS}, "split": split}


@pytest.fixture
def val(tmp_path, write_images):
    write_images(*(f"VisualDialog_val2018/VisualDialog_val2018_{n:012d}.jpg" for n in (185565, 284024)))
    first = dialog(185565, turn(0, 0, [0, 1, 2], 0), turn(1, 3, [4, 3], 1))
    return write(tmp_path / "visdial_1.0_val.json", visdial(first, dialog(284024, turn(2, 4, [1, 4], 1))))


def test_visdial(val, images):
    samples = read_samples(val, images)
    assert [s.key for s in samples] == ["185565", "284024"]
    assert samples[0].captions == (samples[0].info["caption"],) == ("a man on a bike",)
    assert samples[0].info["dialog"] == [
        {"question": QUESTIONS[0], "answer": "yes", "options": ["yes", "no", "can't tell"], "answer_index": 0},
        {"question": "are there people", "answer": "2 men", "options": ["noon", "2 men"], "answer_index": 1},
    ]
    name = "VisualDialog_val2018_000000185565.jpg"
    assert samples[0].image == (images / "VisualDialog_val2018" / name).read_bytes()
    found = describe(val, images)
    assert found["format"] == "VisDial dialogs"
    assert "visdial_1.0_val_dense_annotations.json" in found["missing"]


@pytest.mark.parametrize(("companion", "field"), [("dense_annotations", "gt_relevance"), ("dense_sample", "relevance")])
def test_dense_annotations_beside_it(val, images, companion, field):
    rows = [{"image_id": 185565, "round_id": 2, field: [0, 0.8]}]
    path = write(val.parent / f"visdial_1.0_val_{companion}.json", rows)
    first, second = (s.info["dialog"] for s in read_all(val, images)[0])
    assert first[1]["relevance"] == [0.0, 0.8]
    assert "relevance" not in first[0]
    assert "relevance" not in second[0]
    found = describe(val, images)
    assert found["dense annotations"] == str(path)
    assert "missing" not in found


def test_images_without_their_folder(val, images):
    for file in (images / "VisualDialog_val2018").iterdir():
        file.rename(images / file.name)
    assert len(read_all(val, images)[0]) == 2


def test_training_images_are_of_both_coco_sets(tmp_path, images, write_images):
    write_images("train2014/COCO_train2014_000000000009.jpg", "val2014/COCO_val2014_000000000042.jpg")
    rounds = turn(0, 0, [0, 1], 0)
    path = write(
        tmp_path / "visdial_1.0_train.json",
        visdial(dialog(9, rounds), dialog(42, rounds), dialog(43, rounds), split="train"),
    )
    samples, rejects = read_all(path, images)
    assert [s.key for s in samples] == ["9", "42"]
    assert samples[1].image == (images / "val2014" / "COCO_val2014_000000000042.jpg").read_bytes()
    assert "COCO_train2014_000000000043.jpg" in rejects[0].reason
    assert "COCO_val2014_000000000043.jpg" in rejects[0].reason


def test_the_last_round_of_a_test_dialog_has_no_answer(tmp_path, images, write_images):
    write_images("VisualDialog_test2018/VisualDialog_test2018_000000000568.jpg")
    path = write(
        tmp_path / "visdial_1.0_test.json", visdial(dialog(568, turn(0, 0), turn(1, options=[0, 1])), split="test2018")
    )
    samples = read_samples(path, images)
    assert samples[0].info["dialog"] == [
        {"question": QUESTIONS[0], "answer": "yes"},
        {"question": "are there people", "options": ["yes", "no"]},
    ]


def test_no_image_of_this_split_is_looked_for_elsewhere(val, images, tmp_path):
    """The same number is another image in COCO's other sets."""
    (images / "VisualDialog_val2018" / "VisualDialog_val2018_000000284024.jpg").unlink()
    (images / "train2014").mkdir()
    (images / "train2014" / "COCO_train2014_000000284024.jpg").write_bytes(b"another")
    samples, rejects = read_all(val, images)
    assert [s.key for s in samples] == ["185565"]
    assert "train2014" not in rejects[0].reason


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (dialog(2, turn(3, 0, [0], 0)), "round 1: question is 3, of 3"),
        (dialog(2, turn(0, 0), turn(0, 5)), "round 2: answer is 5, of 5"),
        (dialog(2, turn(0, 0, [0, 1, 5], 0)), "round 1: answer_options is 5, of 5"),
        (dialog(2, turn(0, 0, [0, -1], 0)), "round 1: answer_options is -1, of 5"),
        (dialog(2, turn(0, 0, [0, 1], 2)), "round 1: gt_index is 2, of 2"),
        (dialog(2, turn(0, 0, gt_index=0)), "round 1: gt_index is 0, of 0"),
        (dialog(2, turn("who", 0)), "round 1: question must be a number, not 'who'"),
        (dialog(2, turn(0, True)), "round 1: answer must be a number"),
        (dialog(2, turn(0, 0, ["yes", "no"], 0)), "round 1: answer_options must"),
        (dialog(2, turn(0, 0, [1 << 40], 0)), "round 1: answer_options must"),
        (dialog(2, turn(0, 0, [], 0)), "round 1: answer_options must"),
        (dialog(2, {"answer": 0}), "round 1: question must be a number"),
        (dialog(2, "round"), "expected an object"),
        (dialog(2), "dialog must be a list of rounds"),
        (dialog(2, turn(0), caption=None), "caption must be a text"),
        (dialog("two", turn(0)), "image_id must be a number"),
        ({"image_id": 2, "caption": "x"}, "dialog must be a list"),
        (dialog(1, turn(0)), "duplicate key"),
        ("dialog", "expected an object"),
    ],
)
def test_broken_dialogs_are_named(tmp_path, images, write_images, broken, reason):
    write_images("VisualDialog_val2018_000000000001.jpg")
    path = write(tmp_path / "dialogs.json", visdial(dialog(1, turn(0, 0, [0], 0)), broken))
    samples, rejects = read_all(path, images)
    assert [s.key for s in samples] == ["1"]
    assert len(rejects) == 1
    assert rejects[0].reason.startswith("dialogs[1]: ")
    assert reason in rejects[0].reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"round_id": 3, "gt_relevance": [0, 1]}, "round_id of the dense annotations, from 0 is 2, of 2"),
        ({"round_id": 0, "gt_relevance": [0, 1]}, "is -1, of 2"),
        ({"round_id": 2, "gt_relevance": [0, 1, 0]}, "round 2: 3 "),
    ],
)
def test_dense_annotations_of_other_rounds(val, images, row, reason):
    write(val.parent / "visdial_1.0_val_dense_annotations.json", [{"image_id": 185565, **row}])
    samples, rejects = read_all(val, images)
    assert [s.key for s in samples] == ["284024"]
    assert reason in rejects[0].reason


@pytest.mark.parametrize("content", ["{}", "[5]", '[{"image_id": 1, "round_id": 1}]', "["])
def test_broken_dense_annotations_are_named(val, images, content):
    (val.parent / "visdial_1.0_val_dense_annotations.json").write_text(content)
    with pytest.raises(SourceError, match=r"visdial_1\.0_val_dense_annotations\.json"):
        open_source(str(val), images=str(images))


def test_dense_annotations_alone_ask_for_their_dialogs(tmp_path):
    path = write(tmp_path / "dense.json", [{"image_id": 1, "round_id": 1, "gt_relevance": [0]}])
    with pytest.raises(SourceError, match="give the dialogs file"):
        open_source(str(path), images=str(tmp_path))


@pytest.mark.parametrize("name", ["questions", "answers"])
def test_lists_that_are_no_texts(tmp_path, name):
    content = visdial(dialog(1, turn(0)))
    content["data"][name] = [1, 2]
    with pytest.raises(SourceError, match=f"{name} of its data must be a list of texts"):
        open_source(str(write(tmp_path / "v.json", content)), images=str(tmp_path))


def statement(identifier, sentence, label=None, **fields):
    row = {"validation": {"117": "False"}, "sentence": sentence, "writer": "128", "identifier": identifier, **fields}
    return row if label is None else row | {"label": label}


def pair(folder, stem):
    return f"{folder}/{stem}-img0.png", f"{folder}/{stem}-img1.png"


@pytest.mark.parametrize("folder", ["images/train/53", "train/53", "53", "images/train", "train", "."])
def test_train(tmp_path, images, write_images, folder):
    write_images(*pair(folder, "train-10171-0"))
    rows = [statement("train-10171-0-0", "An image shows one leather pencil case.", "False", directory=53)]
    rows += [statement("train-10171-0-1", "The left image shows a case.", "True", directory=53)]
    path = write_lines(tmp_path / "train.json", rows)
    samples = read_samples(path, images)
    assert [s.key for s in samples] == ["train-10171-0-0", "train-10171-0-1"]
    assert [s.info["label"] for s in samples] == [False, True]
    assert samples[0].info["statement"] == "An image shows one leather pencil case."
    assert samples[0].image == (images / folder / "train-10171-0-img0.png").read_bytes()
    assert samples[0].second_image == (images / folder / "train-10171-0-img1.png").read_bytes()
    assert samples[0].image != samples[0].second_image
    assert samples[0].image_id == samples[1].image_id
    assert describe(path, images) == {"format": "NLVR2 statements"}


@pytest.mark.parametrize(("split", "file"), [("dev", "dev.json"), ("test1", "test1.json"), ("test2", "test2.jsonl")])
def test_other_splits_and_other_names(tmp_path, images, write_images, split, file):
    write_images(*pair(split, f"{split}-850-0"))
    rows = [
        statement(f"{split}-850-0-0", "There is at least one dog.", "True"),
        statement(f"{split}-850-0-1", "A dog."),
    ]
    samples = read_samples(write_lines(tmp_path / file, rows), images)
    assert samples[0].info["label"] is True
    assert "label" not in samples[1].info
    assert samples[0].second_image == (images / split / f"{split}-850-0-img1.png").read_bytes()


def test_broken_lines_are_named(tmp_path, images, write_images):
    write_images(*pair("dev", "dev-1-0"), "dev/dev-2-0-img0.png")
    path = write_lines(
        tmp_path / "dev.json",
        [
            statement("dev-1-0-0", "Fine.", "True"),
            "",
            statement("dev-1-0-0", "Again.", "True"),
            statement("dev-1-0-1", "Neither.", "Maybe"),
            "{broken",
            statement("dev-1", "No pair.", "True"),
            statement("dev-1-0-2", 5, "True"),
            statement(7, "A number.", "True"),
            statement("dev-2-0-0", "The right one is gone.", "True"),
            statement("dev-3-0-0", "Both are gone.", "True"),
            "[]",
        ],
    )
    samples, rejects = read_all(path, images)
    assert [s.info["statement"] for s in samples] == ["Fine."]
    reasons = {r.key: r.reason for r in rejects}
    assert reasons.keys() == {"dev-1-0-0", "dev-2-0-0", "dev-3-0-0", *(f"line {n}" for n in (4, 5, 6, 7, 8, 11))}
    assert reasons["line 4"] == "line 4: the label of a statement must be true or false, not 'Maybe'"
    assert "dev-2-0-img1.png" in reasons["dev-2-0-0"]
    assert "broken json" in reasons["line 5"]
    assert "dev-850-0-0" in reasons["line 6"]


def test_the_authors_list(tmp_path, images, write_images):
    write_images("dev/a-img0.png", "dev/a-img1.png")
    both = ["dev/a-img0.png", "dev/a-img1.png"]
    rows = [
        {"images": both, "sentence": "There is a dog.", "label": "True"},
        {"images": both, "sentence": "There is none.", "label": "False"},
        {"images": both, "sentence": "Perhaps.", "label": "perhaps"},
        {"images": both[:1], "sentence": "One.", "label": "True"},
        {"images": [5, 6], "sentence": "Numbers.", "label": "True"},
        {"images": [both[0], "dev/gone.png"], "sentence": "Gone.", "label": "True"},
    ]
    path = write(tmp_path / "nlvr_dev.json", rows)
    samples, rejects = read_all(path, images)
    statements = [(s.info["statement"], s.info["label"]) for s in samples]
    assert statements == [("There is a dog.", True), ("There is none.", False)]
    assert samples[0].second_image == (images / both[1]).read_bytes() != samples[0].image
    assert samples[0].image_id == samples[1].image_id
    assert {r.key for r in rejects} == {"[2]", "[3]", "[4]", "000000005"}
    assert describe(path, images) == {"format": "list of statements about two images"}


def test_tables_of_statements(tmp_path, images, write_images):
    write_images("a.png", "b.png")
    lines = ["image,second_image,statement,label", "a.png,b.png,A dog.,true", "a.png,b.png,Two.,False"]
    lines += ["a.png,b.png,Unknown.,", "a.png,b.png,Odd.,maybe", "b.png,a.png,Swapped.,true", "a.png,,One.,true"]
    samples, rejects = read_all(write_lines(images / "t.csv", lines))
    assert [s.info.get("label") for s in samples] == [True, False, None, True, True]
    assert "label" not in samples[2].info
    assert samples[0].second_image == (images / "b.png").read_bytes()
    assert samples[4].second_image is None
    assert samples[0].image_id == samples[1].image_id
    assert len({s.image_id for s in samples}) == 3
    assert "t.csv line 5: the label" in rejects[0].reason
    rows = [{"image": "a.png", "second_image": "b.png", "statement": "A dog.", "label": True}]
    rows += [{"image": "a.png", "second_image": 5, "statement": "A dog.", "label": True}]
    samples, rejects = read_all(write_lines(images / "t.jsonl", rows))
    assert [s.info["label"] for s in samples] == [True]
    assert "t.jsonl line 2" in rejects[0].reason


def test_labels_of_classes_stay_texts(tmp_path, images, write_images):
    write_images("a.png")
    (images / "t.csv").write_text("image,label\na.png,tabby cat\na.png,true\n")
    samples, _ = read_all(images / "t.csv", None)
    assert [s.info["label"] for s in samples] == ["tabby cat", "true"]


TURNS = [Turn("What is it?", "A dog."), Turn("What color?", "Brown.")]
MESSAGES = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A dog."},
    {"from": "human", "value": "What color?"},
    {"from": "gpt", "value": "Brown."},
]
LISTED = [turn._asdict() for turn in TURNS]


def llava(*rows):
    return [{"id": number, "image": image, "conversations": said} for number, image, said in rows]


def test_llavas_list_has_several_conversations_about_one_image(tmp_path, write_images, images):
    write_images("train/1.jpg", "train/2.jpg")
    rows = llava(("1", "train/1.jpg", MESSAGES), ("1", "train/1.jpg", MESSAGES[:2]), ("2", "train/2.jpg", MESSAGES))
    path = write(tmp_path / "llava_instruct_150k.json", rows)
    samples = read_samples(path, images)
    assert [turns_of(sample.info) for sample in samples] == [TURNS, TURNS[:1], TURNS]
    assert samples[0].image_id == samples[1].image_id != samples[2].image_id
    assert len({sample.key for sample in samples}) == 3
    assert describe(path, images)["format"] == "list of instructions about images"
    facts = inspect_source(open_source(str(path), images=str(images))).facts()
    assert (facts["samples with instructions"], facts["instructions"]) == (3, 5)


def test_a_text_without_image_is_a_reject(tmp_path, write_images, images):
    write_images("1.jpg")
    rows = [*llava(("1", "1.jpg", MESSAGES)), {"id": "x", "conversations": MESSAGES}]
    samples, rejects = read_all(write(tmp_path / "mix.json", rows), images)
    assert len(samples) == 1
    assert "no image" in rejects[0].reason


@pytest.mark.parametrize(
    ("fields", "turns"),
    [
        ({"conversations": MESSAGES}, TURNS),
        ({"turns": LISTED}, TURNS),
        ({"instruction": "What is it?", "answer": "A dog."}, TURNS[:1]),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_tables_of_instructions(tmp_path, write_images, images, fields, turns, suffix):
    write_images("1.jpg")
    path = tmp_path / f"table.{suffix}"
    row = {"image": "1.jpg", **fields}
    if suffix == "jsonl":
        write_lines(path, [row])
    elif suffix == "csv":
        with path.open("w", newline="") as file:
            cells = [v if isinstance(v, str) else json.dumps(v) for v in row.values()]
            csv.writer(file).writerows([row, cells])
    else:
        content = (images / "1.jpg").read_bytes()
        pq.write_table(pa.Table.from_pylist([row | {"image": content}]), path)
    samples = read_samples(path, None if suffix == "parquet" else images)
    assert turns_of(samples[0].info) == turns


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conversations": "[{"}, "conversations is broken json"),
        ({"conversations": [{"from": "human"}]}, "each with a value"),
        ({"turns": [{"answer": "yes"}]}, "each with a question"),
        ({"instruction": 7, "answer": "yes"}, "instruction must be a text"),
    ],
)
def test_broken_instructions_are_rejects(tmp_path, write_images, images, fields, message):
    write_images("1.jpg")
    samples, rejects = read_all(write_lines(tmp_path / "table.jsonl", [{"image": "1.jpg", **fields}]), images)
    assert not samples
    assert message in rejects[0].reason
