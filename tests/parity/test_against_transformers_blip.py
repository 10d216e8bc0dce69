"""Our layers and modes against transformers' BLIP: tiny, random, float32, unusual sizes."""

from dataclasses import replace

import pytest
import torch
from copied_weights import copy_weights
from torch import Tensor
from transformers.models.blip import configuration_blip, modeling_blip, modeling_blip_text

from openblip.checkpoints.backbones import BERT_LM_HEAD_KEYS, BERT_TEXT_KEYS, HF_VISION_KEYS
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig, TextConfig, VisionConfig
from openblip.nn.text_transformer import TextTransformer
from openblip.nn.vit import VisionTransformer
from tiny_blip import random_pixels, random_tokens, randomise

VISION_CONFIG = VisionConfig(  # an odd grid of 5, three heads
    image_size=40, patch_size=8, hidden_dim=36, num_layers=3, num_heads=3, mlp_dim=52, layer_norm_eps=1e-3
)
TEXT_CONFIG = TextConfig(
    vocab_size=60, hidden_dim=24, num_layers=2, num_heads=3, mlp_dim=44, max_positions=20, dropout=0.0,
    layer_norm_eps=1e-2,
)  # fmt: skip


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.std() > 1e-2  # something is compared
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def vision_config(config: VisionConfig = VISION_CONFIG) -> configuration_blip.BlipVisionConfig:
    return configuration_blip.BlipVisionConfig(
        hidden_size=config.hidden_dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        layer_norm_eps=config.layer_norm_eps,
    )


def text_config(config: TextConfig = TEXT_CONFIG, image_dim: int = 36) -> configuration_blip.BlipTextConfig:
    return configuration_blip.BlipTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_dim,
        encoder_hidden_size=image_dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_positions,
        layer_norm_eps=config.layer_norm_eps,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("size", [40, 24, 56])
def test_vision_model(size: int, eps: float) -> None:
    config = replace(VISION_CONFIG, layer_norm_eps=eps)
    theirs = modeling_blip.BlipVisionModel(vision_config(config)).eval()
    randomise(theirs, seed=0)
    ours = VisionTransformer(config).eval()
    copy_weights(theirs, ours, HF_VISION_KEYS)
    pixels = random_pixels(2, size=size)
    expected = theirs(pixel_values=pixels, interpolate_pos_encoding=size != 40).last_hidden_state
    assert_equal(ours(pixels), expected)


def text_transformer(mode: str) -> TextTransformer:
    dims = {mode: VISION_CONFIG.hidden_dim}
    return TextTransformer(TEXT_CONFIG, context_dims=dims, modes=(mode,)).eval()


def image_tokens(count: int) -> Tensor:
    return torch.randn(count, 7, VISION_CONFIG.hidden_dim, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
@pytest.mark.parametrize("with_image", [False, True], ids=["unimodal", "image-grounded"])
def test_text_encoder(with_image: bool) -> None:
    theirs = modeling_blip_text.BlipTextModel(text_config(), add_pooling_layer=False).eval()
    randomise(theirs, seed=1)
    ours = text_transformer("encode")
    copy_weights(theirs, ours, BERT_TEXT_KEYS)
    texts, images = random_tokens([9, 4, 6]), image_tokens(3) if with_image else None
    expected = theirs(
        input_ids=texts.ids, attention_mask=texts.mask.long(), encoder_hidden_states=images
    ).last_hidden_state
    kv = None if images is None else ours.context_kv(images, "encode")
    found = ours(texts.ids, "encode", mask=texts.mask, context_kv=kv)
    assert_equal(found[texts.mask], expected[texts.mask])


@torch.no_grad()
def test_text_decoder_logits() -> None:
    theirs = modeling_blip_text.BlipTextLMHeadModel(text_config()).eval()
    randomise(theirs, seed=2)
    ours = text_transformer("decode")
    copy_weights(theirs, ours, {**BERT_TEXT_KEYS, **BERT_LM_HEAD_KEYS}, prefix="bert.")
    texts, images = random_tokens([8, 5]), image_tokens(2)
    expected = theirs(
        input_ids=texts.ids, attention_mask=texts.mask.long(), encoder_hidden_states=images, is_decoder=True
    ).logits
    hidden = ours(texts.ids, "decode", mask=texts.mask, context_kv=ours.context_kv(images, "decode"))
    assert_equal(ours.predict_words(hidden)[texts.mask], expected[texts.mask])


@pytest.fixture(scope="module")
def retrieval_models() -> tuple[Blip, modeling_blip.BlipForImageTextRetrieval]:
    """The same weights in ours and theirs; text narrower than vision."""
    config = configuration_blip.BlipConfig(
        text_config=text_config().to_dict(), vision_config=vision_config().to_dict(), image_text_hidden_size=10
    )
    theirs = modeling_blip.BlipForImageTextRetrieval(config).eval()
    randomise(theirs, seed=3)
    ours = Blip(BlipConfig(vision=VISION_CONFIG, text=TEXT_CONFIG, embed_dim=10, heads=("itc", "itm"))).eval()
    copy_weights(theirs.vision_model, ours.vision, HF_VISION_KEYS)
    copy_weights(theirs.text_encoder, ours.text, BERT_TEXT_KEYS)
    for name in ("vision_proj", "text_proj", "itm_head"):
        getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    return ours, theirs


@torch.no_grad()
def test_matching_logits(retrieval_models: tuple[Blip, modeling_blip.BlipForImageTextRetrieval]) -> None:
    ours, theirs = retrieval_models
    texts, pixels = random_tokens([5, 8, 6]), random_pixels(3, size=40)
    expected = theirs(
        input_ids=texts.ids, attention_mask=texts.mask.long(), pixel_values=pixels, use_itm_head=True
    ).itm_score
    kv = ours.image_kv(ours.encode_image(pixels), "encode")
    assert_equal(ours.match_logits(texts.ids, texts.mask, kv), expected)


@torch.no_grad()
def test_contrastive_similarity(retrieval_models: tuple[Blip, modeling_blip.BlipForImageTextRetrieval]) -> None:
    ours, theirs = retrieval_models
    texts, pixels = random_tokens([5, 8, 6, 3]), random_pixels(2, size=40)
    expected = theirs(
        input_ids=texts.ids, attention_mask=texts.mask.long(), pixel_values=pixels, use_itm_head=False
    ).itm_score
    image = ours.embed_image(ours.encode_image(pixels))
    assert_equal(image @ ours.embed_text(texts.ids, texts.mask).T, expected)


def test_gradients_of_matching(retrieval_models: tuple[Blip, modeling_blip.BlipForImageTextRetrieval]) -> None:
    ours, theirs = retrieval_models
    texts = random_tokens([5, 8])
    pixels = [random_pixels(2, size=40).requires_grad_() for _ in range(2)]
    theirs(input_ids=texts.ids, attention_mask=texts.mask.long(), pixel_values=pixels[0], use_itm_head=True).itm_score[
        :, 1
    ].sum().backward()
    kv = ours.image_kv(ours.encode_image(pixels[1]), "encode")
    ours.match_logits(texts.ids, texts.mask, kv)[:, 1].sum().backward()
    torch.testing.assert_close(pixels[1].grad, pixels[0].grad, atol=1e-5, rtol=1e-4)
