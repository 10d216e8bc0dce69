"""OpenBLIP's folders of BLIP-2: they come back as they were, whole or not at all, and damage is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.checkpoints.loading import load_checkpoint
from openblip.checkpoints.native import load_blip2, save_blip2
from openblip.errors import CheckpointError
from openblip.models.language_model import wrap_language_model
from tiny_blip import random_pixels, tiny_tokenizer
from tiny_blip2 import tiny_blip2

KINDS: dict[str, Callable[[], Blip2Checkpoint]] = {
    "stage 1": lambda: tiny_blip2(),
    "stage 1 around a tower": lambda: tiny_blip2(tower=True),
    "stage 2, OPT": lambda: tiny_blip2((), "opt"),
    "stage 2, T5": lambda: tiny_blip2((), "t5"),
    "all heads": lambda: tiny_blip2(language="opt", tower=True),
    "instructed": lambda: tiny_blip2((), "t5", instructed=True),
}


def parts_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts that a folder can have. To be copied, not changed."""
    folder = tmp_path_factory.mktemp("written") / "blip2"
    save_blip2(folder, KINDS["all heads"]())
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "blip2"))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, kind: str) -> None:
    before = KINDS[kind]()
    save_blip2(tmp_path, before)
    after = load_checkpoint(tmp_path)
    assert isinstance(after, Blip2Checkpoint)
    assert after.model.config == before.model.config
    assert after[2:] == before[2:]
    expected = before.model.state_dict()
    assert after.model.state_dict().keys() == expected.keys()
    for name, tensor in after.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert not after.model.training
    assert (after.tokenizer is None) == (before.tokenizer is None)
    if before.tokenizer is not None and after.tokenizer is not None:
        assert after.tokenizer.to_json() == before.tokenizer.to_json()
    assert written_by(after) == written_by(before)


def adapted() -> Blip2Checkpoint:
    """With LoRA adapters that change what the language model says."""
    import peft

    checkpoint = KINDS["stage 2, OPT"]()
    assert checkpoint.model.language is not None
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(checkpoint.model.language.model, settings).eval()
    checkpoint.model.language = wrap_language_model(model, checkpoint.model.language.tokenizer)
    return checkpoint


@torch.no_grad()
def test_adapters_come_back_beside_the_model_that_they_adapt(tmp_path: Path) -> None:
    plain, before = KINDS["stage 2, OPT"](), adapted()
    state = {name: tensor.clone() for name, tensor in before.model.state_dict().items()}
    save_blip2(tmp_path, before)
    after = load_blip2(tmp_path)
    assert after.model.state_dict().keys() == state.keys()
    for name, tensor in after.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert torch.equal(before.model.state_dict()[name], tensor), name  # saving left it alone
    visual = torch.randn(1, 4, 16)
    logits = [
        c.model.language.predict(visual, ["a"], ["dog"], 8).logits
        for c in (before, after, plain)
        if c.model.language is not None
    ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])

    shutil.rmtree(tmp_path / "language_model" / "adapter")  # what is left is the model as it was
    own = load_blip2(tmp_path).model.state_dict()
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(own[name], tensor), name


def test_damaged_adapters_are_named(tmp_path: Path) -> None:
    save_blip2(tmp_path, adapted())
    weights = tmp_path / "language_model" / "adapter" / "adapter_model.safetensors"
    edit_weights(weights, lambda w: w.pop(sorted(w)[0]))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors .*missing base_model.*lora_A"):
        load_blip2(tmp_path)
    truncate(weights)
    with pytest.raises(CheckpointError, match="adapter does not hold adapters"):
        load_blip2(tmp_path)


def written_by(checkpoint: Blip2Checkpoint) -> tuple[list[float], list[list[int]]]:
    """What a model's queries are for two pictures, and what its language model goes on with."""
    model = checkpoint.model
    queries = model.encode_queries(model.image_kv(model.encode_image(random_pixels(2)))).queries
    if model.language is None:
        return queries.flatten().tolist(), []
    visual, prompts = model.visual_prompts(queries), ["a photo", "Question: why?"]
    ids = model.language.generate(visual, prompts, max_new_tokens=6, do_sample=False)
    return queries.flatten().tolist(), ids


def test_where_what_is_written(written: Path, tmp_path: Path) -> None:
    words = {"tokenizer.json", "vocab.txt"}
    assert parts_of(written) == {
        "config.json", "model.safetensors", "language_model", "vision_model", *words,
    }  # fmt: skip
    own = load_file(written / "model.safetensors")
    assert not any(name.startswith(("language.", "vision.")) for name in own)
    save_blip2(tmp_path / "stage2", KINDS["stage 2, OPT"]())
    assert parts_of(tmp_path / "stage2") == {"config.json", "model.safetensors", "language_model"}
    own = load_file(tmp_path / "stage2" / "model.safetensors")
    assert any(name.startswith("vision.") for name in own)  # our own ViT
    assert not any(name.startswith("language.") for name in own)


