import json
import os
from collections import Counter

import pytest
from annotation_files import read_all, read_samples, write

from openblip.data.sources import open_source
from openblip.errors import SourceError


@pytest.fixture
def put(tmp_path, make_image):
    """Makes a folder of files: images, and texts that say their own name."""

    def put(*names):
        for number, name in enumerate(names):
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            is_text = path.suffix in (".txt", ".caption", ".csv")
            path.write_bytes(name.encode() if is_text else make_image(number))
        return tmp_path / "in"

    return put


def captions_by_key(spec):
    return {sample.key: sample.captions for sample in read_samples(spec)}


IMAGE_ENDINGS = ("jpg", "jpeg", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2", "ico", "tga", "JPG")


def test_every_image_format_is_read_and_what_is_not_used_is_counted(put):
    names = [f"{number}.{ending}" for number, ending in enumerate(IMAGE_ENDINGS)]
    others = ["a.heic", "b.heic", "c.svg", "d.txt", "e.mp4", "LICENSE", ".DS_Store", "._1.jpg", ".cache/x.jpg"]
    source = open_source(str(put(*names, *others, "__MACOSX/0.jpg")))
    assert len(read_samples(source.name)) == source.num_samples("in") == len(names)
    expected = {".heic": 2, ".svg": 1, ".txt": 1, ".mp4": 1, "without an ending": 1, "hidden": 4}
    assert source.count_unused() == Counter(expected)


def test_a_folder_without_images_says_what_there_is(put):
    with pytest.raises(SourceError, match=r"no image .*; not used: 1 \.heic \(\.heic cannot be read: convert"):
        open_source(str(put("a.heic")))


def test_images_that_differ_in_their_endings_are_two(put):
    folder = put("a.jpg", "a.png", "a.jpg.png", "b.jpg", "a.txt", "b.jpg.txt", "c.jpg", "c.caption", "x/a.jpg")
    keys = {"a.jpg": ("a.txt",), "a.png": ("a.txt",), "a.jpg.png": (), "b": ("b.jpg.txt",), "c": ("c.caption",)}
    assert captions_by_key(folder) == {**keys, "x/a": ()}


def test_links_are_followed_once_and_loops_end(put, tmp_path):
    folder = put("z/a.jpg", "z/b.jpg")
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (folder / "z" / "b.jpg").rename(tmp_path / "far" / "deep" / "b.jpg")
    for link, target in (("0", "z"), ("far", "../far"), ("again", "../far/deep"), ("z/up", ".."), ("above", "../..")):
        os.symlink(target, folder / link)
    os.symlink("nowhere.jpg", folder / "broken.jpg")
    os.symlink(folder, tmp_path / "linked")
    for spec in (folder, tmp_path / "linked"):
        samples, rejects = read_all(spec)
        assert [sample.key for sample in samples] == ["again/b", "z/a"]
        assert [(r.key, "broken.jpg" in r.reason) for r in rejects] == [("broken", True)]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("folder", ["", "train/"])
def test_rows_of_a_metadata_file(put, kind, folder):
    root = put(*(f"{folder}{name}" for name in ("a.jpg", "b.jpg", "sub/c.jpg", "d.jpg", "d.txt")), "other/e.jpg")
    rows = [("a.jpg", "one", "7"), ("a.jpg", "two", "8"), ("sub/c.jpg", "three, four", "9"), ("gone.jpg", "x", "0")]
    fields = ("file_name", "text", "stars")
    if kind == "csv":
        lines = [",".join(f'"{value}"' for value in row) for row in (fields, *rows)]
    else:
        lines = [json.dumps(dict(zip(fields, row, strict=True))) for row in rows] + ["{broken"]
    write(root / folder / f"metadata.{kind}", "\n".join(lines))
    samples, rejects = read_all(root)
    by_key = {sample.key: sample for sample in samples}
    captions = {f"{folder}a": ("one", "two"), f"{folder}b": (), f"{folder}sub/c": ("three, four",)}
    captions |= {f"{folder}d": (f"{folder}d.txt",), "other/e": ()}
    assert {key: sample.captions for key, sample in by_key.items()} == captions
    assert (by_key[f"{folder}a"].info["stars"], by_key["other/e"].info["label"]) == ("7", "other")
    assert "label" not in by_key[f"{folder}sub/c"].info
    reasons = " ".join(reject.reason for reject in rejects)
    assert "gone.jpg" in reasons
    assert len(rejects) == (1 if kind == "csv" else 2)
    assert f"{folder}metadata.jsonl line 5: broken json" in reasons or kind == "csv"


def test_a_metadata_file_that_is_about_something_else(put):
    root = put("a.jpg", "b.jpg")
    write(root / "metadata.csv", "id,score\n1,2\n")
    assert len(read_samples(root)) == 2
    assert open_source(str(root)).count_unused() == {".csv": 1}


def test_images_that_img2dataset_wrote_as_files(put):
    root = put("00000/0.jpg", "00000/0.txt", "00001/1.jpg", "00000.parquet", "00001.parquet", "00000_stats.json")
    assert captions_by_key(root) == {"00000/0": ("00000/0.txt",), "00001/1": ()}
    assert open_source(str(root)).count_unused() == {".parquet": 2, ".json": 1}


def test_data_beside_shards_is_counted(put, write_shards, tmp_path):
    write_shards(tmp_path / "in", [1, 1])
    root = put("a.jpg", "0002.tar.gz", "._0000.tar", "0000.parquet", "0000_stats.json", "README.md")
    source = open_source(str(root))
    assert list(source.shards()) == ["0000", "0001"]
    assert source.count_unused() == {".jpg": 1, ".gz": 1}
