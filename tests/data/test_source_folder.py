import json

import pytest
from annotation_files import read_all

from openblip.data.sources import open_source
from openblip.errors import SourceError


@pytest.fixture
def put(tmp_path):
    def put(name, content=b"x"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    return put


def test_a_folder_of_videos(tmp_path, put):
    put("a.mp4", b"first")
    put("a.txt", b"a dog runs")
    put("b.WEBM", b"second")
    put("b.json", {"question": "what?", "answers": ["that"]})
    put("sub/c.avi", b"third")
    put("a.mkv", b"again")
    samples, rejects = read_all(tmp_path)
    # in the order of their paths: of two files with one key, a.mkv comes first
    assert [(s.key, s.image) for s in samples] == [("a", b"again"), ("b", b"second"), ("sub/c", b"third")]
    assert samples[0].captions == ("a dog runs",)
    assert samples[1].info["question"] == "what?"
    assert [(r.key, "a.mp4: duplicate key" in r.reason) for r in rejects] == [("a", True)]


def test_images_go_before_videos(tmp_path, put):
    put("a.mp4", b"video")
    put("a.jpg", b"image")
    put("b.mp4", b"video")
    put("b.mkv", b"video")
    samples, rejects = read_all(tmp_path)
    assert [(s.key, s.image) for s in samples] == [("a", b"image")]
    assert not rejects


def test_a_sub_folder_is_a_label(tmp_path, put):
    for name in ("top.jpg", "dog/1.jpg", "cat/1.png", "train/dog/2.jpg", "cat/said.jpg"):
        put(name)
    put("cat/said.json", {"label": "kitten"})
    samples, rejects = read_all(tmp_path)
    assert not rejects
    labels = {s.key: s.info.get("label") for s in samples}
    assert labels == {"cat/1": "cat", "cat/said": "kitten", "dog/1": "dog", "top": None, "train/dog/2": "dog"}
    assert "label" not in next(s for s in samples if s.key == "top").info
    assert not any("label_names" in s.info for s in samples)


def test_a_sub_folder_of_videos_is_a_label(tmp_path, put):
    put("jump/1.mp4")
    assert read_all(tmp_path)[0][0].info["label"] == "jump"


def test_classes_have_names(tmp_path, put):
    for name in ("n01/a.jpg", "n02/b.jpg", "n03/c.jpg", "top.jpg"):
        put(name)
    put("classes.json", {"n01": "tench", "n02": ["goldfish", "Carassius auratus"], "n03": ["shark"], "n04": 3})
    samples, rejects = read_all(tmp_path)
    assert not rejects
    assert [s.info.get("label") for s in samples] == ["tench", "goldfish", "shark", None]
    names = [s.info.get("label_names") for s in samples]
    assert names == [None, ["goldfish", "Carassius auratus"], None, None]


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ({"other": "x"}, "nothing for n01"),
        ({"n01": 3}, "n01: 3"),
        ({"n01": ["x", None]}, "n01: "),
        ({"n01": []}, "n01: "),
        ({"n01": " "}, "n01: "),
        ({"n01": {"name": "x"}}, "n01: "),
        (["tench"], "expected a json object"),
        (b"{broken", "broken json"),
        (b"\xff", "broken json"),
    ],
)
def test_classes_that_say_no_names(tmp_path, put, classes, said):
    put("n01/a.jpg")
    put("classes.json", classes)
    with pytest.raises(SourceError, match=r"classes\.json") as raised:
        open_source(str(tmp_path))
    assert said in str(raised.value)


def test_classes_that_are_something_else(tmp_path, put):
    """The texts of an image of that name, or a file beside images that have no classes."""
    put("classes.jpg")
    put("classes.json", {"caption": "a school"})
    put("n01/a.jpg")
    samples, _ = read_all(tmp_path)
    assert [(s.captions, s.info.get("label")) for s in samples] == [(("a school",), None), ((), "n01")]
    put("n01/classes.json", ["x"])
    assert len(read_all(tmp_path)[0]) == 2
    (tmp_path / "classes.jpg").unlink()
    (tmp_path / "n01" / "a.jpg").rename(tmp_path / "a.jpg")
    put("classes.json", ["x"])
    assert [s.key for s in read_all(tmp_path)[0]] == ["a"]


def test_classes_from_a_url(put, tmp_path):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe_file("/labelled/n01/a.jpg", b"x")
    memory.pipe_file("/labelled/classes.json", b'{"n01": "tench"}')
    assert read_all("memory://labelled")[0][0].info["label"] == "tench"


def test_neither_images_nor_videos(tmp_path, put):
    put("a.txt")
    with pytest.raises(SourceError, match=r"no image .* video .*mp4"):
        open_source(str(tmp_path))
