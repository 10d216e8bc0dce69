"""Exported graphs give what the model gives, and the captioner of the guide needs neither torch nor OpenBLIP."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import openblip
from openblip.checkpoints import onnx
from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.errors import CheckpointError, ConfigError, UnsupportedTaskError
from openblip.predictor import BlipPredictor
from tiny_blip import tiny_checkpoint
from tiny_blip2 import tiny_blip2

GUIDE = Path(__file__).parents[2] / "docs" / "export.md"
# What the guide's captioner may import is what it says.
ALONE = "import sys\nsys.modules.update(dict.fromkeys(('torch', 'transformers', 'openblip')))\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[BlipCheckpoint, Path]:
    checkpoint = tiny_checkpoint(("itm", "lm"), prompt="a picture of")
    folder = tmp_path_factory.mktemp("export") / "exported"
    differences = onnx.export_checkpoint(checkpoint, folder, "onnx")
    assert list(differences) == ["image_encoder", "match", "caption_prefill", "caption_step"]
    assert max(differences.values()) < 1e-4
    random = np.random.default_rng(0)
    for name in ("photo", "cat"):
        pixels = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder.parent / f"{name}.jpg")
    return checkpoint, folder


@pytest.mark.slow
def test_the_captioner_of_the_guide_writes_what_openblip_writes(exported: tuple[BlipCheckpoint, Path]) -> None:
    checkpoint, folder = exported
    script, _ = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.M | re.S)
    command = [sys.executable, "-c", ALONE + script]
    result = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    images = [folder.parent / "photo.jpg", folder.parent / "cat.jpg"]
    captions = BlipPredictor(checkpoint).caption(images, decoding=openblip.Greedy())
    assert result.stdout.strip() == str(captions)
    assert len(set(captions)) == 2


@pytest.mark.slow
def test_rows_of_an_image_share_it(exported: tuple[BlipCheckpoint, Path]) -> None:
    checkpoint, folder = exported
    description = json.loads((folder / "export.json").read_text())
    predictor = BlipPredictor(checkpoint)
    texts, images = (
        ["a red dog", "two cars beside a small bird"],
        [folder.parent / "photo.jpg", folder.parent / "cat.jpg"],
    )
    tokens = predictor.tokenizer.encode(texts * 2)
    tokens.ids[:, 0] = description["match_first_id"]
    with torch.no_grad():
        encoded = predictor.encode(images).tokens.numpy()
    session = onnxruntime.InferenceSession(folder / "match.onnx")
    inputs = {"input_ids": tokens.ids.numpy(), "attention_mask": tokens.mask.long().numpy(), "image_tokens": encoded}
    (found,) = session.run(None, inputs)
    expected = predictor.match_matrix(images, texts).flatten()
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_weights_are_written_once_and_no_paths(exported: tuple[BlipCheckpoint, Path]) -> None:
    checkpoint, folder = exported
    size = sum(weight.numel() * 4 for weight in checkpoint.model.parameters())
    assert (folder / "weights.bin").stat().st_size < 2 * size  # equal parts of prefill, step and matching once
    assert not any(str(Path(openblip.__file__).parent).encode() in file.read_bytes() for file in folder.glob("*.onnx"))


@pytest.mark.slow
def test_a_graph_that_differs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny_checkpoint(("lm",))
    graphs = {"image_encoder": onnx.find_graphs(checkpoint)["image_encoder"]}
    monkeypatch.setattr(onnx, "find_graphs", lambda checkpoint: graphs)
    open_graph = onnx._open_graph

    def slightly_wrong(path: Path) -> Any:
        run = open_graph(path)
        return lambda inputs: [x + 0.05 for x in run(inputs)]

    monkeypatch.setattr(onnx, "_open_graph", slightly_wrong)
    with pytest.raises(CheckpointError, match=r"image_encoder.onnx differs from torch by .* in image_tokens"):
        onnx.export_checkpoint(checkpoint, tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_answers(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(("vqa",))
    differences = onnx.export_checkpoint(checkpoint, tmp_path / "out", "onnx")
    assert list(differences) == ["image_encoder", "answer_prefill", "answer_step"]
    assert max(differences.values()) < 1e-4


@pytest.mark.slow
def test_the_qformer_of_a_blip2(tmp_path: Path) -> None:
    checkpoint = tiny_blip2(("itc", "itg"))
    differences = onnx.export_checkpoint(checkpoint, tmp_path / "out", "onnx")
    assert list(differences) == ["image_encoder", "text_encoder", "caption_prefill", "caption_step"]
    assert max(differences.values()) < 1e-4


@pytest.mark.slow
def test_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    checkpoint = tiny_checkpoint(("itm",))
    graphs = {"match": onnx.find_graphs(checkpoint)["match"]}
    monkeypatch.setattr(onnx, "find_graphs", lambda checkpoint: graphs)
    assert onnx.export_checkpoint(checkpoint, tmp_path / "out", "openvino")["match"] < 1e-4
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"match.xml", "match.bin", "tokenizer.json", "preprocessor_config.json", "export.json"} <= names
    assert not names & {"match.onnx", "weights.bin"}


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_another_precision_is_refused_before_any_work(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in float32 on the CPU; this has"):
        onnx.export_checkpoint(
            openblip.load("openblip-mini-captioner", device="cpu", dtype=dtype).checkpoint, tmp_path / "out", "onnx"
        )
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported() -> None:
    with pytest.raises(UnsupportedTaskError, match="nlvr"):
        onnx.find_graphs(tiny_checkpoint(("nlvr",)))
    assert onnx.left_out(tiny_checkpoint(("nlvr",))) == ["judge"]
