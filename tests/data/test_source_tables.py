"""Tables as people have them: names of columns, delimiters, encodings, repeated ids, and lists of captions."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotation_files import items_of, read_all, write

from openblip.data.config import SourceOptions
from openblip.data.inspect import inspect_source
from openblip.data.sources import check_options_used, open_mixture, open_source, require_texts
from openblip.data.sources.dialect import Dialect
from openblip.errors import ConfigError, SourceError

JUICE = {"images": ["a.jpg"], "text": "<__dj__image> a dog <|__dj__eoc|>"}


@pytest.fixture
def folder(tmp_path, make_image):
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(make_image(ord(name)))
    return tmp_path


def captions_of(path, **options):
    """The captions by key of a table's samples, whose images are a.jpg, b.jpg, ... in this order."""
    samples = items_of(open_source(str(path), **options))
    images = [path.with_name(f"{name}.jpg").read_bytes() for name in "abc"]
    assert [sample.image for sample in samples] == images[: len(samples)]
    return {sample.key: sample.captions for sample in samples}


@pytest.mark.parametrize(
    ("name", "content", "captions"),
    [
        ("results.csv", "image_name| comment_number| comment\na.jpg| 0| Dogs , \"one\" .\na.jpg| 1| Dogs\nb.jpg| 0| x",
         {"a.jpg": ('Dogs , "one" .', "Dogs"), "b.jpg": ("x",)}),
        ("captions.txt", 'image,caption\na.jpg,A dog .\na.jpg,"A dog , so"\n', {"a.jpg": ("A dog .", "A dog , so")}),
        ("token.txt", 'a.jpg#0\t"A dog" runs .\na.jpg#1\tdog\tcat\n', {"a.jpg": ('"A dog" runs .', "dog\tcat")}),
        ("r.token", "a.jpg#0\tA dog .\nb.jpg#0\tx\n", {"a.jpg": ("A dog .",), "b.jpg": ("x",)}),
        ("t.jsonl", json.dumps(JUICE), {"000000001": ("a dog",)}),
        ("t.json", [{"image": "a.jpg", "caption": "x"}, {"images": ["b.jpg"], "caption": "y"}],
         {"000000000": ("x",), "000000001": ("y",)}),
        ("t.json", {"a.jpg": "x", "b.jpg": ["y", "z"]}, {"000000000": ("x",), "000000001": ("y", "z")}),
        ("t.json", {"a.jpg": {"caption": "x", "tags": "t"}}, {"000000000": ("x",)}),
        ("coco.json", {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]},
         {"1": ("x",)}),
        ("t.csv", "image, caption\na.jpg , x \n", {"000000002": ("x",)}),
        ("t.csv", 'image,captions\na.jpg,"[""x"", ""y""]"\nb.jpg,[z\n',
         {"000000002": ("x", "y"), "000000003": ("[z",)}),
        ("t.csv", 'images,caption\n"[""a.jpg""]",x\n', {"000000002": ("x",)}),
        ("t.csv", "image,caption\na.jpg,x\n".encode("utf-16"), {"000000002": ("x",)}),
        ("t.json", json.dumps({"a.jpg": "é"}, ensure_ascii=False).encode("utf-16"), {"000000000": ("é",)}),
        ("t.csv", "image\na.jpg\n", {"000000002": ()}),
        ("r.jsonl", '{"key": "a.jpg", "caption": "x", "logprob": -1}\n{"key": "a.jpg", "caption": "y", "logprob": -2}',
         {"a.jpg": ("x", "y")}),
        ("r.csv", "key,caption,logprob\na.jpg,x,-1\nb.jpg,y,-2\n", {"a.jpg": ("x",), "b.jpg": ("y",)}),
        ("m.jsonl", '{"key": "a.jpg", "text": "x", "match": 0.5, "similarity": null}', {"a.jpg": ("x",)}),
    ],
)  # fmt: skip
def test_tables_as_they_lie_around(folder, name, content, captions):
    path = folder / name
    path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
    assert captions_of(path) == captions


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "a.jpg,a dog\nb.jpg,x\n", "put a line of names above it, as image,caption"),
        ("t.txt", "a.jpg\ta dog\n", "put a line of names above it, as image\tcaption"),
        ("t.csv", "image,image,caption\na.jpg,b.jpg,x\n", "several columns are called image"),
        ("t.csv", "image,caption\na.jpg,café\nb.jpg,x\n".encode("latin-1"), "not UTF-8 text; save the file as UTF-8"),
        ("t.csv", "url,caption\nx,y\n", "no image column .*found: url, caption; name it with --image-column"),
        ("t.jsonl", '{"url": "x", "caption": "y"}', "no image column .*found: url, caption"),
        ("t.json", [{"image": "gone.jpg", "caption": "x"}], "not beside it; give their folder with --images"),
        ("t.json", {"a": "x"}, "not an annotation file"),
        ("notes.txt", "Some notes.\nMore.", "no image column .*found: Some notes."),
    ],
)
def test_tables_that_are_refused(folder, name, content, said):
    path = folder / name
    path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
    with pytest.raises(SourceError, match=said):
        open_source(str(path))


def test_a_few_rows_that_are_not_utf8_are_rejects(folder):
    rows = ["image,caption", *["a.jpg,x"] * 20, "b.jpg,caf\u00e9"]
    (folder / "t.csv").write_bytes("\n".join(rows).encode("latin-1"))
    samples, rejects = read_all(folder / "t.csv")
    assert len(samples) == 20
    assert "utf-8" in rejects[0].reason


