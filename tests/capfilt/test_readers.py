"""What CapFilt writes opens in the readers that other people have."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from capfilt_world import all_rows, picture

from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.export import export
from openblip.capfilt.local import run_capfilt
from openblip.capfilt.selection import select
from openblip.cli.main import main
from openblip.data.captions import read_texts, score_file, write_score
from openblip.data.decision import Rule, join_texts
from openblip.data.images import read_image
from openblip.data.sample import Sample
from openblip.data.sources import open_source
from openblip.files import write_json
from shared_files import as_json, write_tar
from source_items import items_of


def with_pandas(folder: Path) -> list[dict[str, Any]]:
    import pandas

    return pandas.concat(map(pandas.read_parquet, sorted(folder.glob("*.parquet")))).to_dict("records")


def with_pyarrow(folder: Path) -> list[dict[str, Any]]:
    import pyarrow.dataset

    return pyarrow.dataset.dataset(sorted(map(str, folder.glob("*.parquet")))).to_table().to_pylist()


def with_duckdb(folder: Path) -> list[dict[str, Any]]:
    import duckdb

    return duckdb.sql(f"from '{folder}/*.parquet'").to_arrow_table().to_pylist()


def with_datasets(folder: Path) -> list[dict[str, Any]]:
    return load_dataset(folder, "parquet", data_files=str(folder / "*.parquet"))


def load_dataset(folder: Path, *arguments: str, **options: Any) -> list[dict[str, Any]]:
    import datasets

    cache = folder.parent / "cache"
    return list(datasets.load_dataset(*arguments, split="train", cache_dir=str(cache), **options))


@pytest.mark.parametrize("read", [with_pandas, with_pyarrow, with_duckdb, with_datasets])
def test_caption_files(run_copy: Path, read: Callable[[Path], list[dict[str, Any]]]) -> None:
    rows = [
        {name: None if value != value else value for name, value in row.items()} for row in read(run_copy / "captions")
    ]
    assert sorted(rows, key=str) == sorted(all_rows(run_copy), key=str)


@pytest.fixture
def exported(config: CapFiltConfig, tmp_path: Path) -> Path:
    """Pairs whose first images differ from later ones in everything that a reader may take for granted."""
    members = []
    for number in range(8):
        is_late = number > 6
        fields = {"tags": ["x"] if is_late else [], "noise": {"kind": "other"} if is_late else None}
        members += [(f"{number}.{'png' if is_late else 'jpg'}", picture(number, format="PNG" if is_late else "JPEG"))]
        members += [
            (f"{number}.json", as_json(caption=[f"a dog {n}" for n in range(6)] if not number else [], **fields))
        ]
    write_tar(tmp_path / "web" / "0.tar", members)
    run_capfilt(replace(config, source=str(tmp_path / "web"), threshold=0.0), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    return tmp_path / "out"


def expected(exported: Path) -> list[tuple[str, str, float | None]]:
    rows = all_rows(exported.parent / "run")
    return [(f"{row['key']}-{row['source']}-{row['index']}", row["caption"], rounded(row["logprob"])) for row in rows]


def rounded(logprob: float | None) -> float | None:
    """Hugging Face's json holds fewer digits."""
    return None if logprob is None else round(logprob, 5)


def test_webdataset_reads_an_export(exported: Path) -> None:
    import webdataset

    samples = list(webdataset.WebDataset(str(exported / "0.tar"), shardshuffle=False).decode("pil"))
    fields = [sample["json"] for sample in samples]
    found = [(s["__key__"], f["caption"], rounded(f.get("logprob"))) for s, f in zip(samples, fields, strict=True)]
    assert found == expected(exported)
    assert all((sample.get("jpg") or sample.get("png")).size == (40, 30) for sample in samples)


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_reads_the_folder_of_an_export(exported: Path, streaming: bool) -> None:
    samples = load_dataset(exported, str(exported), streaming=streaming)
    assert [(s["__key__"], s["json"]["caption"], rounded(s["json"].get("logprob"))) for s in samples] == expected(
        exported
    )
    assert all((sample["jpg"] or sample["png"]).size == (40, 30) for sample in samples)
    assert (samples[-1]["json"]["tags"], samples[-1]["json"]["noise"]) == (["x"], {"kind": "other"})


def test_datasets_reads_the_files_of_an_export(exported: Path) -> None:
    samples = load_dataset(exported, "webdataset", data_files=str(exported / "*.tar"))
    assert [(sample["__key__"], sample["json"]["caption"]) for sample in samples] == [r[:2] for r in expected(exported)]


