"""Caption files joined with the scores that were computed after them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openblip.data.captions import (
    CAPTION_SCHEMA,
    CaptionRow,
    finished_scores,
    read_texts,
    score_file,
    write_captions,
    write_score,
)
from openblip.errors import SourceError

VALUES = pa.array([0.5, None, 0.25], pa.float32())


def row(key, source, index):
    return CaptionRow(key=key, shard="s.1", index=index, source=source, caption=f"{key} {source}", itm=0.5, itc=0.1)


@pytest.fixture
def run(tmp_path):
    rows = [row("b", "web", 0), row("b", "synthetic", 0), row("a", "web", 0)]
    write_captions(tmp_path / "captions" / "s.1.parquet", rows)
    return tmp_path


def add_score(run, name, values=VALUES):
    write_score(run, "s.1", name, values)
    score_file(run, name, "s.1", "report.json").write_text("{}")


def test_finished_scores_are_columns_in_the_order_of_the_rows(run):
    add_score(run, "clip")
    add_score(run, "about", pa.array(["x", "y", "z"]))
    write_score(run, "s.1", "unfinished", VALUES)
    assert finished_scores(run, "s.1") == ["about", "clip"]
    assert finished_scores(run, "s") == []
    table = read_texts(run, "s.1")
    assert table.column_names == [*CAPTION_SCHEMA.names, "about", "clip"]
    assert table["key"].to_pylist() == ["b", "b", "a"]
    assert table["clip"].to_pylist() == [0.5, None, 0.25]
    assert table["about"].to_pylist() == ["x", "y", "z"]
    assert table.select(CAPTION_SCHEMA.names).schema.types == CAPTION_SCHEMA.types


def test_only_the_wanted_columns_are_read_in_their_order(run):
    add_score(run, "clip")
    table = read_texts(run, "s.1", ["clip", "itm"])
    assert table.column_names == ["clip", "itm"]
    assert table["clip"].to_pylist() == [0.5, None, 0.25]
    assert read_texts(run, "s.1", ["caption"]).column_names == ["caption"]


def test_score_files_have_keys_and_one_value(run):
    add_score(run, "clip")
    table = pq.read_table(run / "scores" / "clip" / "s.1.parquet")
    assert table.column_names == ["key", "source", "index", "clip"]
    assert table["source"].to_pylist() == ["web", "synthetic", "web"]


def test_an_unknown_or_unfinished_column_is_named_with_those_that_are_there(run):
    add_score(run, "clip")
    write_score(run, "s.1", "unfinished", VALUES)
    with pytest.raises(SourceError, match=r"no column nothing, unfinished; there are key, .*logprob, clip\."):
        read_texts(run, "s.1", ["nothing", "unfinished", "itm"])


def test_scores_of_other_texts_and_damaged_files_are_refused(run):
    add_score(run, "clip")
    path = run / "scores" / "clip" / "s.1.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take([1, 0, 2]), path)
    with pytest.raises(SourceError, match=r"clip/s\.1\.parquet: is about other texts"):
        read_texts(run, "s.1")
    assert read_texts(run, "s.1", ["itm"]).num_rows == 3
    path.write_bytes(b"damaged")
    with pytest.raises(SourceError, match=r"clip/s\.1\.parquet: not a score file"):
        read_texts(run, "s.1")
