from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotation_files import write

from openblip.capfilt.folder import CapFiltFolder
from openblip.capfilt.selection import decide_again
from openblip.data.captions import CAPTION_SCHEMA, CaptionRow, finished_shards, read_captions, write_captions
from openblip.data.decision import Decision
from openblip.data.sample import Reject, Sample, parse_json_object
from openblip.data.sources import open_mixture, open_source
from openblip.errors import SourceError
from source_items import items_of


def row(key, shard, source="web", index=0, itm=0.9, caption="text", logprob=None):
    scores = {"itm": itm, "itc": 0.25, "logprob": logprob}
    return CaptionRow(key=key, shard=shard, index=index, source=source, caption=caption, **scores)


@pytest.fixture
def run(tmp_path, write_shards):
    """A CapFilt run over shards 0000 (finished, samples 0 and 1) and 0001 (stopped before its report)."""
    web = write_shards(tmp_path / "web", [2, 1])
    out = tmp_path / "out"
    rows = [
        row("00000", "0000", itm=0.51, caption="true web text"),
        row("00000", "0000", "synthetic", itm=0.99, caption="a caption", logprob=-1.5),
        row("00000", "0000", "synthetic", 1, itm=0.5, caption="exactly at the threshold", logprob=-2.0),
        row("00001", "0000", itm=0.01, caption="shop now"),
        row("00001", "0000", "synthetic", itm=0.7, caption="another", logprob=-1.0),
        row("gone", "0000", itm=0.9),
    ]
    write_captions(out / "captions" / "0000.parquet", rows)
    write_captions(out / "captions" / "0001.parquet", [row("00002", "0001")])
    (out / "captions" / "0000.report.json").write_text("{}")
    set_threshold(out, web, 0.5)
    return out


def set_threshold(out, web, threshold):
    out.mkdir(exist_ok=True)
    write(out / "manifest.json", {"source": str(web), "images": None, "threshold": threshold})


def test_the_originals_columns_are_those_of_the_manifest(tmp_path, make_image):
    (tmp_path / "a.jpg").write_bytes(make_image(1))
    path = write(tmp_path / "t.csv", "photo,title\na.jpg,x\n")
    write_captions(tmp_path / "out" / "captions" / "t.parquet", [row("000000002", "t", caption="x")])
    write(tmp_path / "out" / "captions" / "t.report.json", "{}")
    columns = {"image_column": "photo", "caption_column": "title"}
    write(tmp_path / "out" / "manifest.json", {"source": str(path), **columns, "threshold": 0.5})
    (sample,) = items_of(open_source(f"capfilt:{tmp_path / 'out'}"))
    assert (sample.image, sample.captions) == ((tmp_path / "a.jpg").read_bytes(), ("x",))


def test_kept_texts_are_pairs_of_the_original_images(run, tmp_path):
    source = open_source(f"capfilt:{run}")
    assert list(source.shards()) == ["0000"]
    items = list(items_of(source))
    samples = [item for item in items if isinstance(item, Sample)]
    originals = {s.key: s for s in items_of(open_source(str(tmp_path / "web")))}
    assert [(s.key, s.captions) for s in samples] == [
        ("00000-web-0", ("true web text",)),
        ("00000-synthetic-0", ("a caption",)),
        ("00001-synthetic-0", ("another",)),
    ]
    assert samples[0].image == originals["00000"].image
    assert samples[2].image == originals["00001"].image
    assert samples[0].image_id == samples[1].image_id == originals["00000"].image_id
    assert samples[2].image_id == originals["00001"].image_id
    rejects = [item for item in items if isinstance(item, Reject)]
    assert [(r.shard, r.key) for r in rejects] == [("0000", "gone-web-0")]


def test_another_threshold_needs_no_other_file(run, tmp_path):
    set_threshold(run, tmp_path / "web", 0.0)
    assert open_source(f"capfilt:{run}").num_samples("0000") == 6
    set_threshold(run, tmp_path / "web", 0.98)
    assert [s.key for s in items_of(open_source(f"capfilt:{run}"))] == ["00000-synthetic-0"]


def test_weights_go_with_the_pairs_as_shares_of_the_largest(run):
    decision = Decision(threshold=None, weight="itm * 2 + (source = 'web')::int")
    manifest = parse_json_object((run / "manifest.json").read_bytes())
    write(run / "manifest.json", manifest | {"decision": asdict(decision)})
    decide_again(CapFiltFolder(run))
    samples = [item for item in items_of(open_source(f"capfilt:{run}[0%:]")) if isinstance(item, Sample)]
    found = {sample.key: sample.weight for sample in samples}
    largest = 2 * 0.9 + 1  # of the text that is gone
    expected = {"00000-web-0": 2.02, "00000-synthetic-0": 1.98, "00000-synthetic-1": 1.0, "00001-web-0": 1.02}
    expected["00001-synthetic-0"] = 1.4
    assert found == {key: pytest.approx(weight / largest) for key, weight in expected.items()}


