import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotation_files import read_all as read_source

from openblip.errors import SourceError


def read_all(table, path):
    pq.write_table(table, path)
    return read_source(path)


@pytest.mark.parametrize("style", ["bytes", "struct", "path"])
def test_videos(tmp_path, style):
    (tmp_path / "b.mp4").write_bytes(b"video b")
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = {
        "bytes": pa.array([b"video a", b"video b"]),
        "struct": pa.array([{"bytes": b"video a", "path": "x.mp4"}, {"bytes": b"video b"}], struct),
        "path": pa.array([{"bytes": b"video a"}, {"path": "b.mp4"}], struct),
    }[style]
    table = pa.table({"video": column, "question": ["what?", "who?"], "answers": [["that"], ["x", "y", "x"]]})
    samples, rejects = read_all(table, tmp_path / "t.parquet")
    assert not rejects
    assert [s.image for s in samples] == [b"video a", b"video b"]
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


def test_an_image_goes_before_a_video_which_is_not_kept_in_the_info(tmp_path):
    struct = pa.array([{"bytes": b"video", "path": "a.mp4"}])
    table = pa.table({"video": struct, "image": [b"image"], "caption": ["x"], "thumbnail": [b"small"]})
    samples, _ = read_all(table, tmp_path / "t.parquet")
    assert samples[0].image == b"image"
    assert dict(samples[0].info) == {"video": {"path": "a.mp4"}, "caption": "x"}


def damaged(path, *columns):
    """Overwrite the pages of some columns of the second of three row groups of two rows."""
    table = pa.table({"image": [bytes([n]) * 5000 for n in range(6)], "caption": [f"text {n}" for n in range(6)]})
    pq.write_table(table, path, row_group_size=2, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    for group in range(3) if columns == ("all",) else [1]:
        chunks = pq.ParquetFile(path).metadata.row_group(group)
        for chunk in (chunks.column(c) for c in range(2)):
            if columns == ("all",) or chunk.path_in_schema in columns:
                start = chunk.data_page_offset
                content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)


@pytest.mark.parametrize("column", ["image", "caption"])
def test_a_damaged_row_group_is_a_reject(tmp_path, column):
    damaged(tmp_path / "t.parquet", column)
    samples, rejects = read_source(tmp_path / "t.parquet")
    assert [s.captions for s in samples] == [(f"text {n}",) for n in (0, 1, 4, 5)]
    assert [r.key for r in rejects] == [""]
    assert "row 2 and the rest of its row group cannot be read" in rejects[0].reason


def test_a_file_of_which_nothing_can_be_read(tmp_path):
    damaged(tmp_path / "t.parquet", "all")
    with pytest.raises(SourceError, match="nothing can be read"):
        read_source(tmp_path / "t.parquet")


def test_a_text_that_is_not_utf8_is_a_reject(tmp_path):
    offsets, content = pa.py_buffer(b"\0\0\0\0\4\0\0\0\6\0\0\0"), pa.py_buffer(b"fine\xff\xfe")
    captions = pa.StringArray.from_buffers(2, offsets, content)
    samples, rejects = read_all(pa.table({"image": [b"x", b"y"], "caption": captions}), tmp_path / "t.parquet")
    assert [s.captions for s in samples] == [("fine",)]
    assert [r.key for r in rejects] == ["000000001"]
