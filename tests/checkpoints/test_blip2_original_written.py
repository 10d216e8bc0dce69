"""BLIP-2 written as LAVIS' .pth: the released names and bits, and ours that come back whole."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from released_blip2 import (
    PIXELS,
    SIZE,
    STAGE2,
    TOKENIZER,
    Clip,
    Eva,
    encoder_of,
    encoder_state,
    language_model,
    language_words,
    saved,
    stage1,
    stage2,
    write,
    write_parts,
)

from damaged_files import assert_same_weights, edit_pth
from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.checkpoints.loading import load_checkpoint, save_checkpoint
from openblip.cli.main import main
from openblip.data.config import Preprocessing
from openblip.errors import CheckpointError, ConfigError
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, LanguageConfig, QFormerConfig, TowerConfig, VisionConfig
from openblip.models.language_model import wrap_language_model
from openblip.models.vision_tower import VisionTower
from tiny_blip import randomise

TOWER = {"name": "x", "hidden_dim": 24, "layer": -2}
LANGUAGE = {"name": "x", "hidden_dim": 4}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


Kind = type[Eva] | type[Clip]


@pytest.mark.parametrize("kind", [Eva, Clip])
def test_stage_1_is_written_as_it_was_read(tmp_path: Path, parts: Path, kind: Kind) -> None:
    """Names and bits, tied copies included; with the encoder, unless the model has it frozen."""
    theirs = stage1(kind)
    path = write(tmp_path / "x.pth", saved(theirs))
    checkpoint = load_checkpoint(path, vision=parts / f"{kind.__name__}.pth")
    save_checkpoint(checkpoint, tmp_path / "whole.pth", "original")
    written = torch.load(tmp_path / "whole.pth", weights_only=True)["model"]
    expected = theirs.state_dict()
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor, atol=0, rtol=1e-6 if name == "temp" else 0, msg=name)
    theirs.load_state_dict(written)

    checkpoint.model.freeze("vision")
    save_checkpoint(checkpoint, tmp_path / "trained.pth", "original")
    trained = torch.load(tmp_path / "trained.pth", weights_only=True)["model"]
    assert trained.keys() == saved(theirs).keys()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "instructed"), STAGE2)
def test_stage_2_is_written_as_it_was_read(tmp_path: Path, parts: Path, name: str, instructed: bool) -> None:
    theirs = stage2(name, instructed)
    path = write(tmp_path / "x.pth", saved(theirs))
    checkpoint = load_checkpoint(path, vision=parts / "Eva.pth", language_model=parts / name)
    save_checkpoint(checkpoint, tmp_path / "whole.pth", "original")
    written = torch.load(tmp_path / "whole.pth", weights_only=True)["model"]
    expected = {n: t for n, t in theirs.state_dict().items() if not n.startswith(f"{name}_model.")}
    assert written.keys() == expected.keys()
    for weight, tensor in expected.items():
        if not weight.endswith("position_ids"):  # of a text branch that stage 2 does not have
            assert torch.equal(written[weight], tensor), weight
    load_checkpoint(tmp_path / "whole.pth")  # knows where its language model is


def own(**changes: Any) -> Blip2Checkpoint:
    """One whose shapes do not tell its heads, and whose keys have a bias."""
    vision = VisionConfig(
        image_size=32, patch_size=8, hidden_dim=24, num_layers=2, num_heads=3, mlp_dim=20, output_norm=False,
    )  # fmt: skip
    qformer = QFormerConfig(
        num_queries=3, hidden_dim=20, num_layers=3, num_heads=5, mlp_dim=16, cross_attention_every=1,
        vocab_size=TOKENIZER.vocab_size, max_positions=20, dropout=0.0,
    )  # fmt: skip
    config = Blip2Config(vision=vision, qformer=qformer, embed_dim=7, vision_norm_eps=1e-6)
    model = Blip2(replace(config, **changes))
    randomise(model, seed=6)
    return Blip2Checkpoint(model.eval(), TOKENIZER, Preprocessing(image_size=24, mean=(0.1, 0.2, 0.3)), "a", "q {}")


@pytest.mark.parametrize("frozen", [False, True])
def test_ours_comes_back_whole(tmp_path: Path, frozen: bool) -> None:
    before = own()
    save_checkpoint(before, tmp_path / "whole.pth", "original")
    vision = None
    if frozen:
        before.model.freeze("vision")
        vision = tmp_path / "native"
        save_checkpoint(before, vision, "openblip")
    save_checkpoint(before, tmp_path / "new" / "ours.pth", "original")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ours.pth"]
    after = load_checkpoint(tmp_path / "new" / "ours.pth", vision=vision)
    assert isinstance(after, Blip2Checkpoint)
    assert after.model.config == before.model.config
    assert after[2:] == before[2:]
    assert after.tokenizer is not None
    assert after.tokenizer.to_json() == TOKENIZER.to_json()
    assert_same_weights(after.model, before.model, rounded=("log_temperature",))


@torch.no_grad()
def test_a_bias_of_keys_changes_nothing_for_the_released_code(tmp_path: Path) -> None:
    """Its encoder has none; so what it reads of our file computes the same without."""
    before = own()
    save_checkpoint(before, tmp_path / "x.pth", "original")
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    assert not any(name.endswith(".k_bias") for name in content["model"])
    edit_pth(tmp_path / "x.pth", lambda content: content["openblip"].pop("weights"))
    after = load_checkpoint(tmp_path / "x.pth")
    qkv = "vision.blocks.0.attention.qkv.bias"
    assert not torch.equal(after.model.state_dict()[qkv], before.model.state_dict()[qkv])
    ours, theirs = before.model.encode_image(PIXELS), after.model.encode_image(PIXELS)
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda entry: entry.pop("model"), "model"),
        (lambda entry: entry["model"].update(depth=3, vision=3), "its openblip entry"),
        (lambda entry: entry.update(tokenizer="{"), "its openblip entry"),
        (lambda entry: entry.update(weights=[1]), "holds no weights"),
        (lambda entry: entry["weights"].update(more=torch.ones(1)), "left over more"),
        (lambda entry: entry["model"].update(vision=TOWER), "another kind"),
        (lambda entry: entry["model"].update(heads=("llm",), language=LANGUAGE), "another kind"),
    ],
)  # fmt: skip
def test_a_damaged_entry_is_named(tmp_path: Path, damage: Callable[[dict[str, Any]], object], message: str) -> None:
    save_checkpoint(own(), tmp_path / "ours.pth", "original")
    edit_pth(tmp_path / "ours.pth", lambda content: damage(content["openblip"]))
    with pytest.raises(CheckpointError, match=rf"ours\.pth.*{message}"):
        load_checkpoint(tmp_path / "ours.pth")
    edit_pth(tmp_path / "ours.pth", lambda content: content.update(openblip="x"))
    with pytest.raises(CheckpointError, match="openblip entry is damaged"):
        load_checkpoint(tmp_path / "ours.pth")


def test_a_tower_is_left_out_and_found_again(tmp_path: Path) -> None:
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, patch_size=8,
        image_size=SIZE, hidden_act="relu",
    )  # fmt: skip
    tower = transformers.CLIPVisionModel(config).eval()
    tower.save_pretrained(tmp_path / "tower")
    transformers.CLIPImageProcessor(size=SIZE, crop_size=SIZE).save_pretrained(tmp_path / "tower")
    before = own()
    vision = TowerConfig(name=str(tmp_path / "tower"), hidden_dim=24)
    model = Blip2(replace(before.model.config, vision=vision), VisionTower(tower, -2)).eval()
    save_checkpoint(before._replace(model=model), tmp_path / "x.pth", "original")
    written = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    assert not any(name.startswith("visual_encoder.") for name in written)
    after = load_checkpoint(tmp_path / "x.pth")
    assert after.model.config == model.config
    assert torch.equal(after.model.encode_image(PIXELS), model.encode_image(PIXELS))


def with_language(kind: str, instructed: bool = False) -> Blip2Checkpoint:
    language = wrap_language_model(language_model(kind), language_words())
    before = own()
    config = replace(
        before.model.config, heads=("llm",), language=LanguageConfig(name="x", hidden_dim=16), instructed=instructed
    )
    return before._replace(model=Blip2(config, None, language).eval())


@pytest.mark.slow
def test_what_the_released_code_has_no_model_for(tmp_path: Path) -> None:
    import peft

    vision = own().model.config.vision
    adapted = with_language("opt")
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2)
    adapted.model.language.model = peft.get_peft_model(adapted.model.language.model, lora)
    for checkpoint, message in (
        (own(heads=("itc", "itm")), "heads itc, itm alone"),
        (own(vision=replace(vision, output_norm=True)), "without a last norm"),
        (own(vision=replace(vision, activation="quick_gelu")), "EVA-CLIP's or CLIP's"),
        (with_language("opt", instructed=True), "that reads instructions with the heads llm and a opt"),
        (adapted, "adapters in its language model"),
    ):
        with pytest.raises(CheckpointError, match=rf"released code has no BLIP-2 .*{message}.*Save as openblip"):
            save_checkpoint(checkpoint, tmp_path / "out.pth", "original")
    with pytest.raises(ConfigError, match=r"end with \.pth"):
        save_checkpoint(own(), tmp_path / "out", "original")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(own(), tmp_path / "x.pth", "original")
    before = (tmp_path / "x.pth").read_bytes()

    def half(content: Any, file: Any) -> None:
        file.write(before[:1000])
        raise OSError("No space left on device")

    monkeypatch.setattr("torch.save", half)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(own(), tmp_path / "x.pth", "original")
    assert (tmp_path / "x.pth").read_bytes() == before


def test_convert_there_and_back(tmp_path: Path, parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From LAVIS' file over our folder and transformers' to a .pth again, bit for bit."""
    theirs = write(tmp_path / "theirs.pth", saved(stage2("opt")))
    native, hub, again = tmp_path / "native", tmp_path / "hub", tmp_path / "again.pth"
    options = ["--vision", str(parts / "Eva.pth"), "--language-model", str(parts / "opt")]
    assert main(["convert", str(theirs), str(native), "--format", "openblip"]) == 2
    assert "--vision" in capsys.readouterr().err
    assert main(["convert", str(theirs), str(native), "--format", "openblip", *options]) == 0
    assert main(["convert", str(native), str(hub), "--format", "huggingface"]) == 0
    assert main(["convert", str(hub), str(again), "--format", "original"]) == 0
    first = torch.load(theirs, weights_only=True)["model"]
    last = torch.load(again, weights_only=True)["model"]
    for name, tensor in first.items():
        if not name.startswith("opt_model.") and not name.endswith("position_ids"):
            assert torch.equal(last[name], tensor), name
    encoder = encoder_of(encoder_state(Eva), Eva).state_dict()
    for name, tensor in encoder.items():
        assert torch.equal(last[f"visual_encoder.{name}"], tensor), name