def test_shards_that_are_row_groups_of_an_earlier_version(tmp_path, make_image):
    """Their outputs stay readable; where the whole file is done, it stands for its row groups."""
    table = pa.table({"image": [make_image(n) for n in range(5)], "caption": ["text"] * 5})
    pq.write_table(table, tmp_path / "web.parquet", row_group_size=2)
    out = tmp_path / "out"
    set_threshold(out, tmp_path / "web.parquet", 0.5)
    for group, keys in enumerate([(0, 1), (2, 3), (4,)]):
        shard = f"web-{group:05d}"
        write_captions(out / "captions" / f"{shard}.parquet", [row(f"{n:09d}", shard) for n in keys])
        (out / "captions" / f"{shard}.report.json").write_text("{}")
    (out / "captions" / "other.report.json").write_text("{}")
    source = open_source(f"capfilt:{out}")
    assert list(source.shards()) == ["web-00000", "web-00001", "web-00002"]
    samples = items_of(source)
    assert [s.key for s in samples] == [f"{n:09d}-web-0" for n in range(5)]
    assert [s.image for s in samples] == [make_image(n) for n in range(5)]
    assert [n for n, _ in source.read("web-00001", start=1)] == [1]
    write_captions(out / "captions" / "web.parquet", [row(f"{n:09d}", "web") for n in range(5)])
    (out / "captions" / "web.report.json").write_text("{}")
    assert list(source.shards()) == ["web"]
    assert [s.image for s in items_of(source)] == [make_image(n) for n in range(5)]


def test_it_mixes_with_other_sources(run, tmp_path):
    mixture = open_mixture(f"capfilt:{run}@0.5,{tmp_path / 'web'}@0.5")
    assert [type(source).__name__ for source in mixture.sources] == ["CapFiltSource", "TarSource"]


def test_what_is_no_finished_run(run, tmp_path):
    with pytest.raises(SourceError, match=r"no manifest\.json"):
        open_source(f"capfilt:{tmp_path}")
    (run / "captions" / "0000.report.json").unlink()
    with pytest.raises(SourceError, match="no shard is finished"):
        open_source(f"capfilt:{run}").shards()
    (run / "manifest.json").write_text("{}")
    with pytest.raises(SourceError, match="lacks source, threshold"):
        open_source(f"capfilt:{run}")


def test_caption_files_round_trip(tmp_path):
    rows = [row("ü", "s", logprob=None), row("k", "s", "synthetic", 3, logprob=-0.5)]
    write_captions(tmp_path / "captions" / "s.parquet", rows)
    table = read_captions(tmp_path, "s")
    assert table.schema == CAPTION_SCHEMA
    assert [CaptionRow(**values) for values in table.to_pylist()] == [
        row("ü", "s", itm=float(np.float32(0.9))),
        row("k", "s", "synthetic", 3, itm=float(np.float32(0.9)), logprob=-0.5),
    ]
    assert [path.name for path in (tmp_path / "captions").iterdir()] == ["s.parquet"]
    write_captions(tmp_path / "captions" / "s.parquet", [])
    assert read_captions(tmp_path, "s").num_rows == 0


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "captions" / "s.parquet"
    write_captions(path, [row("a", "s")])
    with pytest.raises(Exception, match=r"Could not convert|must be real number"):
        write_captions(path, [row("b", "s", itm="no number")])
    assert read_captions(tmp_path, "s")["key"].to_pylist() == ["a"]
    assert [p.name for p in path.parent.iterdir()] == ["s.parquet"]


def test_damaged_caption_files_are_named(tmp_path):
    (tmp_path / "captions").mkdir()
    for name, content in (("none", None), ("bad", b"PAR1")):
        if content:
            (tmp_path / "captions" / f"{name}.parquet").write_bytes(content)
        with pytest.raises(SourceError, match=rf"{name}\.parquet"):
            read_captions(tmp_path, name)
    pq.write_table(CAPTION_SCHEMA.empty_table().drop_columns(["itm"]), tmp_path / "captions" / "old.parquet")
    with pytest.raises(SourceError, match=r"old\.parquet"):
        read_captions(tmp_path, "old")
    assert finished_shards(tmp_path) == []
