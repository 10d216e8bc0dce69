import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotation_files import read_all as read_source

from openblip.errors import SourceError


def read_all(table, path):
    pq.write_table(table, path)
    return read_source(path)


@pytest.mark.parametrize("style", ["bytes", "struct", "path"])
def test_clips(tmp_path, style):
    (tmp_path / "b.mp4").write_bytes(b"clip b")
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = {
        "bytes": pa.array([b"clip a", b"clip b"]),
        "struct": pa.array([{"bytes": b"clip a", "path": "x.mp4"}, {"bytes": b"clip b"}], struct),
        "path": pa.array([{"bytes": b"clip a"}, {"path": "b.mp4"}], struct),
    }[style]
    table = pa.table({"video": column, "question": ["what?", "who?"], "answers": [["that"], ["x", "y", "x"]]})
    samples, rejects = read_all(table, tmp_path / "t.parquet")
    assert not rejects
    assert [s.image for s in samples] == [b"clip a", b"clip b"]
    assert [s.captions for s in samples] == [(), ()]
    assert dict(samples[1].info) == {"question": "who?", "answers": ["x", "y", "x"]}


def test_pairs(tmp_path):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": [b"left", b"left", b"one"],
            "second_image": pa.array([{"bytes": b"right"}, {"bytes": None}, None], struct),
            "statement": ["Both.", "None.", "One."],
            "label": [True, False, None],
        }
    )
    samples, rejects = read_all(table, tmp_path / "t.parquet")
    assert [(s.image, s.second_image) for s in samples] == [(b"left", b"right"), (b"one", None)]
    assert dict(samples[0].info) == {"statement": "Both.", "label": True}
    assert dict(samples[1].info) == {"statement": "One."}  # a null label is no label
    assert [r.key for r in rejects] == ["000000001"]
    assert "second_image" in rejects[0].reason


@pytest.mark.parametrize("column", ["question", "statement", "label", "dialog"])
def test_a_column_of_a_task_stands_for_captions(tmp_path, column):
    value = [{"question": "what?", "answer": None}] if column == "dialog" else "text"
    samples, rejects = read_all(pa.table({"image": [b"x"], column: [value]}), tmp_path / "t.parquet")
    assert not rejects
    expected = [{"question": "what?"}] if column == "dialog" else "text"
    assert samples[0].info[column] == expected


def test_neither_captions_nor_a_task(tmp_path):
    with pytest.raises(SourceError, match=r"no caption column.*question.*found: video, url"):
        read_all(pa.table({"video": [b"x"], "url": ["y"]}), tmp_path / "t.parquet")


def test_a_broken_field_is_a_reject(tmp_path):
    table = pa.table({"video": [b"x"], "question": ["what?"], "answers": [[1]]})
    samples, rejects = read_all(table, tmp_path / "t.parquet")
    assert not samples
    assert rejects[0].reason.startswith("t/000000000: answers")


def test_a_picture_goes_before_a_clip_which_is_not_kept_in_the_info(tmp_path):
    struct = pa.array([{"bytes": b"clip", "path": "a.mp4"}])
    table = pa.table({"video": struct, "image": [b"picture"], "caption": ["x"], "thumbnail": [b"small"]})
    samples, _ = read_all(table, tmp_path / "t.parquet")
    assert samples[0].image == b"picture"
    assert dict(samples[0].info) == {"video": {"path": "a.mp4"}, "caption": "x"}
