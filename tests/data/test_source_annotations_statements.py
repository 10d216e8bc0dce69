"""NLVR2's files of lines, lists and tables of statements about two images, in miniature as distributed."""

import json

import pytest
from annotation_files import read_all

from openblip.data.sources import open_source


@pytest.fixture
def images(tmp_path):
    return tmp_path / "nlvr2"


def statement(identifier, sentence, label=None, **fields):
    row = {
        "validation": {"117": "False"},
        "sentence": sentence,
        "left_url": "https://example.org/left.jpg",
        "writer": "128",
        "identifier": identifier,
        "synset": "acorn",
        "query": "acorns six1",
        "right_url": "https://example.org/right.jpg",
        "extra_validations": {},
        **fields,
    }
    return row if label is None else row | {"label": label}


def write_lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def pair(folder, stem):
    return f"{folder}/{stem}-img0.png", f"{folder}/{stem}-img1.png"


@pytest.mark.parametrize("folder", ["images/train/53", "train/53", "53", "images/train", "train", "."])
def test_train(tmp_path, images, write_images, folder):
    write_images(*pair(folder, "train-10171-0"))
    path = write_lines(
        tmp_path / "train.json",
        statement("train-10171-0-0", "An image shows one leather pencil case.", "False", directory=53),
        statement("train-10171-0-1", "The left image shows a case.", "True", directory=53),
    )
    samples, rejects = read_all(path, images)
    assert not rejects
    assert [s.key for s in samples] == ["train-10171-0-0", "train-10171-0-1"]
    assert [s.info["label"] for s in samples] == [False, True]
    assert samples[0].info["statement"] == "An image shows one leather pencil case."
    assert samples[0].image == (images / folder / "train-10171-0-img0.png").read_bytes()
    assert samples[0].second_image == (images / folder / "train-10171-0-img1.png").read_bytes()
    assert samples[0].image != samples[0].second_image
    assert samples[0].image_id == samples[1].image_id
    assert open_source(str(path), images=str(images)).describe() == {"format": "NLVR2 statements"}


@pytest.mark.parametrize(("split", "file"), [("dev", "dev.json"), ("test1", "test1.json"), ("test2", "test2.jsonl")])
def test_other_splits_and_other_names(tmp_path, images, write_images, split, file):
    write_images(*pair(split, f"{split}-850-0"))
    path = write_lines(tmp_path / file, statement(f"{split}-850-0-0", "There is at least one dog.", "True"))
    samples, rejects = read_all(path, images)
    assert not rejects
    assert samples[0].info["label"] is True
    assert samples[0].second_image == (images / split / f"{split}-850-0-img1.png").read_bytes()


def test_without_labels(tmp_path, images, write_images):
    write_images(*pair("test1", "test1-0-1"))
    samples, _ = read_all(write_lines(tmp_path / "t.json", statement("test1-0-1-0", "A dog.")), images)
    assert "label" not in samples[0].info


def test_broken_lines_are_named(tmp_path, images, write_images):
    write_images(*pair("dev", "dev-1-0"), "dev/dev-2-0-img0.png")
    path = write_lines(
        tmp_path / "dev.json",
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
    path = tmp_path / "nlvr_dev.json"
    path.write_text(json.dumps(rows))
    samples, rejects = read_all(path, images)
    assert [(s.info["statement"], s.info["label"]) for s in samples] == [
        ("There is a dog.", True),
        ("There is none.", False),
    ]
    assert samples[0].second_image == (images / both[1]).read_bytes() != samples[0].image
    assert samples[0].image_id == samples[1].image_id
    assert {r.key for r in rejects} == {"[2]", "[3]", "[4]", "000000005"}
    described = open_source(str(path), images=str(images)).describe()
    assert described == {"format": "list of statements about two images"}


def test_tables(tmp_path, images, write_images):
    write_images("a.png", "b.png")
    lines = ["image,second_image,statement,label", "a.png,b.png,A dog.,true", "a.png,b.png,Two.,False"]
    lines += ["a.png,b.png,Unknown.,", "a.png,b.png,Odd.,maybe", "b.png,a.png,Swapped.,true", "a.png,,One.,true"]
    (images / "t.csv").write_text("\n".join(lines))
    samples, rejects = read_all(images / "t.csv", None)
    assert [s.info.get("label") for s in samples] == [True, False, None, True, True]
    assert "label" not in samples[2].info
    assert samples[0].second_image == (images / "b.png").read_bytes()
    assert samples[4].second_image is None
    assert samples[0].image_id == samples[1].image_id
    assert len({s.image_id for s in samples}) == 3
    assert "t.csv line 5: the label" in rejects[0].reason
    rows = [{"image": "a.png", "second_image": "b.png", "statement": "A dog.", "label": True}]
    rows += [{"image": "a.png", "second_image": 5, "statement": "A dog.", "label": True}]
    (images / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples, rejects = read_all(images / "t.jsonl", None)
    assert [s.info["label"] for s in samples] == [True]
    assert "t.jsonl line 2" in rejects[0].reason


def test_labels_of_classes_stay_texts(tmp_path, images, write_images):
    write_images("a.png")
    (images / "t.csv").write_text("image,label\na.png,tabby cat\na.png,true\n")
    samples, _ = read_all(images / "t.csv", None)
    assert [s.info["label"] for s in samples] == ["tabby cat", "true"]
