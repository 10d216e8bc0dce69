"""Folders of which a part was not downloaded: one line that names the file and says what to do."""

import shutil

import pytest
import torch

import openblip
from openblip.checkpoints import backbones
from openblip.checkpoints.checkpoint import save_native
from openblip.checkpoints.loading import load_checkpoint, load_image_encoder
from openblip.errors import CheckpointError
from tiny_blip2 import tiny_blip2

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 989\n"
DAMAGES = {
    POINTER: "is a Git LFS pointer",
    "<!DOCTYPE html><html>": "is a web page",
    "": "is empty",
    None: "There is no|cannot be read|no tokenizer|neither tokenizer|has no weights|has no vocabulary",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A BLIP-2 of ours, whose folders are also a language model's and an image encoder's, and a BLIP of each format."""
    root = tmp_path_factory.mktemp("whole")
    save_native(root / "blip2", tiny_blip2((), "opt", tower=True))
    model = openblip.load("openblip-mini-captioner")
    model.save(root / "blip")
    model.save(root / "theirs", format="huggingface")
    (root / "bin").mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(root / "theirs" / name, root / "bin")
    torch.save({}, root / "bin" / "pytorch_model.bin")
    model.save(root / "file" / "x.pth", format="original")
    return root


@pytest.mark.parametrize("content", DAMAGES, ids=["LFS", "html", "empty", "missing"])
@pytest.mark.parametrize(
    ("load", "source", "file"),
    [
        (load_checkpoint, "blip", "model.safetensors"),
        (load_checkpoint, "blip", "tokenizer.json"),
        (load_checkpoint, "theirs", "model.safetensors"),
        (load_checkpoint, "theirs", "config.json"),
        (load_checkpoint, "theirs", "preprocessor_config.json"),
        (load_checkpoint, "theirs", "tokenizer.json"),
        (load_checkpoint, "bin", "pytorch_model.bin"),
        (load_checkpoint, "file/x.pth", "x.pth"),
        (load_checkpoint, "blip2", "language_model/model.safetensors"),
        (load_checkpoint, "blip2", "vision_model/model.safetensors"),
        (backbones.load_language_model, "blip2/language_model", "model.safetensors"),
        (backbones.load_language_model, "blip2/language_model", "tokenizer.json"),
        (load_image_encoder, "blip2/vision_model", "model.safetensors"),
    ],
)
def test_what_is_not_whole_is_named(whole, tmp_path, monkeypatch, content, load, source, file):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    copy = tmp_path / "copy"
    shutil.copytree(whole / source.split("/")[0], copy)
    source = copy.joinpath(*source.split("/")[1:])
    path = (source if source.is_dir() else source.parent) / file
    if content is None:
        path.unlink()
        path.with_name("vocab.txt").unlink(missing_ok=True)
    else:
        path.write_text(content)
    if content is None and path.name == "preprocessor_config.json":
        load(source)  # it may be missing
        return
    message = DAMAGES[content]
    with pytest.raises(CheckpointError, match=message) as caught:
        load(source)
    assert "\n" not in str(caught.value)
    assert content is None or path.name in str(caught.value)
