"""Every class of transformers and every released .pth, read and written: what they say stays the same."""

from pathlib import Path

import parity_cases as cases
import pytest
import torch
from safetensors.torch import load_file

from openblip.checkpoints.loading import load_checkpoint, save_checkpoint
from openblip.checkpoints.original import TRAINING_ONLY
from released_files import KINDS, TEXT_DIM, released_file


@pytest.mark.parametrize("class_name", cases.CLASSES)
def test_a_folder_of_theirs_there_and_back(tmp_path: Path, class_name: str) -> None:
    theirs = cases.write_theirs(tmp_path / "theirs", class_name)
    checkpoint = load_checkpoint(tmp_path / "theirs")
    expected = cases.their_outputs(theirs)
    cases.assert_same(cases.our_outputs(checkpoint), expected)

    save_checkpoint(checkpoint, tmp_path / "written", "huggingface")
    again = cases.loaded_by_them(class_name, tmp_path / "written")
    cases.assert_same(cases.their_outputs(again, texts=False), cases.Outputs(expected.scores))
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("theirs", "written"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name

    save_checkpoint(checkpoint, tmp_path / "ours", "openblip")
    cases.assert_same(cases.our_outputs(load_checkpoint(tmp_path / "ours")), expected)


@pytest.mark.parametrize("class_name", ["BlipForImageTextRetrieval", "BlipForQuestionAnswering"])
def test_reading_from_cls_is_what_transformers_does(tmp_path: Path, class_name: str) -> None:
    theirs = cases.write_theirs(tmp_path, class_name)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.encoder_token == "[ENC]"
    from_cls = cases.our_outputs(checkpoint, cases.TOKENIZER.cls_id)
    cases.assert_same(from_cls, cases.their_outputs(theirs, cases.TOKENIZER.cls_id, texts=False))
    grounded = "itm" if "itm" in from_cls.scores else "vqa"
    from_enc = cases.our_outputs(checkpoint)
    assert (from_enc.scores[grounded] - from_cls.scores[grounded]).abs().max() > 1e-3


FILES = [*((kind, 192) for kind in KINDS), ("VQA", TEXT_DIM), ("captions", TEXT_DIM)]


@pytest.mark.parametrize(
    ("kind", "image_dim"), [FILES[0], *(pytest.param(*file, marks=pytest.mark.slow) for file in FILES[1:])]
)
def test_a_released_file_there_and_back(tmp_path: Path, kind: str, image_dim: int) -> None:
    state = released_file(kind, image_dim)
    path = tmp_path / "released.pth"
    torch.save({"model": state, "optimizer": {"lr": 1e-4}, "config": {"a": [1]}, "epoch": 3}, path)
    cases.TOKENIZER.save(tmp_path)
    checkpoint = load_checkpoint(path)
    expected = cases.released_outputs(kind, state)
    cases.assert_same(cases.our_outputs(checkpoint), expected)
    shared = checkpoint.model.config.text.sharing == "all_but_sa"
    assert shared == (kind != "VQA")

    save_checkpoint(checkpoint, tmp_path / "written.pth", "original")
    written = torch.load(tmp_path / "written.pth", weights_only=True)["model"]
    assert written.keys() == {name for name in state if not name.startswith(TRAINING_ONLY)}
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, state[name], atol=0, rtol=1e-6 if name == "temp" else 0, msg=name)
    cases.assert_same(cases.released_outputs(kind, written, texts=False), cases.Outputs(expected.scores))
    cases.assert_same(cases.our_outputs(load_checkpoint(tmp_path / "written.pth")), expected)

    save_checkpoint(checkpoint, tmp_path / "ours", "openblip")
    cases.assert_same(cases.our_outputs(load_checkpoint(tmp_path / "ours")), expected)
