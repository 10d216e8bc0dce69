"""The shipped models and the commands that run them, on a GPU."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw

import openblip
from openblip.capfilt.config import CapFiltConfig
from openblip.capfilt.local import run_capfilt
from openblip.cli.main import main
from shared_files import as_json, read_lines, write_tar

CAPTIONER, FILTER = "openblip-mini-captioner", "openblip-mini-filter"
TEXTS = ["a red circle", "two blue boxes on a white background", "a green tree beside a yellow house"]


def drawing(seed: int) -> Image.Image:
    """A few shapes in strong colors, which is what the shipped models have seen."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (160, 120), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y, size = (int(number) for number in rng.integers(5, 80, 3))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + size, y + size), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [drawing(seed) for seed in range(24)]


@pytest.fixture(scope="module")
def shards(images: Sequence[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tar shards of twelve pairs."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        members = []
        for row in range(12):
            file = io.BytesIO()
            images[12 * shard + row].save(file, "JPEG", quality=95)
            key = f"{12 * shard + row:04d}"
            members += [(f"{key}.jpg", file.getvalue()), (f"{key}.json", as_json(caption=TEXTS[row % 3]))]
        write_tar(folder / f"{shard:04d}.tar", members)
    return folder


def test_auto_is_bfloat16_where_the_gpu_has_it(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("the CPU's choice depends on the processor")
    expected = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    assert openblip.load(CAPTIONER, dtype="auto").dtype == expected
    assert openblip.load(CAPTIONER).device.type == "cuda"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shipped_models_write_and_score_as_on_the_cpu(
    device: torch.device, images: list[Image.Image], dtype: str
) -> None:
    strategies = [openblip.Greedy(), openblip.Beam(), openblip.Nucleus(seed=3)]
    captioners = [openblip.load(CAPTIONER, device, dtype), openblip.load(CAPTIONER, "cpu")]
    for decoding in strategies:
        ours, theirs = (model.caption(images, decoding=decoding) for model in captioners)
        agreeing = sum(a == b for a, b in zip(ours, theirs, strict=True))
        # These drawings are none of the scenes that the models were trained on, so many choices are close.
        assert agreeing >= (24 if dtype == "float32" else 15), (decoding, ours, theirs)
    filters = [openblip.load(FILTER, device, dtype), openblip.load(FILTER, "cpu")]
    tolerance = 1e-4 if dtype == "float32" else 0.03
    for call in ("match_matrix", "similarity"):
        found, expected = (getattr(model, call)(images, TEXTS) for model in filters)
        assert (found - expected).abs().mean() < tolerance


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [row for file in sorted((folder / "captions").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return sorted(found, key=lambda row: (row["shard"], row["key"], row["source"], row["index"]))


def test_capfilt_writes_the_rows_of_the_cpu(device: torch.device, shards: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"captioner": CAPTIONER, "filter": FILTER, "num_captions": 2, "dtype": "float32"}
    config = CapFiltConfig(source=str(shards / "{0000..0001}.tar"), batch_size=5, **settings)
    for place in (str(device), "cpu"):
        assert not run_capfilt(config, tmp_path / place, device=place).failed
    ours, theirs = rows(tmp_path / str(device)), rows(tmp_path / "cpu")
    assert len(ours) == len(theirs) == 24 * 3
    for found, expected in zip(ours, theirs, strict=True):
        for name in ("itm", "itc", "logprob"):
            assert found.pop(name) == pytest.approx(expected.pop(name), abs=2e-3)
        assert found == expected


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_the_command_line_captions_shards(device: torch.device, shards: Path, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "captions.jsonl"
    options = ["--model", CAPTIONER, "--out", str(out), "--device", str(device), "--dtype", dtype]
    assert main(["caption", str(shards / "0000.tar"), str(shards / "0001.tar"), *options]) == 0
    lines = read_lines(out)
    assert len(lines) == 24
    assert all(line["caption"] and line["logprob"] < 0 for line in lines)
