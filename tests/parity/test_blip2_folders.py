"""Every class of transformers' BLIP-2, read and written: what it says stays the same. Tiny, random, float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from blip2_cases import (
    RETRIEVER,
    WRITERS,
    Language,
    assert_same,
    our_outputs,
    their_model,
    their_outputs,
    write_theirs,
)
from safetensors.torch import load_file

from openblip.checkpoints.loading import load_any, save_as

LANGUAGES: list[Language] = ["opt", "llama", "t5"]
CASES = [(name, language) for name in WRITERS for language in LANGUAGES] + [(RETRIEVER, None)]


def loaded_by_them(class_name: str, folder: Path) -> Any:
    theirs, report = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return theirs.eval()


@pytest.mark.parametrize(("class_name", "language"), CASES)
def test_a_folder_of_theirs_there_and_back(
    tmp_path: Path, class_name: str, language: Language | None
) -> None:
    theirs = their_model(class_name, language)
    write_theirs(tmp_path / "theirs", theirs, language)
    checkpoint = load_any(tmp_path / "theirs")
    expected = their_outputs(theirs, language)
    assert_same(our_outputs(checkpoint), expected)

    save_as(checkpoint, tmp_path / "written", "huggingface")
    again = loaded_by_them(class_name, tmp_path / "written")
    assert_same(their_outputs(again, language), expected)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("theirs", "written"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name

    save_as(checkpoint, tmp_path / "ours", "openblip")
    assert_same(our_outputs(load_any(tmp_path / "ours")), expected)
