"""Our layers, modes and checkpoints against transformers' BLIP: tiny, random, float32, unusual sizes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import parity_cases as cases
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.blip import configuration_blip, modeling_blip, modeling_blip_text

from openblip.checkpoints import backbones
from openblip.checkpoints.loading import load_checkpoint, save_checkpoint
from openblip.checkpoints.original import TRAINING_ONLY
from openblip.checkpoints.state_dict import Layout, Table, translate
from openblip.nn.config import TextConfig, VisionConfig
from openblip.nn.text_transformer import TextTransformer
from openblip.nn.vit import VisionTransformer
from released_files import KINDS, TEXT_DIM, released_file
from tiny_blip import random_pixels, random_tokens, randomise

pytestmark = pytest.mark.slow

VISION = VisionConfig(  # an odd grid of 5, three heads
    image_size=40, patch_size=8, hidden_dim=36, num_layers=3, num_heads=3, mlp_dim=52, layer_norm_eps=1e-3
)
TEXT = TextConfig(
    vocab_size=60, hidden_dim=24, num_layers=2, num_heads=3, mlp_dim=44, max_positions=20, dropout=0.0,
    layer_norm_eps=1e-2,
)  # fmt: skip
DERIVED = ("embeddings.position_ids", "cls.predictions.decoder.")  # tied to another weight, or computed


def copy_weights(theirs: nn.Module, ours: nn.Module, table: Table, prefix: str = "") -> None:
    """Load `theirs`, whose names begin with `prefix`, into `ours`; the table must name all of both."""
    given = {name.removeprefix(prefix): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(translate(Layout(table, DERIVED), given, set(ours.state_dict()), "theirs"))


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.std() > 1e-2  # something is compared
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("size", [40, 24, 56])
def test_vision_model(size: int, eps: float) -> None:
    config = replace(VISION, layer_norm_eps=eps)
    settings = {theirs: getattr(config, ours) for ours, theirs in backbones.HF_VISION_SETTINGS.items()}
    theirs = modeling_blip.BlipVisionModel(configuration_blip.BlipVisionConfig(**settings)).eval()
    randomise(theirs, seed=0)
    ours = VisionTransformer(config).eval()
    copy_weights(theirs, ours, backbones.HF_VISION_KEYS)
    pixels = random_pixels(2, size=size)
    expected = theirs(pixel_values=pixels, interpolate_pos_encoding=size != 40).last_hidden_state
    assert_equal(ours(pixels), expected)


def text_config() -> configuration_blip.BlipTextConfig:
    settings: dict[str, Any] = {theirs: getattr(TEXT, ours) for ours, theirs in backbones.HF_TEXT_SETTINGS.items()}
    return configuration_blip.BlipTextConfig(**settings, encoder_hidden_size=36, attention_probs_dropout_prob=0.0)


def text_transformer(mode: str) -> TextTransformer:
    return TextTransformer(TEXT, context_dims={mode: VISION.hidden_dim}, modes=(mode,)).eval()


def image_tokens(count: int) -> Tensor:
    return torch.randn(count, 7, VISION.hidden_dim, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
@pytest.mark.parametrize("with_image", [False, True], ids=["unimodal", "image-grounded"])
def test_text_encoder(with_image: bool) -> None:
    theirs = modeling_blip_text.BlipTextModel(text_config(), add_pooling_layer=False).eval()
    randomise(theirs, seed=1)
    ours = text_transformer("encode")
    copy_weights(theirs, ours, backbones.BERT_TEXT_KEYS)
    texts, images = random_tokens([9, 4, 6]), image_tokens(3) if with_image else None
    expected = theirs(input_ids=texts.ids, attention_mask=texts.mask.long(), encoder_hidden_states=images)
    kv = None if images is None else ours.context_kv(images, "encode")
    states = ours(texts.ids, "encode", mask=texts.mask, context_kv=kv)
    assert_equal(states[texts.mask], expected.last_hidden_state[texts.mask])


@torch.no_grad()
def test_text_decoder_logits() -> None:
    theirs = modeling_blip_text.BlipTextLMHeadModel(text_config()).eval()
    randomise(theirs, seed=2)
    ours = text_transformer("decode")
    copy_weights(theirs, ours, {**backbones.BERT_TEXT_KEYS, **backbones.BERT_LM_HEAD_KEYS}, prefix="bert.")
    texts, images = random_tokens([8, 5]), image_tokens(2)
    mask = texts.mask.long()
    expected = theirs(input_ids=texts.ids, attention_mask=mask, encoder_hidden_states=images, is_decoder=True).logits
    hidden = ours(texts.ids, "decode", mask=texts.mask, context_kv=ours.context_kv(images, "decode"))
    assert_equal(ours.predict_words(hidden)[texts.mask], expected[texts.mask])


def test_gradients_of_matching(tmp_path: Path) -> None:
    """The scores themselves are compared below, with those of all classes."""
    theirs = cases.write_theirs(tmp_path, "BlipForImageTextRetrieval")
    ours = load_checkpoint(tmp_path).model
    texts = random_tokens([5, 8])
    pixels = [random_pixels(2, size=40).requires_grad_() for _ in range(2)]
    scores = theirs(texts.ids, pixels[0], attention_mask=texts.mask.long(), use_itm_head=True).itm_score
    scores[:, 1].sum().backward()
    kv = ours.image_kv(ours.encode_image(pixels[1]), "encode")
    ours.match_logits(texts.ids, texts.mask, kv)[:, 1].sum().backward()
    torch.testing.assert_close(pixels[1].grad, pixels[0].grad, atol=1e-5, rtol=1e-4)


# ---- every class of transformers and every released .pth, read and written


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
