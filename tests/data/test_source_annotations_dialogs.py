"""VisDial v1.0 with its dense annotations, in miniature as distributed."""

import pytest
from annotation_files import describe, read_all, write

from openblip.data.sources import open_source
from openblip.errors import SourceError

QUESTIONS = ["is the photo in color", "are there people ", "what time is it"]
ANSWERS = ["yes", "no", "can't tell", "2 men ", "noon"]


def turn(question, answer=None, options=None, gt_index=None):
    found = {"question": question, "answer": answer, "answer_options": options, "gt_index": gt_index}
    return {name: value for name, value in found.items() if value is not None}


def dialog(image_id, *rounds, caption="a man on a bike"):
    return {"image_id": image_id, "caption": caption, "dialog": list(rounds)}


def visdial(*dialogs, split="val2018"):
    return {
        "data": {"questions": QUESTIONS, "dialogs": list(dialogs), "answers": ANSWERS},
        "split": split,
        "version": "1.0",
    }


@pytest.fixture
def val(tmp_path, write_images):
    write_images(*(f"VisualDialog_val2018/VisualDialog_val2018_{n:012d}.jpg" for n in (185565, 284024)))
    rounds = turn(0, 0, [0, 1, 2], 0), turn(1, 3, [4, 3], 1)
    return write(
        tmp_path / "visdial_1.0_val.json", visdial(dialog(185565, *rounds), dialog(284024, turn(2, 4, [1, 4], 1)))
    )


def test_validation(val, images):
    samples, rejects = read_all(val, images)
    assert not rejects
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
    samples, rejects = read_all(path, images)
    assert not rejects
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
