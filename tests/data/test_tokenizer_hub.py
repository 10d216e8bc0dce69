"""Tokenizers by hub name, from a local cache and without a network."""

import huggingface_hub.constants
import pytest
import torch

from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["tiny-bert", "someone/tiny-bert"])
def test_a_cached_model_loads_by_its_name(offline, name):
    tokenizer = Tokenizer.train(["a red dog", "two red cats"], 120)
    model = offline / f"models--{name.replace('/', '--')}"
    tokenizer.save(model / "snapshots" / "0123abcd")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123abcd")
    loaded = Tokenizer.load(name)
    assert torch.equal(loaded.encode(["a red cat"]).ids, tokenizer.encode(["a red cat"]).ids)


@pytest.mark.parametrize("name", ["bert-base-uncased", "someone/bert"])
def test_offline_says_so(name):
    with pytest.raises(CheckpointError, match=f"{name} is no folder.*offline"):
        Tokenizer.load(name)


def test_a_missing_folder_is_not_looked_up(tmp_path):
    with pytest.raises(CheckpointError, match="neither tokenizer"):
        Tokenizer.load(str(tmp_path / "nothing"))
