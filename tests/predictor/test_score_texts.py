"""ITM and ITC of every text of an image at once: the same numbers as pair by pair."""

import numpy as np
import pytest
import torch
from tiny_predictor import IMAGES, blip2_predictor, make_predictor

from marks import slow
from openblip.errors import CheckpointError, ConfigError, UnsupportedTaskError
from openblip.predictor import BasePredictor, TextScore
from openblip.predictor.values import MAX_TEXTS_PER_IMAGE

WORDS = ["a", "small", "red", "dog", "beside", "two", "blue", "cars", "below", "the", "big", "green", "tree"]


@pytest.fixture(scope="module", params=["blip", "blip2"])
def predictor(request: pytest.FixtureRequest) -> BasePredictor:
    return make_predictor("itc", "itm") if request.param == "blip" else blip2_predictor(("itc", "itm"))


@pytest.mark.parametrize("batch_size", [2, *slow(None)])
def test_ragged_texts_score_as_pairs_do(predictor: BasePredictor, batch_size: int | None) -> None:
    """From no text to more than one pass reads; empty ones among them."""
    rng = np.random.default_rng(0)
    counts = [2, 0, 1, MAX_TEXTS_PER_IMAGE + 6, 3]
    texts = [[" ".join(rng.choice(WORDS, 1 + n % 7)) for n in range(count)] for count in counts]
    texts[4][1] = "  "
    scores = predictor.score_texts(predictor.prepare(IMAGES), texts, batch_size)
    assert [len(image_scores) for image_scores in scores] == counts
    for image, image_texts, image_scores in zip(IMAGES, texts, scores, strict=True):
        for text, score in zip(image_texts, image_scores, strict=True):
            if text.strip():
                assert score.itm == pytest.approx(predictor.match(image, text).item(), abs=1e-5)
                assert score.itc == pytest.approx(predictor.similarity(image, text).item(), abs=1e-5)
            else:
                assert score == TextScore(itm=0.0, itc=0.0)


def test_many_texts_of_one_image_beside_one_without(predictor: BasePredictor) -> None:
    """The passes are as many as the images, but both belong to the first image."""
    texts = [" ".join(WORDS[n % 5 : n % 5 + 1 + n % 3]) for n in range(2 * MAX_TEXTS_PER_IMAGE)]
    scores, none = predictor.score_texts(IMAGES[:2], [texts, []])
    alone = {text: predictor.match(IMAGES[0], text).item() for text in set(texts)}
    assert [score.itm for score in scores] == pytest.approx([alone[text] for text in texts], abs=1e-5)
    assert none == []


def test_only_empty_texts(predictor: BasePredictor) -> None:
    assert predictor.score_texts(IMAGES[:2], [[""], []]) == [[(0.0, 0.0)], []]
    assert predictor.score_texts([], []) == []


def test_broken_weights_are_an_error() -> None:
    predictor = make_predictor("itc", "itm")
    with torch.no_grad():
        predictor.model.itm_head.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not numbers"):
        predictor.score_texts(IMAGES[0], [["a dog"]])


def test_lists_that_do_not_go_with_the_images_are_refused(predictor: BasePredictor) -> None:
    with pytest.raises(ConfigError, match="2 images and 3 lists"):
        predictor.score_texts(IMAGES[:2], [["a dog"]] * 3)


@pytest.mark.parametrize("head", ["itc", "itm"])
def test_both_heads_are_needed(head: str) -> None:
    with pytest.raises(UnsupportedTaskError, match="it can do"):
        make_predictor(head).score_texts(IMAGES[0], [["a dog"]])  # type: ignore[arg-type]
