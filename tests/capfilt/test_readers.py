"""What CapFilt writes opens in the readers that other people have."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from capfilt_world import all_rows, picture

from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.export import export
from openblip.capfilt.local import run_capfilt
from shared_files import as_json, write_tar


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