@pytest.fixture
def with_uids(config: CapFiltConfig, tmp_path: Path) -> Path:
    """A run over two shards as img2dataset writes them from a pool of DataComp."""
    for shard, count in (("00000", 4), ("00001", 3)):
        members = []
        for number in range(count):
            key = f"{shard}{number:04d}"
            uid = f"{int(shard) * 7919 + number * 104729 + (1 << 127):032x}"
            info = as_json(uid=uid, url=f"https://x/{key}", caption=f"a red dog {number}", key=key)
            members += [(f"{key}.jpg", picture(number)), (f"{key}.json", info), (f"{key}.txt", b"a red dog")]
        write_tar(tmp_path / "pool" / f"{shard}.tar", members)
        (tmp_path / "pool" / f"{shard}_stats.json").write_text(f'{{"successes": {count}}}')
    run_capfilt(replace(config, source=str(tmp_path / "pool"), threshold=0.0), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("format", ["parquet", "huggingface"])
def test_exports_as_tables(with_uids: Path, tmp_path: Path, format: str) -> None:
    select(with_uids, rule=Rule(where="not (shard = '00001' and source = 'web')", weight="itm + 1"))
    out = tmp_path / "out"
    assert main(["capfilt-export", str(with_uids), "--out", str(out), "--format", format]) == 0
    if format == "huggingface":
        rows = load_dataset(out, str(out))
    else:
        rows = load_dataset(out, "parquet", data_files=[str(out / "00000.parquet"), str(out / "00001.parquet")])
        assert len(with_pandas(out)) == len(rows)
    expected = list(items_of(open_source(f"capfilt:{with_uids}")))
    assert [row["key"] for row in rows] == [sample.key for sample in expected]
    assert len(rows) == 11
    texts = {(row["shard"], row["key"], row["source"]): row for row in all_rows(with_uids)}
    for row, sample in zip(rows, expected, strict=True):
        assert (row["caption"],) == sample.captions
        assert row["image"].convert("RGB").tobytes() == read_image(sample.image).tobytes()
        assert row["uid"] == sample.info["uid"] == json.loads(row["info"])["uid"]
        text = texts[row["origin_shard"], row["origin_key"], row["source"]]
        assert (row["itm"], row["logprob"], row["weight"]) == (text["itm"], text["logprob"], text["itm"] + 1)
    again = [sample for sample in items_of(open_source(str(out))) if isinstance(sample, Sample)]
    assert [(s.captions, s.image) for s in again] == [(s.captions, s.image) for s in expected]
    select(with_uids, rule=Rule(where="shard = '00001'"))
    assert main(["capfilt-export", str(with_uids), "--out", str(out), "--format", format]) == 0
    assert len(list(out.rglob("*.parquet"))) == 1
    assert main(["capfilt-export", str(with_uids), "--out", str(out), "--format", "tar"]) == 2


def test_uids_are_those_that_datacomp_takes(with_uids: Path, tmp_path: Path) -> None:
    select(
        with_uids, rule=Rule(where="shard = '00000' and source = 'web' or source = 'synthetic' and key like '%0001'")
    )
    assert main(["capfilt-export", str(with_uids), "--out", str(tmp_path / "out"), "--format", "uids"]) == 0
    expected: dict[str, set[str]] = {"": set(), "-web": set(), "-synthetic": set()}
    for sample in items_of(open_source(f"capfilt:{with_uids}")):
        expected[""].add(sample.info["uid"])
        expected["-web" if "-web-" in sample.key else "-synthetic"].add(sample.info["uid"])
    assert [len(uids) for uids in expected.values()] == [5, 4, 2]
    for name, uids in expected.items():
        numbers = np.load(tmp_path / "out" / f"uids{name}.npy")
        assert numbers.dtype == np.dtype("u8,u8")
        assert np.array_equal(numbers, np.sort(numbers))
        assert [f"{high:016x}{low:016x}" for high, low in numbers.tolist()] == sorted(uids)


def test_uids_need_samples_that_state_them(run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capfilt-export", str(run_copy), "--out", str(tmp_path / "out"), "--format", "uids"]) == 2
    assert "it states no uid" in capsys.readouterr().err


def test_the_tar_shards_have_uid_weight_and_later_scores(with_uids: Path, tmp_path: Path) -> None:
    for shard in ("00000", "00001"):
        num_texts = len(read_texts(with_uids, shard))
        write_score(with_uids, shard, "clip", pa.array([n / 10 for n in range(num_texts)]))
        write_json(score_file(with_uids, "clip", shard, "report.json"), {})
    select(with_uids, rule=Rule(weight="clip"))
    export(with_uids, tmp_path / "out")
    samples = list(items_of(open_source(str(tmp_path / "out"))))
    assert len(samples) == 12, "the first text of each shard has the weight 0"
    for sample in samples:
        assert sample.info["weight"] == sample.info["clip"] > 0
        assert len(sample.info["uid"]) == 32


def test_joined_texts_are_one_pair(with_uids: Path, tmp_path: Path) -> None:
    select(with_uids, 0.0, Rule(repair="join"))
    export(with_uids, tmp_path / "out")
    samples = list(items_of(open_source(str(tmp_path / "out"))))
    assert len(samples) == 7
    rows = all_rows(with_uids)
    joined = [sample for sample in samples if sample.info["source"] == "joined"]
    assert joined
    for sample in joined:
        texts = [row for row in rows if row["key"] == sample.info["origin_key"]]
        assert sample.captions == (join_texts(row["caption"] for row in texts),)
        assert sample.info["itm"] == min(row["itm"] for row in texts)
