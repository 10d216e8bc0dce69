"""`openblip convert`: there and back."""

from pathlib import Path
from typing import Any

import pytest
import torch

from marks import slow
from openblip.checkpoints.loading import load_checkpoint

CAPTIONER, FILTER = "openblip-mini-captioner", "openblip-mini-filter"


@pytest.mark.parametrize("source", [CAPTIONER, *slow(FILTER)])
@pytest.mark.parametrize(("format", "name"), [("huggingface", "theirs"), ("original", "released/theirs.pth")])
def test_a_checkpoint_goes_there_and_back(run: Any, tmp_path: Path, source: str, format: str, name: str) -> None:
    theirs, ours = tmp_path / name, tmp_path / "openblip"
    assert run("convert", source, theirs, "--format", format).out == f"wrote {theirs}\n"
    run("convert", theirs, ours, "--format", "openblip")
    before, after = load_checkpoint(source), load_checkpoint(ours)
    assert after[2:] == before[2:]  # preprocessing, prompt, token
    assert after.model.config == before.model.config
    assert after.tokenizer.to_json() == before.tokenizer.to_json()
    for key, tensor in before.model.state_dict().items():
        torch.testing.assert_close(after.model.state_dict()[key], tensor, atol=0, rtol=1e-6, msg=key)


def test_between_the_formats_of_others(run: Any, tmp_path: Path) -> None:
    released, theirs, again = tmp_path / "a.pth", tmp_path / "theirs", tmp_path / "b.pth"
    run("convert", FILTER, released, "--format", "original")
    run("convert", released, theirs, "--format", "huggingface")
    run("convert", theirs, again, "--format", "original")
    before, after = (torch.load(path, weights_only=True) for path in (released, again))
    assert before["openblip"] == after["openblip"]
    assert before["model"].keys() == after["model"].keys()
    for key, tensor in before["model"].items():
        torch.testing.assert_close(after["model"][key], tensor, atol=0, rtol=1e-6, msg=key)


@pytest.mark.parametrize("format", ["openblip", "huggingface", "original"])
def test_nothing_is_written_over(refusal: Any, tmp_path: Path, format: str) -> None:
    (tmp_path / "kept.pth").write_text("mine")
    for out in (tmp_path, tmp_path / "kept.pth"):
        assert "not empty" in refusal("convert", CAPTIONER, out, "--format", format)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.pth"]
    assert (tmp_path / "kept.pth").read_text() == "mine"


def test_formats_that_cannot_be_written(refusal: Any, tmp_path: Path) -> None:
    for source, out, format, message in (
        (CAPTIONER, tmp_path, "original", "name the new .pth file"),
        (CAPTIONER, tmp_path / "out", "original", "end with .pth"),
        ("openblip-mini", tmp_path / "out", "huggingface", "No model of transformers has the heads"),
    ):
        assert message in refusal("convert", source, out, "--format", format)
    assert not list(tmp_path.iterdir())
