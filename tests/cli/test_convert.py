"""`openblip convert`: there and back."""

from pathlib import Path

import pytest
import torch

from marks import slow
from openblip.checkpoints.loading import load_checkpoint
from openblip.cli.main import main

CAPTIONER, FILTER = "openblip-mini-captioner", "openblip-mini-filter"


@pytest.mark.parametrize("source", [CAPTIONER, *slow(FILTER)])
@pytest.mark.parametrize(("format", "name"), [("huggingface", "theirs"), ("original", "released/theirs.pth")])
def test_a_checkpoint_goes_there_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, format: str, name: str
) -> None:
    theirs, ours = tmp_path / name, tmp_path / "openblip"
    assert main(["convert", source, str(theirs), "--format", format]) == 0
    assert capsys.readouterr().out == f"wrote {theirs}\n"
    assert main(["convert", str(theirs), str(ours), "--format", "openblip"]) == 0
    before, after = load_checkpoint(source), load_checkpoint(ours)
    assert after[2:] == before[2:]  # preprocessing, prompt, token
    assert after.model.config == before.model.config
    assert after.tokenizer.to_json() == before.tokenizer.to_json()
    for key, tensor in before.model.state_dict().items():
        torch.testing.assert_close(after.model.state_dict()[key], tensor, atol=0, rtol=1e-6, msg=key)


def test_between_the_formats_of_others(tmp_path: Path) -> None:
    released, theirs, again = tmp_path / "a.pth", tmp_path / "theirs", tmp_path / "b.pth"
    assert main(["convert", FILTER, str(released), "--format", "original"]) == 0
    assert main(["convert", str(released), str(theirs), "--format", "huggingface"]) == 0
    assert main(["convert", str(theirs), str(again), "--format", "original"]) == 0
    before = torch.load(released, weights_only=True)
    after = torch.load(again, weights_only=True)
    assert before["openblip"] == after["openblip"]
    assert before["model"].keys() == after["model"].keys()
    for key, tensor in before["model"].items():
        torch.testing.assert_close(after["model"][key], tensor, atol=0, rtol=1e-6, msg=key)


@pytest.mark.parametrize("format", ["openblip", "huggingface", "original"])
def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str) -> None:
    (tmp_path / "kept.pth").write_text("mine")
    for out in (tmp_path, tmp_path / "kept.pth"):
        assert main(["convert", CAPTIONER, str(out), "--format", format]) == 2
        assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.pth"]
    assert (tmp_path / "kept.pth").read_text() == "mine"


def test_an_original_checkpoint_is_a_file_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", CAPTIONER, str(tmp_path), "--format", "original"]) == 2
    assert "name the new .pth file" in capsys.readouterr().err
    assert main(["convert", CAPTIONER, str(tmp_path / "out"), "--format", "original"]) == 2
    assert "end with .pth" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_heads_that_transformers_has_no_class_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "openblip-mini", str(tmp_path / "out"), "--format", "huggingface"]) == 2
    assert "No model of transformers has the heads" in capsys.readouterr().err
