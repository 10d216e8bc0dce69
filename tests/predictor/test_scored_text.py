"""How sure a model was: token by token, and of the whole."""

import pytest
import torch
from tiny_predictor import IMAGES, TOKENIZER, image_tokens, make_predictor

from openblip.generation.decoding import Greedy
from openblip.predictor import BlipPredictor, ScoredText


@pytest.fixture(scope="module")
def predictor() -> BlipPredictor:
    """Its captions end."""
    predictor = make_predictor("lm")
    assert predictor.model.text.lm_head is not None
    with torch.no_grad():
        predictor.model.text.lm_head.bias[TOKENIZER.sep_id] += 8.0
    return predictor


def test_every_token_comes_with_its_own_log_probability(predictor: BlipPredictor) -> None:
    found: list[ScoredText] = predictor.caption(IMAGES, decoding=Greedy(max_new_tokens=20), return_scores=True)
    assert all(caption.tokens[-1] == "[SEP]" for caption in found)
    for image, caption in zip(IMAGES, found, strict=True):
        assert len(caption.tokens) == len(caption.token_logprobs)
        assert caption.logprob == pytest.approx(sum(caption.token_logprobs))
        with torch.no_grad():
            kv = predictor.model.image_kv(image_tokens(predictor, image), "decode")
            prompt = TOKENIZER.prompt(predictor.prompt)
            logits = predictor.model.decode(prompt[None], kv)[0, -1]
        logprob, first = logits.log_softmax(dim=0).max(dim=0)
        assert caption.tokens[0] == TOKENIZER.pieces([int(first)])[0]
        assert caption.token_logprobs[0] == pytest.approx(float(logprob), abs=1e-4)


def test_a_text_that_is_cut_off_has_no_end(predictor: BlipPredictor) -> None:
    settings = Greedy(max_new_tokens=2, min_new_tokens=2)
    found: ScoredText = predictor.caption(IMAGES[0], decoding=settings, return_scores=True)
    assert len(found.tokens) == 2
    assert "[SEP]" not in found.tokens


def test_the_pieces_make_the_text(predictor: BlipPredictor) -> None:
    for caption in predictor.caption(IMAGES, return_scores=True):
        joined = " ".join(token for token in caption.tokens if token != "[SEP]").replace(" ##", "")
        assert joined.replace(" ", "") == caption.text.replace(" ", "")
