"""What `load` lets the caller choose: the first token of texts beside an image, the vocabulary, the dtype."""

from pathlib import Path

import pytest
import torch
from tiny_predictor import IMAGES, TEXTS, TOKENIZER, make_predictor

import openblip
from openblip.errors import CheckpointError, ConfigError
from openblip.predictor import BlipPredictor


@pytest.fixture(scope="module")
def predictor() -> BlipPredictor:
    return make_predictor("itc", "itm", "lm")


def test_the_first_token_can_be_chosen_and_is_kept(predictor: BlipPredictor, tmp_path: Path) -> None:
    predictor.save(tmp_path / "enc")
    plain = openblip.load(tmp_path / "enc", device="cpu", encoder_token="[CLS]")
    tokens = TOKENIZER.encode(["a dog"])  # from [CLS]
    with torch.no_grad():
        pixels = predictor.preprocessing.normalize(predictor.prepare(IMAGES[0]))
        kv = predictor.model.image_kv(predictor.model.encode_image(pixels), "encode")
        logits = predictor.model.match_logits(tokens.ids, tokens.mask, kv)
    torch.testing.assert_close(plain.match(IMAGES[0], "a dog"), logits.softmax(dim=1)[:, 1])
    assert not torch.allclose(plain.match(IMAGES, TEXTS), predictor.match(IMAGES, TEXTS), atol=1e-3)
    torch.testing.assert_close(plain.match_matrix(IMAGES, TEXTS).diagonal(), plain.match(IMAGES, TEXTS))

    plain.save(tmp_path / "cls")
    again = openblip.load(tmp_path / "cls", device="cpu")
    assert again.encoder_token == "[CLS]"
    assert torch.equal(again.match(IMAGES, TEXTS), plain.match(IMAGES, TEXTS))
    back = openblip.load(tmp_path / "cls", device="cpu", encoder_token="[ENC]")
    assert torch.equal(back.match(IMAGES, TEXTS), predictor.match(IMAGES, TEXTS))


def test_embeddings_of_texts_begin_with_cls_always(predictor: BlipPredictor) -> None:
    plain = make_predictor("itc", "itm", "lm", encoder_token="[CLS]")
    assert torch.equal(plain.embed_texts(TEXTS), predictor.embed_texts(TEXTS))


def test_another_first_token_is_refused(predictor: BlipPredictor, tmp_path: Path) -> None:
    predictor.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"\[ENC\] or \[CLS\], not with \[DEC\]"):
        openblip.load(tmp_path, device="cpu", encoder_token="[DEC]")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_results(predictor: BlipPredictor, tmp_path: Path, dtype: torch.dtype) -> None:
    predictor.save(tmp_path)
    half = openblip.load(tmp_path, device="cpu", dtype=dtype)
    for call in ("match", "match_matrix", "similarity"):
        found, exact = getattr(half, call)(IMAGES, TEXTS), getattr(predictor, call)(IMAGES, TEXTS)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, atol=0.15, rtol=0)
    assert half.embed_images(IMAGES).dtype == half.embed_texts(TEXTS).dtype == torch.float32
    assert len(half.caption(IMAGES)) == 5


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        openblip.load(tmp_path / "nowhere")


def test_the_precision_is_chosen_by_name(predictor: BlipPredictor, tmp_path: Path) -> None:
    predictor.save(tmp_path)
    for name in ("float32", "bfloat16", "float16"):
        assert openblip.load(tmp_path, device="cpu", dtype=name).dtype == getattr(torch, name)
    assert openblip.load(tmp_path, device="cpu", dtype="auto").dtype == torch.float32
    with pytest.raises(ConfigError, match="float32, bfloat16, float16 and auto"):
        openblip.load(tmp_path, device="cpu", dtype="int4")
