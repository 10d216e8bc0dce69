"""Names on the Hugging Face hub, without a network."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import openblip
from openblip.checkpoints.loading import is_hub_name
from openblip.errors import CheckpointError


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
