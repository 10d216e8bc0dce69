"""Statements about two images: pairs in their order, left and right told apart."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_predictor import IMAGES, ORDER, TEXTS, TOKENIZER, image_tokens, make_predictor

from openblip.errors import ConfigError, ImageError
from openblip.predictor import BlipPredictor

PAIRS = [(IMAGES[i], IMAGES[(2 * i + 1) % 5]) for i in range(5)]


@pytest.fixture(scope="module")
def predictor() -> BlipPredictor:
    return make_predictor("nlvr")


def test_a_judgement_is_the_softmax_of_the_logits_after_enc(predictor: BlipPredictor) -> None:
    found = predictor.judge(PAIRS, TEXTS)
    assert found.shape == (5,)
    assert found.dtype == torch.float32
    for (left, right), text, probability in zip(PAIRS, TEXTS, found, strict=True):
        tokens = TOKENIZER.encode([text])
        tokens.ids[0, 0] = TOKENIZER.enc_id
        both = torch.stack([image_tokens(predictor, left), image_tokens(predictor, right)], dim=1)
        with torch.no_grad():
            logits = predictor.model.judge_logits(tokens.ids, tokens.mask, predictor.model.image_kv(both, "encode"))
        torch.testing.assert_close(probability, logits.softmax(dim=1)[0, 1], atol=1e-5, rtol=1e-5)


def test_judgements_do_not_depend_on_batches_order_or_padding(predictor: BlipPredictor) -> None:
    expected = predictor.judge(PAIRS, TEXTS)
    assert expected.std() > 1e-3
    for batch_size in (1, 2, 3, 4):
        torch.testing.assert_close(predictor.judge(PAIRS, TEXTS, batch_size), expected, atol=1e-5, rtol=1e-5)
    shuffled = predictor.judge([PAIRS[i] for i in ORDER], [TEXTS[i] for i in ORDER], batch_size=5)
    torch.testing.assert_close(shuffled, expected[ORDER], atol=1e-5, rtol=1e-5)
    swapped = predictor.judge([(right, left) for left, right in PAIRS], TEXTS)
    assert not torch.allclose(swapped, expected, atol=1e-3)


def test_one_pair_or_lists_as_pairs(predictor: BlipPredictor) -> None:
    one = predictor.judge(PAIRS[0], TEXTS[0])
    assert one.shape == (1,)
    assert torch.equal(predictor.judge(list(PAIRS[0]), [TEXTS[0]]), one)
    assert torch.equal(predictor.judge([list(PAIRS[0])], TEXTS[0]), one)
    assert predictor.judge([], []).shape == (0,)


def test_a_long_statement_is_cut_not_refused(predictor: BlipPredictor) -> None:
    assert predictor.judge(PAIRS[0], "a dog beside " * 100).shape == (1,)


@pytest.mark.parametrize(
    "images",
    [IMAGES[:3], [(IMAGES[0],)], [IMAGES[:3]], [PAIRS[0], IMAGES[0]], IMAGES[0]],
    ids=["images", "one side", "three sides", "a pair and an image", "one image"],
)
def test_what_is_no_pair_is_refused(predictor: BlipPredictor, images: object) -> None:
    with pytest.raises(ConfigError, match="judge takes pairs"):
        predictor.judge(images, TEXTS[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(("pairs", "texts"), [(1, 2), (2, 1), (0, 1), (1, 0)])
def test_statements_that_do_not_pair_with_the_images_are_refused(
    predictor: BlipPredictor, pairs: int, texts: int
) -> None:
    with pytest.raises(ConfigError, match="equally many pairs and statements"):
        predictor.judge(PAIRS[:pairs], TEXTS[:texts])


def test_an_unreadable_image_is_named_with_its_side(predictor: BlipPredictor, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"pair 2 \(right\)"):
        predictor.judge([*PAIRS[:2], (IMAGES[0], b"no image")], TEXTS[:3], batch_size=2)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.png \(left\)"):
        predictor.judge([(broken, Image.new("RGB", (8, 8)))], TEXTS[0])
