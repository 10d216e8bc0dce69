"""What a name stands for: the run folder of a training, which is its final model, and names on the hub."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from test_native import BLIP, KINDS, STAGE2

import openblip
from damaged_files import assert_same_weights
from openblip.checkpoints.backbones import save_language_model
from openblip.checkpoints.loading import is_hub_name, load_checkpoint, load_image_encoder, save_checkpoint
from openblip.errors import CheckpointError
from tiny_blip2 import tiny_language_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "checkpoints" / "step_00000010").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"recipe": "caption", "task": {}}))
    return tmp_path / "run"


@pytest.mark.parametrize("kind", [BLIP, STAGE2])
def test_a_finished_run_is_its_final_model(run: Path, kind: str) -> None:
    final, best = KINDS[kind](), KINDS[kind]()
    best.model.vision.position_embedding.data.zero_()
    save_checkpoint(best, run / "best")
    save_checkpoint(final, run / "model")
    loaded = load_checkpoint(run)
    assert type(loaded) is type(final)
    assert_same_weights(loaded.model, final.model)
    assert openblip.load(run).tasks == openblip.load(run / "model").tasks
    encoder = load_image_encoder(run)
    assert_same_weights(encoder.model, load_image_encoder(run / "model").model)


@pytest.mark.parametrize("load", [load_checkpoint, openblip.load, load_image_encoder])
def test_an_unfinished_run_says_what_there_is(run: Path, load: Any) -> None:
    with pytest.raises(CheckpointError, match=r"run .*has not finished.*checkpoints/.*train --resume") as caught:
        load(run)
    assert "best" not in str(caught.value)
    save_checkpoint(KINDS[BLIP](), run / "best")
    with pytest.raises(CheckpointError, match=r"has not finished.*Name .*run/best, .*checkpoints/"):
        load(run)


def test_the_run_of_a_language_model_is_no_model_of_images(run: Path) -> None:
    save_language_model(run / "model", tiny_language_model("opt"))
    with pytest.raises(CheckpointError, match=r"run/model/config\.json .*model_type is opt. A language model"):
        load_checkpoint(run)


# ---- names on the hub, without a network


@pytest.mark.parametrize(
    ("source", "expected"),
    [("Salesforce/blip-base", True), ("openblip-mini", False), ("/runs/x", False), ("./runs/x", False),
     ("runs/x/model", False), ("../x", False)],
)  # fmt: skip
def test_what_reads_like_a_name(source: str, expected: bool) -> None:
    assert is_hub_name(source) is expected


def test_a_model_of_the_hub_is_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openblip.load("openblip-mini-filter").save(tmp_path, format="huggingface")
    asked: list[Any] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, "pytorch_model*.bin" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert "match" in openblip.load("owner/filter").tasks
    assert asked == [("owner/filter", False)]  # safetensors were there
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        openblip.load("owner/filter")
    assert asked[1:] == [("owner/filter", False), ("owner/filter", True)]


def test_a_folder_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openblip.load("openblip-mini-filter").save(tmp_path / "runs" / "filter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert "match" in openblip.load("runs/filter").tasks


def test_offline_the_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"no checkpoint owner/no-such-model: .*offline"):
        openblip.load("owner/no-such-model")
