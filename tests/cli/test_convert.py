"""`openblip convert`: there and back."""

from pathlib import Path

import pytest
import torch

import openblip
from openblip.cli.main import main

CAPTIONER = "openblip-mini-captioner"


def test_a_checkpoint_goes_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = tmp_path / "huggingface", tmp_path / "openblip"
    assert main(["convert", CAPTIONER, str(theirs), "--format", "huggingface"]) == 0
    assert capsys.readouterr().out == f"wrote {theirs}\n"
    assert main(["convert", str(theirs), str(ours), "--format", "openblip"]) == 0
    before, after = openblip.load(CAPTIONER), openblip.load(ours)
    assert after.prompt == before.prompt == "a picture of "
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], tensor), name


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    assert main(["convert", CAPTIONER, str(tmp_path), "--format", "openblip"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_heads_that_transformers_has_no_class_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "openblip-mini", str(tmp_path / "out"), "--format", "huggingface"]) == 2
    assert "No model of transformers has the heads" in capsys.readouterr().err
