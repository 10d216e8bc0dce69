"""Parts of a source, `SOURCE[:95%]`."""

import json

import pytest
from annotation_files import read_all

from openblip.data.sources import open_source
from openblip.errors import SourceError
from source_items import items_of


def keys(spec):
    return [(s.shard, s.key) for s in read_all(spec)[0]]


@pytest.fixture
def rows(tmp_path, make_image):
    """A table with several rows of each image."""
    (tmp_path / "images").mkdir()
    for number in range(30):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(make_image(number))
    rows = [{"image": f"{n % 30}.jpg", "caption": f"text {n}"} for n in range(90)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "t.jsonl"


def test_parts_that_meet_are_the_whole_once(tmp_path, write_shards):
    folder = write_shards(tmp_path, [70, 50, 10])
    whole, first, rest = keys(folder), keys(f"{folder}[:60%]"), keys(f"{folder}[60%:]")
    assert sorted(first + rest) == whole
    assert 60 <= len(first) <= 96  # about 60 percent of 130
    assert keys(f"{folder}[0%:100%]") == whole
    assert keys(f"{folder}[:30%]") + keys(f"{folder}[30%:60%]") != []
    assert sorted(keys(f"{folder}[:30%]") + keys(f"{folder}[30%:60%]")) == first


def test_no_image_is_on_both_sides(rows, tmp_path):
    def names(part):
        source = open_source(f"{rows}{part}", images=str(tmp_path / "images"))
        return [sample.info["image"] for sample in items_of(source)]

    first, rest = names("[:50%]"), names("[50%:]")
    assert len(first) + len(rest) == 90
    assert not {*first} & {*rest}
    assert all(first.count(name) == 3 for name in first)


def test_a_copy_elsewhere_is_split_in_the_same_way(tmp_path, write_shards):
    one, other = (write_shards(tmp_path / "one", [50, 50]), write_shards(tmp_path / "other" / "folder", [50, 50]))
    assert keys(f"{one}[:40%]") == keys(f"{other}[:40%]")
    assert keys(f"{other}/*.tar[:40%]") == keys(f"{other}[:40%]")
    assert keys(f"{other}/0001.tar[:40%]") == [key for key in keys(f"{other}[:40%]") if key[0] == "0001"]


def test_other_images_are_not_read(tmp_path, write_shards):
    folder = write_shards(tmp_path, [20])
    part = open_source(f"{folder}[:50%]")
    wanted = {sample.key for sample in items_of(part, images=False)}
    corrupt = {f"{n:05d}": b"" for n in range(20) if f"{n:05d}" not in wanted}
    assert corrupt
    assert all(
        sample.image for sample in items_of(open_source(f"{write_shards(tmp_path, [20], corrupt=corrupt)}[:50%]"))
    )


@pytest.mark.parametrize("part", ["[60%:60%]", "[90%:10%]", "[:101%]", "[:0%]"])
def test_an_empty_part_is_refused(part, tmp_path, write_shards):
    with pytest.raises(SourceError, match="percentage"):
        open_source(f"{write_shards(tmp_path, [3])}{part}")


def test_a_part_without_a_sample_is_found_at_once(tmp_path, write_shards):
    folder = write_shards(tmp_path, [1])
    parts = [f"[{n}%:{n + 1}%]" for n in range(100)]

    def is_empty(part):
        try:
            open_source(f"{folder}{part}")
        except SourceError:
            return True
        return False

    assert sum(map(is_empty, parts)) == 99
    with pytest.raises(SourceError, match="no sample falls into this part"):
        open_source(f"{folder}{next(filter(is_empty, parts))}")
