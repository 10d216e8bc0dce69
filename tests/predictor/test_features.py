"""Features: the model's states as they are, of images, of texts and of both together."""

import pytest
import torch
from tiny_predictor import IMAGES, TEXTS, TOKENIZER, assert_same, check_batches, image_tokens, make_predictor

from openblip.errors import UnsupportedTaskError
from openblip.models.config import Head
from openblip.predictor import BlipPredictor, Features

NAMES = ("image", "image_projected", "text", "text_projected", "text_mask", "multimodal")


def given(features: Features) -> dict[str, torch.Tensor]:
    values = {name: getattr(features, name) for name in NAMES}
    return {name: value for name, value in values.items() if value is not None}


def test_features_are_the_states_of_the_model(predictor: BlipPredictor) -> None:
    found = given(predictor.features(IMAGES, TEXTS))
    model = predictor.model
    for i, (image, text) in enumerate(zip(IMAGES, TEXTS, strict=True)):
        tokens = TOKENIZER.encode([text])
        length = tokens.ids.shape[1]
        together = tokens.ids.clone()
        together[0, 0] = TOKENIZER.enc_id
        image = image_tokens(predictor, image)
        with torch.no_grad():
            alone = model.text(tokens.ids, "encode")
            both = model.text(together, "encode", context_kv=model.image_kv(image, "encode").layers)
        for name, expected in (("image", image), ("text", alone), ("multimodal", both)):
            assert_same(found[name][i, : expected.shape[1]], expected[0])
        assert found["text_mask"][i].tolist() == [n < length for n in range(found["text_mask"].shape[1])]
        for name in ("text", "text_projected", "multimodal"):
            assert not found[name][i, length:].any()


def test_the_first_projected_tokens_are_the_embeddings(predictor: BlipPredictor) -> None:
    found = given(predictor.features(IMAGES, TEXTS))
    torch.testing.assert_close(found["image_projected"][:, 0], predictor.embed_images(IMAGES))
    torch.testing.assert_close(found["text_projected"][:, 0], predictor.embed_texts(TEXTS))
    torch.testing.assert_close(found["image_projected"].norm(dim=-1), torch.ones(5, 5))


def test_features_do_not_depend_on_batches_order_or_padding(predictor: BlipPredictor) -> None:
    expected = given(predictor.features(IMAGES, TEXTS))
    assert list(expected) == list(NAMES)
    for name in NAMES:
        check_batches(lambda *given, name=name: getattr(predictor.features(*given), name), IMAGES, TEXTS)
    alone = given(predictor.features(IMAGES[0], TEXTS[0]))
    length = alone["text_mask"].shape[1]
    for name in ("text", "multimodal"):
        assert_same(alone[name], expected[name][:1, :length])


def test_only_what_was_given_is_looked_at(predictor: BlipPredictor) -> None:
    assert set(given(predictor.features(IMAGES))) == {"image", "image_projected"}
    assert set(given(predictor.features(texts=TEXTS))) == {"text", "text_projected", "text_mask"}
    assert predictor.features(predictor.encode(IMAGES[:2])).image.shape == (2, 5, 24)
    empty = given(predictor.features([], []))
    assert [value.shape[0] for value in empty.values()] == [0] * 6
    assert empty["multimodal"].shape == (0, 0, 32)


@pytest.mark.parametrize(
    ("heads", "both"),
    [
        (("itm",), {"image", "text_mask", "multimodal"}),
        (("vqa",), {"image", "text_mask", "multimodal"}),
        (("itc",), None),
        (("visdial",), None),
        (("lm",), None),
        (("nlvr",), None),
    ],
)
def test_what_the_model_does_not_have_is_none_or_refused(heads: tuple[Head, ...], both: set[str] | None) -> None:
    predictor = make_predictor(*heads)
    assert "image" in given(predictor.features(IMAGES))
    if both is None:
        with pytest.raises(UnsupportedTaskError, match="itm or vqa head"):
            predictor.features(IMAGES, TEXTS)
    else:
        assert set(given(predictor.features(IMAGES, TEXTS))) == both
    if "itc" in heads or "visdial" in heads:
        assert "text" in given(predictor.features(texts=TEXTS))
    else:
        with pytest.raises(UnsupportedTaskError, match=f"this checkpoint has {heads[0]}"):
            predictor.features(texts=TEXTS)
