"""`openblip export`: what is refused before any work; the graphs themselves are in tests/checkpoints/test_onnx.py."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest


def test_nothing_is_written_over(refusal: Any, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    assert "not empty" in refusal("export", "openblip-mini-captioner", tmp_path, "--format", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_missing_packages_are_named(refusal: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    out = tmp_path / "out"
    message = refusal("export", "openblip-mini-captioner", out, "--format", "onnx")
    assert 'onnxruntime not installed: pip install "openblip[export]"' in message
    assert not out.exists()
