"""Checkpoints come back as they were, and a damaged one says what is wrong with it."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import openblip
from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.checkpoints.loading import load_checkpoint
from openblip.checkpoints.native import load_blip, save_blip
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.errors import CheckpointError
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig, Head
from tiny_blip import SIZE, TINY, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def make(heads: tuple[Head, ...] = ("itc", "itm", "lm"), sharing: Any = "all_but_sa") -> BlipCheckpoint:
    text = {**TINY.to_dict()["text"], "vocab_size": TOKENIZER.vocab_size, "sharing": sharing}
    config = BlipConfig.from_dict({**TINY.to_dict(), "text": text, "heads": heads})
    torch.manual_seed(0)
    return BlipCheckpoint(
        Blip(config), TOKENIZER, Preprocessing(image_size=SIZE, mean=(0.1, 0.2, 0.3)), "a picture of "
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_blip(tmp_path, make())
    return tmp_path


@pytest.mark.parametrize("heads", [("itc", "itm", "lm"), ("lm",), ("itc", "itm")])
@pytest.mark.parametrize("sharing", ["all", "all_but_sa", "none"])
def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, heads: tuple[Head, ...], sharing: str) -> None:
    saved = make(heads, sharing)
    save_blip(tmp_path, saved)
    loaded = load_blip(tmp_path)
    assert loaded.model.config == saved.model.config
    assert loaded.preprocessing == saved.preprocessing
    assert loaded.prompt == "a picture of "
    assert not loaded.model.training
    state = loaded.model.state_dict()
    assert state.keys() == saved.model.state_dict().keys()
    for name, value in saved.model.state_dict().items():
        assert torch.equal(state[name], value), name
    texts = ["a red dog", "Two blue Cars!"]
    assert torch.equal(loaded.tokenizer.encode(texts).ids, saved.tokenizer.encode(texts).ids)


def test_the_caller_may_name_other_words(folder: Path, tmp_path: Path) -> None:
    other = Tokenizer.train(["a green cat", "a green cat"], vocab_size=112)
    other.save(tmp_path / "other")
    assert load_blip(folder).tokenizer.to_json() == TOKENIZER.to_json()
    assert load_blip(folder, tokenizer=tmp_path / "other").tokenizer.to_json() == other.to_json()


def test_weights_keep_their_precision_on_disk_and_come_back_as_float32(tmp_path: Path) -> None:
    saved = make()
    saved.model.bfloat16()
    save_blip(tmp_path, saved)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    loaded = load_blip(tmp_path).model
    for name, value in saved.model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], value.float())


def test_a_checkpoint_can_be_saved_over_itself(folder: Path) -> None:
    loaded = load_blip(folder)
    save_blip(folder, loaded)
    for name, value in load_blip(folder).model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name])


def test_a_folder_whose_writing_was_killed_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for step in ("checkpoints.state_dict.save_file", "files.os.replace", "files.json.dumps"):
        monkeypatch.setattr(f"openblip.{step}", die)
        with pytest.raises(KeyboardInterrupt):
            save_blip(tmp_path / step, make())
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match="is no checkpoint"):
            load_checkpoint(tmp_path / step)


def test_saving_leaves_the_model_alone(tmp_path: Path) -> None:
    checkpoint = make()
    before = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    save_blip(tmp_path, checkpoint)
    for name, value in checkpoint.model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def large_tokenizer() -> Tokenizer:
    """One with more words than the model knows."""
    tokenizer = Tokenizer.train([f"word{a}{b}" for a in "abcdefgh" for b in "abcdefgh"] * 2, vocab_size=400)
    assert tokenizer.vocab_size > TOKENIZER.vocab_size
    return tokenizer


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: edit_weights(f, lambda w: w.pop("itm_head.bias")),
            r"model\.safetensors.*missing itm_head\.bias",
        ),
        (lambda f: edit_weights(f, lambda w: w.update(extra=torch.zeros(1))), "left over extra"),
        (
            lambda f: edit_weights(f, lambda w: w.update({"itm_head.bias": torch.zeros(3)})),
            r"itm_head\.bias is \(3,\), the config says \(2,\)",
        ),
        (lambda f: truncate(f / "model.safetensors"), r"model\.safetensors cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), r"no .*model\.safetensors"),
        (lambda f: (f / "config.json").unlink(), r"no .*config\.json"),
        (lambda f: truncate(f / "config.json"), r"config\.json cannot be read"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), r"config\.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[1]"), r"config\.json holds list where a JSON object"),
        (lambda f: edit_config(f, lambda c: c.pop("format")), "not an OpenBLIP checkpoint"),
        (lambda f: edit_config(f, lambda c: c.pop("model")), r"config\.json.*model.*another version"),
        (lambda f: edit_config(f, lambda c: c.update(model=None)), r"config\.json.*another version"),
        (lambda f: edit_config(f, lambda c: c["model"]["text"].update(depth=3)), r"config\.json.*depth"),
        (
            lambda f: edit_config(f, lambda c: c["model"]["vision"].update(num_heads=5)),
            r"config\.json.*5 heads",
        ),
        (lambda f: edit_config(f, lambda c: c["preprocessing"].update(crop=1)), r"config\.json.*crop"),
        (lambda f: edit_config(f, lambda c: c["preprocessing"].update(image_size=30)), "image_size 30"),
        (lambda f: (f / "tokenizer.json").write_text("{"), r"tokenizer\.json"),
        (lambda f: [(f / name).unlink() for name in ("tokenizer.json", "vocab.txt")], "tokenizer.json"),
        (lambda f: large_tokenizer().save(f), r"tokenizer has \d+ entries, .*the model \d+"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_blip(folder)


class Exploit:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pickle_is_refused_and_runs_no_code(folder: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Exploit(folder / "exploited")))
    with pytest.raises(CheckpointError, match=name):
        load_blip(folder)
    assert not (folder / "exploited").exists()


def test_no_source_file_loads_pickles_carelessly() -> None:
    """Every torch.load says weights_only=True, and no other unpickler is used."""
    package = Path(openblip.__file__).parent
    for path in package.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert source.count("torch.load(") == source.count("weights_only=True"), path
        assert "weights_only=False" not in source, path
        assert "pickle.load" not in source, path


@pytest.mark.parametrize("source", ["./absent/folder", "openblip-giant"])
def test_load_says_what_can_be_loaded(source: str) -> None:
    with pytest.raises(CheckpointError, match=f"{source} is no checkpoint"):
        openblip.load(source)