@pytest.fixture(params=["csv", "jsonl", "json", "parquet"])
def odd_table(request, folder):
    """A table whose columns have names of their own, beside the usual ones with other content."""
    rows = [{"pic": f"{n}.jpg", "alt": f"{n}!", "caption": "other", "n": "1"} for n in "ab"]
    path = folder / f"t.{request.param}"
    if request.param == "csv":
        write(path, "\n".join(["pic,alt,caption,n", *(",".join(row.values()) for row in rows)]))
    elif request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(path, rows if request.param == "json" else "\n".join(map(json.dumps, rows)))
    return path


def test_columns_are_named(odd_table):
    assert list(captions_of(odd_table, image_column="pic", caption_column="alt").values()) == [("a!",), ("b!",)]
    mixture = open_mixture(f"{odd_table}[:99%]", image_column="pic", caption_column="alt")
    check_options_used(mixture.sources, SourceOptions(image_column="pic", caption_column="alt"))
    for options in ({"image_column": "nope"}, {"image_column": "pic", "caption_column": "nope"}):
        with pytest.raises(SourceError, match=r"\(nope\); found: pic, alt, caption, n"):
            open_source(str(odd_table), **options)


def test_a_field_of_a_shards_json_is_named(tmp_path, write_tar, make_image):
    members = [
        ("a.jpg", make_image()),
        ("a.json", b'{"alt": "x", "caption": "y"}'),
        ("b.jpg", make_image()),
        ("b.json", b'{"url": "u"}'),
    ]
    source = open_source(str(write_tar(tmp_path / "t.tar", members)), caption_column="alt")
    sample, reject = items_of(source)
    assert sample.captions == ("x",)
    assert "no field alt; found: url" in reject.reason
    with pytest.raises(ConfigError, match="--image-column has no effect"):
        check_options_used([source], SourceOptions(image_column="x", caption_column="alt"))


@pytest.mark.parametrize("content", ["image\na.jpg\n", "image,alt\na.jpg,x\n"])
def test_a_table_without_captions_is_refused_where_they_are_needed(folder, content):
    source = open_source(str(write(folder / "t.csv", content)))
    with pytest.raises(SourceError, match=r"no caption column .*; name it with --caption-column"):
        require_texts([source])
    pq.write_table(pa.table({"image": [b"x"], "n": [1]}), folder / "t.parquet")
    with pytest.raises(SourceError, match=r"no caption column .*found: image, n"):
        require_texts([open_source(str(folder / "t.parquet"))])
    assert "no caption column" in inspect_source(source).facts()["missing"]
    require_texts([open_source(str(write(folder / "t.jsonl", '{"image": "a.jpg"}')))])  # later lines may have some


def test_repeated_ids(folder):
    """Rows that differ in their captions alone are one sample; others are samples of their own."""
    rows = ["1,a.jpg,x,s", "1,a.jpg,y,s", "2,b.jpg,z,s", "1,a.jpg,late,s", "2,c.jpg,other image,s", "2,c.jpg,other,t"]
    samples, rejects = read_all(write(folder / "t.csv", "\n".join(["id,image,caption,split", *rows])))
    assert not rejects
    assert {s.key: s.captions for s in samples} == {
        "1": ("x", "y"), "2": ("z",), "1-2": ("late",), "2-2": ("other image",), "2-3": ("other",),
    }  # fmt: skip
    assert samples[0].image_id == samples[2].image_id != samples[1].image_id
    assert inspect_source(open_source(str(folder / "t.csv"))).facts()["repeated keys"] == 3
    assert samples[0].info == {"id": "1", "image": "a.jpg", "split": "s", "captions": ["x", "y"]}
    questions = [{"id": 1, "image": "a.jpg", "question": text} for text in ("what?", "who?")]
    samples, _ = read_all(write(folder / "q.json", questions))
    assert [(s.key, s.info["question"]) for s in samples] == [("1", "what?"), ("1-2", "who?")]


def test_images_of_parquet_by_path_and_in_lists(folder):
    table = {"image": ["a.jpg", "a.jpg", "gone.jpg"], "caption": ["x", "y", "z"]}
    pq.write_table(pa.table(table), folder / "t.parquet")
    samples, rejects = read_all(folder / "t.parquet")
    assert [(s.image, s.captions) for s in samples] == [((folder / "a.jpg").read_bytes(), (text,)) for text in "xy"]
    assert samples[0].image_id == samples[1].image_id
    assert [reject.path for reject in rejects] == [str(folder / "gone.jpg")]
    lists = [[{"bytes": b"1", "path": None}], [{"bytes": b"1"}, {"bytes": b"2"}], []]
    pq.write_table(pa.table({"images": lists, "text": ["x", "y", "z"]}), folder / "l.parquet")
    samples, rejects = read_all(folder / "l.parquet")
    assert [(s.image, s.second_image) for s in samples] == [(b"1", None), (b"1", b"2")]
    assert "images lists 0 images" in rejects[0].reason


def test_each_line_of_a_text_beside_an_image_is_a_caption(folder):
    (folder / "a.txt").write_text("one\r\n\ntwo\n")
    (folder / "b.caption").write_text("three")
    assert [sample.captions for sample in items_of(open_source(str(folder)))] == [("one", "two"), ("three",), ()]


def test_a_quote_that_is_never_closed_does_not_parse_each_line_after_it_anew(folder, monkeypatch):
    parsed = []
    values = Dialect._values
    monkeypatch.setattr(Dialect, "_values", lambda *args, **named: parsed.append(1) or values(*args, **named))
    path = folder / "t.csv"
    path.write_text('image,caption\na.jpg,"x\n' + "b.jpg,y\n" * 1000)
    samples, (reject,) = read_all(path)
    assert "line 2" in reject.reason
    assert len(samples) == 1000
    assert len(parsed) < 1200