def test_every_part_keeps_its_precision_on_disk_and_is_read_as_float32(tmp_path: Path) -> None:
    before = KINDS["all heads"]()
    assert before.model.language is not None
    before.model.language.to(torch.bfloat16)
    before.model.vision.half()
    save_blip2(tmp_path, before)
    for name, dtype in (
        ("language_model/model.safetensors", torch.bfloat16),
        ("vision_model/model.safetensors", torch.float16),
        ("model.safetensors", torch.float32),
    ):
        assert {tensor.dtype for tensor in load_file(tmp_path / name).values()} == {dtype}, name
    after = load_blip2(tmp_path).model.state_dict()
    for name, tensor in before.model.state_dict().items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], tensor.float()), name


def test_a_checkpoint_can_be_saved_over_itself(folder: Path) -> None:
    loaded = load_blip2(folder)
    save_blip2(folder, loaded)
    again = load_blip2(folder).model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("step", ["checkpoints.state_dict.save_file", "files.os.replace", "files.json.dumps"])
def test_a_folder_whose_writing_was_killed_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    checkpoint = KINDS["stage 2, OPT"]()
    monkeypatch.setattr(f"openblip.{step}", die)
    with pytest.raises(KeyboardInterrupt):
        save_blip2(tmp_path / "new", checkpoint)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="new is no checkpoint"):
        load_checkpoint(tmp_path / "new")
    save_blip2(tmp_path / "new", checkpoint)  # what was left there does not disturb
    assert parts_of(tmp_path / "new") == {"config.json", "model.safetensors", "language_model"}
    load_blip2(tmp_path / "new")


def test_the_caller_may_name_other_words(folder: Path, tmp_path: Path) -> None:
    other = type(tiny_tokenizer()).train(["a green cat", "a green cat"], vocab_size=112)
    other.save(tmp_path / "other")
    words = load_checkpoint(folder, tokenizer=tmp_path / "other").tokenizer
    assert words is not None
    assert words.to_json() == other.to_json()


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


OWN, LANGUAGE, TOWER = (f"{part}model.safetensors" for part in ("", "language_model/", "vision_model/"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_weights(f / OWN, lambda w: w.pop("itm_head.bias")), "missing itm_head.bias"),
        (lambda f: edit_weights(f / OWN, lambda w: w.update(extra=torch.zeros(1))), "left over extra"),
        (
            lambda f: edit_weights(f / OWN, lambda w: w.update({"itm_head.bias": torch.zeros(3)})),
            r"itm_head\.bias is \(3,\), the config says \(2,\)",
        ),
        (
            lambda f: edit_weights(f / OWN, lambda w: w.update({"language.x": torch.zeros(3)})),
            r"left over language\.x",
        ),
        (lambda f: truncate(f / OWN), r"model\.safetensors cannot be read"),
        (lambda f: (f / OWN).unlink(), r"no .*model\.safetensors"),
        (lambda f: truncate(f / "config.json"), r"config\.json cannot be read"),
        (lambda f: edit_config(f, lambda c: c.pop("model")), r"config\.json.*model.*another version"),
        (lambda f: edit_config(f, lambda c: c.pop("question_prompt")), r"config\.json.*another version"),
        (lambda f: edit_config(f, lambda c: c["model"].update(depth=3)), "unknown are depth"),
        (lambda f: edit_config(f, lambda c: c["model"].update(heads=["x"])), "heads"),
        (lambda f: edit_config(f, lambda c: c["model"]["qformer"].update(num_heads=5)), "5 heads"),
        (lambda f: edit_config(f, lambda c: c["model"]["language"].update(hidden_dim=8)), "16 wide"),
        (lambda f: edit_config(f, lambda c: c["model"]["vision"].update(layer=-9)), "no layer -9"),
        (lambda f: edit_config(f, lambda c: c["preprocessing"].update(crop=1)), r"config\.json.*crop"),
        (lambda f: (f / "tokenizer.json").write_text("{"), r"tokenizer\.json"),
        (lambda f: shutil.rmtree(f / "language_model"), "language_model"),
        (lambda f: shutil.rmtree(f / "vision_model"), "vision_model"),
        (lambda f: truncate(f / LANGUAGE), "language_model cannot be read"),
        (lambda f: truncate(f / TOWER), "vision_model cannot be read"),
        (lambda f: (f / "language_model" / "config.json").write_text("{"), "language_model"),
        (
            lambda f: [path.unlink() for path in (f / "language_model").glob("token*")],
            "language_model has no vocabulary",
        ),
        (
            lambda f: edit_weights(f / LANGUAGE, lambda w: w.pop("model.decoder.layers.0.fc1.bias")),
            r"language_model lacks weights .*layers\.0\.fc1\.bias",
        ),
        (
            lambda f: edit_weights(f / TOWER, lambda w: [w.pop(name) for name in list(w) if "fc1" in name]),
            r"vision_model lacks weights .*layers\.0\.mlp\.fc1\.bias",
        ),
    ],
)  # fmt: skip
def test_damage_is_named(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_blip2(folder)
