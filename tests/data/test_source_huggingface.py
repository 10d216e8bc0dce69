"""Data sets as Hugging Face keeps them: repositories and their splits, saved data sets, Arrow files, hub names."""

from typing import ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotation_files import read_all, read_samples, write

from openblip.data.sources import open_source
from openblip.errors import SourceError

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*-of-00002.parquet
  - split: held_out
    path: [data/extra.parquet]
---
# A data set
"""


def table(*captions):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": text.encode(), "path": "x.png"} for text in captions], struct)
    return pa.table({"image": images, "text": pa.array(captions, pa.string())})


def write_table(path, *captions):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table(*captions), path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table().schema) as writer:
            writer.write_table(table(*captions))


def captions(spec):
    return [sample.captions[0] for sample in read_samples(spec)]


def test_a_repository(tmp_path, make_image):
    for number in range(2):
        write_table(tmp_path / f"data/train-0000{number}-of-00002.parquet", f"{number}")
    assert captions(tmp_path) == ["0", "1"]  # without its README
    (tmp_path / "logo.png").write_bytes(make_image())
    write(tmp_path / "README.md", "---\nlicense: mit\n---")
    assert captions(tmp_path) == captions(f"{tmp_path}#train") == ["0", "1"]
    write_table(tmp_path / "data/test-00000-of-00001.parquet", "2")
    assert captions(f"{tmp_path}#test") == ["2"]
    for spec, said in ((f"{tmp_path}", "say which split after a #"), (f"{tmp_path}#dev", "there is no split dev")):
        with pytest.raises(SourceError, match=f"{said}; the folder has #test, #train"):
            open_source(spec)


def test_the_splits_of_a_readme(tmp_path):
    write(tmp_path / "README.md", CARD)
    for number in range(2):
        write_table(tmp_path / f"data/a-0000{number}-of-00002.parquet", f"{number}")
    write_table(tmp_path / "data/extra.parquet", "2")
    assert captions(f"{tmp_path}#train") == ["0", "1"]
    assert captions(f"{tmp_path}#held_out") == ["2"]
    with pytest.raises(SourceError, match="#train, #held_out"):
        open_source(str(tmp_path))


def test_shards_that_are_named_after_splits(tmp_path):
    for name in ("train", "val"):
        write_table(tmp_path / f"web_{name}.parquet", name)
    with pytest.raises(SourceError, match="#train, #validation"):
        open_source(str(tmp_path))
    assert captions(f"{tmp_path}#validation") == ["val"]
    assert captions(f"{tmp_path}/*.parquet") == ["train", "val"]
    write_table(tmp_path / "more.parquet", "more")  # so the names say nothing
    assert captions(tmp_path) == ["more", "train", "val"]


def test_saved_data_sets(tmp_path):
    for split in ("train", "test"):
        folder = tmp_path / split
        for number in range(2):
            write_table(folder / f"data-0000{number}-of-00002.arrow", f"{split} {number}")
        write_table(folder / "cache-01.arrow", "of map")
        write(
            folder / "state.json",
            {} if split == "test" else {"_data_files": [{"filename": "data-00001-of-00002.arrow"}]},
        )
    assert captions(tmp_path / "test") == ["test 0", "test 1"]
    assert captions(tmp_path / "train") == ["train 1"]
    write(tmp_path / "dataset_dict.json", {"splits": ["train", "test"]})
    assert captions(f"{tmp_path}#test") == ["test 0", "test 1"]
    with pytest.raises(SourceError, match="#train, #test"):
        open_source(str(tmp_path))


def test_arrow_files(tmp_path):
    write_table(tmp_path / "stream.arrow", "0", "1")
    with pa.OSFile(str(tmp_path / "file.feather"), "wb") as file, pa.ipc.new_file(file, table().schema) as writer:
        writer.write_table(table("0", "1"), 1)
    for name in ("stream.arrow", "file.feather"):
        assert captions(tmp_path / name) == ["0", "1"]
    with pa.OSFile(str(tmp_path / "cut.arrow"), "wb") as file, pa.ipc.new_stream(file, table().schema) as writer:
        writer.write_table(table("0" * 1000, "1" * 1000), 1)
    (tmp_path / "cut.arrow").write_bytes((tmp_path / "cut.arrow").read_bytes()[:-1500])
    samples, rejects = read_all(tmp_path / "cut.arrow")
    assert [len(sample.image) for sample in samples] == [1000]
    assert "cannot be read" in rejects[0].reason
    (tmp_path / "bad.arrow").write_bytes(b"no arrow")
    with pytest.raises(SourceError, match="not a readable arrow file"):
        open_source(str(tmp_path / "bad.arrow"))


def test_names_on_the_hub(tmp_path, monkeypatch):
    class Hub(fsspec.get_filesystem_class("memory")):
        protocol = "hf"
        store: ClassVar[dict] = {}
        pseudo_dirs: ClassVar[list] = [""]

    class NoHub(Hub):
        def find(self, *arguments, **options):
            raise ConnectionError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (Hub(), url.removeprefix("hf:/")))
    write_table(tmp_path / "0.parquet", "0")
    Hub().pipe_file("/datasets/someone/pairs/data/train-00000-of-00001.parquet", (tmp_path / "0.parquet").read_bytes())
    Hub().pipe_file("/datasets/someone/pairs/README.md", b"---\n---")
    assert captions("someone/pairs") == captions("someone/pairs#train") == ["0"]
    with pytest.raises(SourceError, match="no data set on the Hugging Face hub"):
        open_source("someone/nothing")
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (NoHub(), url.removeprefix("hf:/")))
    with pytest.raises(
        SourceError, match=r"someone/pairs: no file or folder here, and .*could not be asked.*no network"
    ):
        open_source("someone/pairs")
    (tmp_path / "someone").mkdir()  # then it is a path, in which a file is missing
    with pytest.raises(SourceError, match="no such file or folder"):
        open_source("someone/pairs")
