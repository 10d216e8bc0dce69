import csv
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotation_files import read_all, read_samples, write, write_lines

from openblip.data.sources import open_mixture, open_source
from openblip.data.sources.opening import split_spec
from openblip.errors import SourceError
from source_items import items_of

IMAGE_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def images(tmp_path, make_image):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.jpg").write_bytes(make_image(ord(name)))
    return folder


def check_pair(sample, images, name, *captions):
    assert sample.image == (images / f"{name}.jpg").read_bytes()
    assert sample.captions == captions


def test_jsonl(tmp_path, images):
    rows = [
        {"image": "images/a.jpg", "caption": "one", "extra": 1},
        {"file_name": str(images / "b.jpg"), "captions": ["two", " ", "three"]},
        {"image": "images/c.jpg"},
    ]
    samples = read_samples(write(tmp_path / "t.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, rows))))
    check_pair(samples[0], images, "a", "one")
    check_pair(samples[1], images, "b", "two", "three")
    check_pair(samples[2], images, "c")
    assert samples[0].info["extra"] == 1
    assert [s.key for s in samples] == ["000000001", "000000003", "000000005"]


def test_jsonl_broken_lines_are_named(tmp_path, images):
    lines = ['{"image": "images/a.jpg", "caption": "one"}', "{broken", '"text"', '{"caption": "no image"}']
    lines += ['{"image": "gone.jpg", "caption": "x"}', '{"image": 5}', '{"image": "images/b.jpg", "caption": "two"}']
    samples, rejects = read_all(write_lines(tmp_path / "t.jsonl", lines))
    assert [s.captions for s in samples] == [("one",), ("two",)]
    reasons = {reject.key: reject.reason for reject in rejects}
    assert sorted(int(key) for key in reasons) == [2, 3, 4, 5, 6]
    for line in (2, 3, 4, 6):
        assert f"t.jsonl line {line}" in reasons[f"{line:09d}"]
    assert "gone.jpg" in reasons["000000005"]


def test_csv_with_bom_quotes_and_line_breaks(tmp_path, images):
    with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8-sig") as file:
        rows = [("image", "caption"), ("images/a.jpg", 'a "big", red\ndog'), ("images/b.jpg", "a cat"), ("x",)]
        csv.writer(file).writerows(rows)
    samples, rejects = read_all(tmp_path / "t.csv")
    check_pair(samples[0], images, "a", 'a "big", red\ndog')
    check_pair(samples[1], images, "b", "a cat")
    assert [r.key for r in rejects] == ["000000005"]
    assert "line 5: 1 values for 2 columns" in rejects[0].reason


def test_csv_quote_never_closed_costs_one_line(tmp_path, images):
    lines = ["image,caption", 'images/a.jpg,"never closed', "images/b.jpg,fine", 'images/c.jpg,5" pipe']
    samples, rejects = read_all(write_lines(tmp_path / "t.csv", lines))
    check_pair(samples[0], images, "b", "fine")
    check_pair(samples[1], images, "c", '5" pipe')
    assert [r.key for r in rejects] == ["000000002"]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_csv_with_other_delimiters(tmp_path, images, delimiter):
    text = delimiter.join(["image", "caption"]) + "\n" + delimiter.join(["images/a.jpg", "a, b"]) + "\n"
    (tmp_path / "t.tsv").write_text(text)
    check_pair(read_all(tmp_path / "t.tsv")[0][0], images, "a", "a, b")


def test_rows_of_one_image_share_its_id(tmp_path, images):
    rows = [("images/a.jpg", "x"), ("images/a.jpg", "y"), ("images/b.jpg", "z")]
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{i},{c}\n" for i, c in rows))
    samples, _ = read_all(tmp_path / "t.csv")
    assert samples[0].image_id == samples[1].image_id != samples[2].image_id


def test_a_table_with_the_images_elsewhere(tmp_path, images):
    (tmp_path / "t.jsonl").write_text('{"image": "a.jpg", "caption": "one"}')
    check_pair(read_all(tmp_path / "t.jsonl", images=images)[0][0], images, "a", "one")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_long_tables_are_cut_into_shards(tmp_path, images, monkeypatch, suffix):
    monkeypatch.setattr("openblip.data.sources.rows.ROWS_PER_SHARD", 4)
    if suffix == "csv":
        lines = ["image,caption"] + [f'images/a.jpg,"text\n{i}"' for i in range(10)]
    else:
        lines = [json.dumps({"image": "images/a.jpg", "caption": f"text\n{i}"}) for i in range(10)]
    source = open_source(str(write_lines(tmp_path / f"t.{suffix}", lines)))
    assert list(source.shards()) == ["t-00000", "t-00001", "t-00002"]
    assert [source.num_samples(shard) for shard in source.shards()] == [4, 4, 2]
    assert [s.captions[0] for s in items_of(source)] == [f"text\n{i}" for i in range(10)]
    assert len({s.key for s in items_of(source)}) == 10


def test_coco(tmp_path, images):
    names = [(4, "b.jpg"), (2, "a.jpg"), (9, "none.jpg"), (2, "c.jpg")]
    rows = [*({"id": number, "file_name": name} for number, name in names), {"id": 11}]
    captions = [{"image_id": n, "caption": text} for n, text in ((2, "first"), (4, "other"), (2, "second"))]
    path = write(tmp_path / "captions.json", {"images": rows, "annotations": captions})
    samples, rejects = read_all(path, images=images)
    check_pair(samples[0], images, "b", "other")
    check_pair(samples[1], images, "a", "first", "second")
    assert [s.key for s in samples] == ["4", "2"]
    assert {r.key for r in rejects} == {"9", "2", "images[4]"}
    with pytest.raises(SourceError, match="--images"):
        open_source(str(path))


def test_folder(tmp_path, images, make_image):
    (images / "a.txt").write_text("a dog\n")
    (images / "b.json").write_text('{"caption": "a cat", "image_id": 3}')
    (images / "sub").mkdir()
    (images / "sub" / "ü.PNG").write_bytes(make_image(3))
    (images / "dir.jpg").mkdir()
    (images / "a.jpeg").write_bytes(make_image(9))
    (images / "notes.md").write_text("x")
    (images / "orphan.txt").write_text("no image")
    samples = read_samples(images)
    assert [s.key for s in samples] == ["a.jpeg", "a.jpg", "b", "c", "sub/ü"]
    assert [s.captions for s in samples] == [("a dog",), ("a dog",), ("a cat",), (), ()]
    assert len({s.image_id for s in samples}) == 5


def test_folder_in_several_shards(images, monkeypatch):
    monkeypatch.setattr("openblip.data.sources.rows.ROWS_PER_SHARD", 2)
    source = open_source(str(images))
    assert list(source.shards()) == ["images-00000", "images-00001"]
    assert [s.key for s in items_of(source)] == ["a", "b", "c"]


def test_folder_from_a_url_and_from_within(tmp_path, images, monkeypatch):
    (images / "sub").mkdir()
    (images / "a.jpg").rename(images / "sub" / "a.jpg")
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.put(str(images), "/album", recursive=True)
    monkeypatch.chdir(images)
    for spec in ("memory://album", "memory://album/", "."):
        source = open_source(spec)
        samples = list(items_of(source))
        assert [s.key for s in samples] == ["b", "c", "sub/a"]
        assert [s.image for s in samples] == [s.image for s in items_of(open_source(str(images)))]
        assert list(source.shards()) == ["images" if spec == "." else "album"]


def test_tables_from_a_url(tmp_path, images):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.put(str(images), "/tables/images", recursive=True)
    memory.pipe_file("/tables/t.csv", b"image,caption\nimages/a.jpg,one\n")
    pq.write_table(pa.table({"jpg": [b"x"], "txt": ["two"]}), tmp_path / "t.parquet")
    memory.pipe_file("/tables/t.parquet", (tmp_path / "t.parquet").read_bytes())
    check_pair(read_all("memory://tables/t.csv")[0][0], images, "a", "one")
    assert read_all("memory://tables/t.parquet")[0][0].captions == ("two",)


@pytest.mark.parametrize("style", ["bytes", "struct", "path"])
def test_parquet(tmp_path, images, style):
    payloads = [(images / f"{name}.jpg").read_bytes() for name in "abc"]
    column = {
        "bytes": payloads,
        "struct": [{"bytes": payload, "path": None} for payload in payloads],
        "path": [{"bytes": None, "path": f"images/{name}.jpg"} for name in "abc"],
    }[style]
    if style == "path":
        column = pa.array(column, IMAGE_STRUCT)
    table = pa.table({"jpg": column, "text": ["one", "two", None], "url": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    source = open_source(str(tmp_path / "t.parquet"))
    assert list(source.shards()) == ["t"]
    assert source.num_samples("t") == 3
    samples = read_samples(tmp_path / "t.parquet")
    for sample, name, captions in zip(samples, "abc", (("one",), ("two",), ()), strict=True):
        check_pair(sample, images, name, *captions)
    assert [s.info["url"] for s in samples] == ["x", "y", "z"]
    assert len({s.key for s in samples}) == 3


def test_parquet_keys_lists_and_holes(tmp_path, images):
    payload = (images / "a.jpg").read_bytes()
    columns = {"image": [payload, payload, None], "captions": [["one", "two"], [], ["x"]], "key": ["k", "k", "n"]}
    samples, rejects = read_table(tmp_path, columns)
    assert [(s.key, s.captions) for s in samples] == [("k", ("one", "two")), ("k-2", ())]
    assert samples[0].image_id == samples[1].image_id
    assert [r.key for r in rejects] == ["n"]


def test_parquet_errors(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(SourceError, match=r"bad\.parquet"):
        open_source(str(tmp_path / "bad.parquet"))
    with pytest.raises(SourceError, match="found: url, caption"):
        read_table(tmp_path, {"url": ["x"], "caption": ["y"]})


def test_mixture_weights(tmp_path, write_shards):
    a, b = str(write_shards(tmp_path / "a", [3])), str(write_shards(tmp_path / "b", [1]))
    assert open_mixture(a).weights is None
    assert open_mixture(f"{a},{b}").weights is None
    weighted = open_mixture(f"{a}@1, {b}@3")
    assert weighted.weights == (0.25, 0.75)
    assert [source.name for source in weighted.sources] == [a, b]
    braces = open_mixture(f"{a}/{{0000,0000}}.tar,{b}")
    assert len(braces.sources) == 2
    for spec in (f"{a}@1,{b}", f"{a}@0,{b}@1", f"{a}@-1,{b}@1", f"{a},", f"{a},{a}", f"{a}@nan,{b}@1"):
        with pytest.raises(SourceError):
            open_mixture(spec)
    for spec in (f"{a}@1,{b}@2", f"{a}@0.5"):
        with pytest.raises(SourceError, match="leave out the weights"):
            open_source(spec)


def test_every_source_of_a_mixture_is_split(tmp_path, write_shards):
    a, b = write_shards(tmp_path / "a", [40]), write_shards(tmp_path / "b", [40])
    assert split_spec(f"{a}@1,{b}@3", 60) == (f"{a}[:60%]@1.0,{b}[:60%]@3.0", f"{a}[60%:],{b}[60%:]")
    first, rest = ({item.image_id for item in items_of(open_source(part))} for part in split_spec(f"{a},{b}", 60))
    assert not first & rest
    assert len(first | rest) == 80


def test_sources_are_read_one_after_the_other(tmp_path, write_shards):
    a, b = write_shards(tmp_path / "a", [3, 2]), write_shards(tmp_path / "b", [3])
    (b / "0000.tar").write_bytes((b / "0000.tar").read_bytes()[:-2000])  # ends early
    source = open_source(f"{a},{b}[:99%]")
    assert source.shards() == ["1-0000", "1-0001", "2-0000"]
    assert all(map(source.has_shard, source.shards()))
    assert not any(map(source.has_shard, ["0000", "3-0000", "2-0001"]))
    apart = [item for name in (f"{a}", f"{b}[:99%]") for item in items_of(open_source(name))]
    together = items_of(source)
    assert [replace(item, shard=item.shard[2:]) for item in together] == apart
    assert [item.shard for item in together][-2:] == ["2-0000"] * 2
    seen = []
    assert items_of(source, skip=seen.append) == together
    assert {sample.shard for sample in seen} == set(source.shards())
    assert all(sample.image_id.startswith(f"{source.image_id_prefix(sample.shard)}/") for sample in seen)
    assert [source.file_name(shard) for shard in source.shards()] == ["0000.tar", "0001.tar", "0000.tar"]


def test_names_with_at_signs_and_commas(tmp_path, write_shards):
    folder = write_shards(tmp_path / "me@0.5, really", [2])
    assert open_mixture(str(folder)).weights is None
    assert len(list(items_of(open_source(str(folder))))) == 2


def test_lone_surrogates_do_not_reach_captions(tmp_path, images):
    (tmp_path / "t.jsonl").write_text('{"image": "images/a.jpg", "caption": "dog \\ud83d"}')
    caption = read_all(tmp_path / "t.jsonl")[0][0].captions[0]
    assert caption.encode("utf-8").startswith(b"dog ")


def test_names_that_are_no_text(tmp_path, images):
    """Lone surrogates: from json escapes, or from file names that are not UTF-8."""
    rows = [{"image": "images/a.jpg", "key": "k\ud800", "caption": "x"}, {"image": "\ud800.jpg", "caption": "y"}]
    samples, rejects = read_all(write_lines(tmp_path / "t.jsonl", rows))
    assert [s.key for s in samples] == ["k\\ud800"]
    assert [r.key for r in rejects] == ["000000002"]
    (images / "a.jpg").rename(images / "\udcff.jpg")
    assert [s.key for s in read_samples(images)] == ["b", "c", "\\udcff"]


@pytest.fixture
def put(tmp_path):
    """Writes files, as bytes or json."""

    def put(*names, **contents):
        for name, content in [*((name, b"x") for name in names), *contents.items()]:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    return put


def test_a_folder_of_videos(tmp_path, put):
    put(**{"a.mp4": b"first", "a.txt": b"a dog runs", "b.WEBM": b"second", "sub/c.avi": b"third", "a.mkv": b"again"})
    put(**{"b.json": {"question": "what?", "answers": ["that"]}})
    samples = read_samples(tmp_path)
    assert [(s.key, s.image) for s in samples[:2]] == [("a.mkv", b"again"), ("a.mp4", b"first")]
    assert [(s.key, s.image) for s in samples[2:]] == [("b", b"second"), ("sub/c", b"third")]
    assert samples[0].captions == samples[1].captions == ("a dog runs",)
    assert samples[2].info["question"] == "what?"
    assert samples[3].info["label"] == "sub"


def test_images_go_before_videos(tmp_path, put):
    put("a.mp4", "b.mp4", "b.mkv", **{"a.jpg": b"image"})
    assert [(s.key, s.image) for s in read_samples(tmp_path)] == [("a", b"image")]


def test_a_sub_folder_is_a_label(tmp_path, put):
    put(
        "top.jpg", "dog/1.jpg", "cat/1.png", "train/dog/2.jpg", "cat/said.jpg", **{"cat/said.json": {"label": "kitten"}}
    )
    samples = read_samples(tmp_path)
    labels = {s.key: s.info.get("label") for s in samples}
    assert labels == {"cat/1": "cat", "cat/said": "kitten", "dog/1": "dog", "top": None, "train/dog/2": "dog"}
    assert "label" not in next(s for s in samples if s.key == "top").info
    assert not any("label_names" in s.info for s in samples)


def test_classes_have_names(tmp_path, put):
    classes = {"n01": "tench", "n02": ["goldfish", "Carassius auratus"], "n03": ["shark"], "n04": 3}
    put("n01/a.jpg", "n02/b.jpg", "n03/c.jpg", "top.jpg", **{"classes.json": classes})
    samples = read_samples(tmp_path)
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
    put("n01/a.jpg", **{"classes.json": classes})
    with pytest.raises(SourceError, match=r"classes\.json") as raised:
        open_source(str(tmp_path))
    assert said in str(raised.value)


def test_classes_that_are_something_else(tmp_path, put):
    """The texts of an image of that name, or a file beside images that have no classes."""
    put("classes.jpg", "n01/a.jpg", **{"classes.json": {"caption": "a school"}})
    samples, _ = read_all(tmp_path)
    assert [(s.captions, s.info.get("label")) for s in samples] == [(("a school",), None), ((), "n01")]
    put(**{"n01/classes.json": ["x"]})
    assert len(read_all(tmp_path)[0]) == 2
    (tmp_path / "classes.jpg").unlink()
    (tmp_path / "n01" / "a.jpg").rename(tmp_path / "a.jpg")
    put(**{"classes.json": ["x"]})
    assert [s.key for s in read_all(tmp_path)[0]] == ["a"]


def test_classes_from_a_url(put, tmp_path):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe_file("/labelled/n01/a.jpg", b"x")
    memory.pipe_file("/labelled/classes.json", b'{"n01": "tench"}')
    assert read_all("memory://labelled")[0][0].info["label"] == "tench"


def test_neither_images_nor_videos(tmp_path, put):
    for names in ((), ("a.txt",)):
        put(*names)
        with pytest.raises(SourceError, match=r"no image .* video .*mp4"):
            open_source(str(tmp_path))


def read_table(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    return read_all(tmp_path / "t.parquet")


@pytest.mark.parametrize("style", ["bytes", "struct", "path"])
def test_parquet_of_videos(tmp_path, style):
    (tmp_path / "b.mp4").write_bytes(b"video b")
    column = {
        "bytes": pa.array([b"video a", b"video b"]),
        "struct": pa.array([{"bytes": b"video a", "path": "x.mp4"}, {"bytes": b"video b"}], IMAGE_STRUCT),
        "path": pa.array([{"bytes": b"video a"}, {"path": "b.mp4"}], IMAGE_STRUCT),
    }[style]
    columns = {"video": column, "question": ["what?", "who?"], "answers": [["that"], ["x", "y", "x"]]}
    samples, rejects = read_table(tmp_path, columns)
    assert not rejects
    assert [s.image for s in samples] == [b"video a", b"video b"]
    assert [s.captions for s in samples] == [(), ()]
    assert dict(samples[1].info) == {"question": "who?", "answers": ["x", "y", "x"]}


def test_parquet_of_pairs(tmp_path):
    right = pa.array([{"bytes": b"right"}, {"bytes": None}, None], IMAGE_STRUCT)
    columns = {"image": [b"left", b"left", b"one"], "second_image": right, "statement": ["Both.", "None.", "One."]}
    samples, rejects = read_table(tmp_path, {**columns, "label": [True, False, None]})
    assert [(s.image, s.second_image) for s in samples] == [(b"left", b"right"), (b"one", None)]
    assert dict(samples[0].info) == {"statement": "Both.", "label": True}
    assert dict(samples[1].info) == {"statement": "One."}  # a null label is no label
    assert [r.key for r in rejects] == ["000000001"]
    assert "second_image" in rejects[0].reason


@pytest.mark.parametrize("column", ["question", "statement", "label", "dialog"])
def test_a_column_of_a_task_stands_for_captions(tmp_path, column):
    value = [{"question": "what?", "answer": None}] if column == "dialog" else "text"
    samples, rejects = read_table(tmp_path, {"image": [b"x"], column: [value]})
    assert not rejects
    expected = [{"question": "what?"}] if column == "dialog" else "text"
    assert samples[0].info[column] == expected


def test_a_broken_field_is_a_reject(tmp_path):
    samples, rejects = read_table(tmp_path, {"video": [b"x"], "question": ["what?"], "answers": [[1]]})
    assert not samples
    assert rejects[0].reason.startswith("t/000000000: answers")


def test_an_image_goes_before_a_video_which_is_not_kept_in_the_info(tmp_path):
    struct = pa.array([{"bytes": b"video", "path": "a.mp4"}])
    columns = {"video": struct, "image": [b"image"], "caption": ["x"], "thumbnail": [b"small"]}
    samples, _ = read_table(tmp_path, columns)
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
    samples, rejects = read_all(tmp_path / "t.parquet")
    assert [s.captions for s in samples] == [(f"text {n}",) for n in (0, 1, 4, 5)]
    assert [r.key for r in rejects] == [""]
    assert "row 2 and the rest of its row group cannot be read" in rejects[0].reason
    damaged(tmp_path / "t.parquet", "all")
    with pytest.raises(SourceError, match="nothing can be read"):
        read_all(tmp_path / "t.parquet")


def test_a_text_that_is_not_utf8_is_a_reject(tmp_path):
    offsets, content = pa.py_buffer(b"\0\0\0\0\4\0\0\0\6\0\0\0"), pa.py_buffer(b"fine\xff\xfe")
    captions = pa.StringArray.from_buffers(2, offsets, content)
    samples, rejects = read_table(tmp_path, {"image": [b"x", b"y"], "caption": captions})
    assert [s.captions for s in samples] == [("fine",)]
    assert [r.key for r in rejects] == ["000000001"]
