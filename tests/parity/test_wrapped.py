"""Weights as trainings leave them: below an entry of a larger file, with prefixes of wrappers, as adapters of peft."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blip2_cases as blip2
import parity_cases as cases
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import openblip
from damaged_files import assert_same_weights
from openblip.checkpoints import backbones
from openblip.checkpoints.loading import load_checkpoint, load_image_encoder
from openblip.errors import CheckpointError, ConfigError
from released_files import TOKENIZER, released_file
from tiny_blip2 import tiny_language_model

pytestmark = pytest.mark.slow

State = dict[str, Tensor]


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def compiled_parts(state: State) -> State:
    """As of a model whose image encoder alone is compiled."""
    return {name.replace("visual_encoder.", "visual_encoder._orig_mod."): t for name, t in state.items()}


WRAPPED: dict[str, Callable[[State], Any]] = {
    "DDP": lambda state: prefixed("module.", state),
    "torch.compile": lambda state: {"model": prefixed("_orig_mod.", state)},
    "DDP, compiled": lambda state: {"model": prefixed("module._orig_mod.", state), "epoch": 3},
    "a compiled part": lambda state: {"model_state_dict": prefixed("module.", compiled_parts(state))},
    "Lightning": lambda state: {
        "state_dict": prefixed("model.", state),
        "hyper_parameters": {"lr": 1e-4, "options": argparse.Namespace(seed=1)},
        "pytorch-lightning_version": "2.5.0",
    },
    "Lightning, another name": lambda state: {"state_dict": prefixed("captioner.", state)},
    "Lightning, compiled": lambda state: {"state_dict": prefixed("model._orig_mod.", state), "optimizer_states": []},
    "DeepSpeed": lambda state: {"module": prefixed("module.", state), "ds_config": {}},
    "twice": lambda state: {"model": {"state_dict": state}},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_released_file_in_wrappers(tmp_path: Path, wrap: Callable[[State], Any]) -> None:
    """Momentum copies and queues of the training, which are wrapped too, are left out."""
    state = released_file("retrieval")
    TOKENIZER.save(tmp_path)
    torch.save({"model": state}, tmp_path / "plain.pth")
    torch.save(wrap(state), tmp_path / "wrapped.ckpt")
    assert_same_weights(load_checkpoint(tmp_path / "wrapped.ckpt").model, load_checkpoint(tmp_path / "plain.pth").model)


def test_a_released_file_as_safetensors(tmp_path: Path) -> None:
    state = released_file("captions")
    TOKENIZER.save(tmp_path)
    torch.save(state, tmp_path / "plain.pth")
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    found, expected = (load_checkpoint(tmp_path / name).model for name in ("model.safetensors", "plain.pth"))
    assert_same_weights(found, expected)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_a_folder_of_transformers_with_prefixes(tmp_path: Path, prefix: str) -> None:
    theirs = cases.write_theirs(tmp_path, "BlipForConditionalGeneration")
    expected = load_checkpoint(tmp_path).model
    save_file(prefixed(prefix, load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors")
    assert_same_weights(load_checkpoint(tmp_path).model, expected)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"state_dict": prefixed(prefix, theirs.state_dict())}, tmp_path / "pytorch_model.bin")
    assert_same_weights(load_checkpoint(tmp_path).model, expected)


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_file_beside_the_config_that_describes_it(tmp_path: Path, is_ours: bool) -> None:
    """A LightningModule around a model of transformers, or of OpenBLIP; without the config the error says so."""
    if is_ours:
        openblip.load("openblip-mini-captioner").save(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
    else:
        state = cases.write_theirs(tmp_path, "BlipForConditionalGeneration").state_dict()
    expected = load_checkpoint(tmp_path).model
    (tmp_path / "model.safetensors").unlink()
    torch.save({"state_dict": prefixed("model.", {k: t.half() for k, t in state.items()})}, tmp_path / "last.ckpt")
    found = load_checkpoint(tmp_path / "last.ckpt").model
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.half().float()), name
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"begin with .*put its config\.json"):
        load_checkpoint(tmp_path / "last.ckpt")


def test_backbones_with_prefixes(tmp_path: Path) -> None:
    language = tiny_language_model("opt")
    backbones.save_language_model(tmp_path / "opt", language)
    transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8, image_size=32, patch_size=8
        )
    ).save_pretrained(tmp_path / "clip")
    encoder = load_image_encoder(tmp_path / "clip")
    for name in ("opt", "clip"):
        file = tmp_path / name / "model.safetensors"
        save_file(prefixed("module._orig_mod.", load_file(file)), file, metadata={"format": "pt"})
    assert_same_weights(backbones.load_language_model(tmp_path / "opt").model, language.model)
    assert_same_weights(load_image_encoder(tmp_path / "clip").model, encoder.model)


# ---- adapters


def adapted(folder: Path, language: Any, *, whole: bool, safe: bool) -> Any:
    """A BLIP-2 of transformers in `folder`/base, with LoRA of `folder`/adapter on all of it or its language model."""
    peft = pytest.importorskip("peft")
    theirs = blip2.their_model("Blip2ForConditionalGeneration", language)
    blip2.write_theirs(folder / "base", theirs, language)
    targets, trained = ["q_proj", "v_proj"] if language == "opt" else ["q", "v"], ["language_projection"]
    settings = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=trained if whole else None)
    model = peft.get_peft_model(theirs if whole else theirs.language_model, settings)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        assert parameter.requires_grad == ("lora_" in name or "modules_to_save" in name)
    model.save_pretrained(folder / "adapter", safe_serialization=safe)
    name_base(folder, str(folder / "base"))
    merged = model.merge_and_unload()
    if not whole:
        theirs.language_model = merged
    return theirs.eval()


def name_base(folder: Path, base: str | None) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


@pytest.mark.parametrize(("language", "whole", "safe"), [("opt", True, True), ("t5", False, False)])
def test_adapters_of_a_blip2(tmp_path: Path, language: Any, whole: bool, safe: bool) -> None:
    expected = blip2.their_outputs(adapted(tmp_path, language, whole=whole, safe=safe), language)
    cases.assert_same(blip2.our_outputs(load_checkpoint(tmp_path / "adapter")), expected)
    if not whole:  # they stay apart from the language model, and can be trained on
        checkpoint = load_checkpoint(tmp_path / "base", language_model=tmp_path / "adapter")
        found = blip2.our_outputs(checkpoint)
        torch.testing.assert_close(found.scores["llm"], expected.scores["llm"], atol=1e-4, rtol=1e-5)
        assert found.texts == expected.texts
        assert backbones.has_lora(checkpoint.model.require_language())


def test_adapters_of_a_blip(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = cases.write_theirs(tmp_path / "base", "BlipForConditionalGeneration")
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["query", "qkv"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    name_base(tmp_path, str(tmp_path / "base"))
    expected = cases.their_outputs(model.merge_and_unload().eval())
    cases.assert_same(cases.our_outputs(load_checkpoint(tmp_path / "adapter")), expected)


def test_adapters_of_a_language_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    language = tiny_language_model("opt")
    backbones.save_language_model(tmp_path / "base", language)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(language.model, settings).save_pretrained(tmp_path / "adapter")
    name_base(tmp_path, str(tmp_path / "base"))
    assert backbones.has_lora(backbones.load_language_model(tmp_path / "adapter"))


def test_a_model_of_adapters_is_whole_and_named_once(tmp_path: Path) -> None:
    """What the folder lacks is no random start, and no part is named that has no effect."""
    adapted(tmp_path, "opt", whole=True, safe=True)
    with pytest.raises(ConfigError, match="leave eva out"):
        load_checkpoint(tmp_path / "adapter", vision="eva")
    file = tmp_path / "base" / "model.safetensors"
    state = load_file(file)
    del state["language_model.model.decoder.layers.1.fc1.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"base does not .* missing language_model\..*layers\.1\.fc1\.weight"):
        load_checkpoint(tmp_path / "adapter")


def test_adapters_without_their_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(tmp_path, "opt", whole=True, safe=True)
    for base in (None, "", str(tmp_path / "nothing")):
        name_base(tmp_path, base)
        with pytest.raises(CheckpointError, match=r"adapter holds adapters of .* base_model_name_or_path"):
            load_checkpoint(tmp_path / "adapter")
    name_base(tmp_path, "owner/blip2")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"owner/blip2.*offline"):
        load_checkpoint(tmp_path / "adapter")
    cases.write_theirs(tmp_path / "blip", "BlipForConditionalGeneration")
    name_base(tmp_path, str(tmp_path / "blip"))
    with pytest.raises(CheckpointError, match=r"adapter does not hold adapters of its model") as caught:
        load_checkpoint(tmp_path / "adapter")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="has no language model"):
        load_checkpoint(tmp_path / "blip", language_model=tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no .*adapter_model\.safetensors"):
        load_checkpoint(tmp_path / "adapter")
