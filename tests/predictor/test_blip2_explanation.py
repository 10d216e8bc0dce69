"""Where BLIP-2 looks: maps by hand, words, layers, and image encoders without a class token.

Q queries, T text tokens, N image tokens, H heads, G patches a side.
"""

from typing import Any

import pytest
import torch
from tiny_predictor import IMAGES, blip2_predictor
from torch import Tensor, nn

from openblip.errors import ConfigError, UnsupportedTaskError
from openblip.generation.decoding import Beam
from openblip.predictor import Blip2Predictor
from openblip.predictor.explain import join_language_pieces
from tiny_blip import tiny_tokenizer
from tiny_blip2 import language_tokenizer

DEFAULT_LAYER = 2


def image_tokens(predictor: Blip2Predictor, place: int = 0) -> Tensor:
    """(1, N, Dv)"""
    return predictor.encode(IMAGES[place]).tokens.clone()


def map_of(score: Tensor, weights: Tensor) -> Tensor:
    """Query by query and head by head: (Q, G, G)."""
    (gradient,) = torch.autograd.grad(score, weights, retain_graph=True)
    heads = [attention * slope.clamp(min=0) for attention, slope in zip(weights[0].detach(), gradient[0], strict=True)]
    return (sum(heads, torch.zeros(())) / len(heads))[:, 1:].unflatten(1, (2, 2))


def test_a_word_of_a_match_looks_where_its_queries_look() -> None:
    predictor = blip2_predictor()
    found = predictor.explain(IMAGES[0], "a red dog")
    assert found.words == ("a", "red", "dog")
    assert found.score == pytest.approx(predictor.match(IMAGES[0], "a red dog").item(), abs=1e-5)
    read = tiny_tokenizer().encode(["a red dog"])
    with predictor.model.capture_query_attention(DEFAULT_LAYER) as weights:
        logits = predictor.model.match_logits(read.ids, read.mask, predictor.model.image_kv(image_tokens(predictor)))
        queries = map_of(logits[0, 1], weights.image[0])
    attention = weights.tokens[0][0].mean(dim=0).detach()  # (Q + T, Q + T)
    expected = [sum(attention[4 + token, query] * queries[query] for query in range(4)) for token in range(5)]
    torch.testing.assert_close(found.heat, torch.stack(expected[1:4]))  # type: ignore[arg-type]
    torch.testing.assert_close(found.overall, torch.stack(expected).mean(dim=0))  # type: ignore[arg-type]
    assert found.heat.abs().max() > 0
    assert not torch.allclose(found.heat[0], found.heat[2])


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_a_word_that_is_written_looks_through_all_queries(language: Any) -> None:
    predictor = blip2_predictor((), language)
    found = predictor.explain(IMAGES[0])
    caption = predictor.caption(IMAGES[0], decoding=Beam(), return_scores=True)
    assert found.text == caption.text
    assert found.score == pytest.approx(caption.logprob, abs=1e-4)
    model = predictor.model
    with model.capture_query_attention(DEFAULT_LAYER) as weights:
        image_kv = model.image_kv(image_tokens(predictor))
        visual = model.visual_prompts(model.encode_queries(image_kv).queries)
        predicted = model.require_language().predict_ids(visual, ["a photo of"], [caption.ids])
    logprobs = predicted.logits[0, -len(caption.ids) :].log_softmax(dim=-1)
    words, places = join_language_pieces(model.require_language().tokenizer, caption.ids)
    assert found.words == words
    for heat, pieces in zip(found.heat, places, strict=True):
        score = sum((logprobs[place, caption.ids[place]] for place in pieces), torch.zeros(()))
        torch.testing.assert_close(heat, map_of(score, weights.image[0]).sum(dim=0), atol=1e-6, rtol=1e-4)


def test_of_a_question_the_answer_is_explained() -> None:
    predictor = blip2_predictor((), "opt", instructed=True)
    found = predictor.explain(IMAGES[0], "What is it?")
    answer = predictor.answer(IMAGES[0], "What is it?", return_scores=True)
    assert (found.text, found.score) == (answer.text, pytest.approx(answer.logprob, abs=1e-4))
    assert found.heat.max() > 0


def test_the_queries_explain_their_own_captions() -> None:
    predictor = blip2_predictor(("itg",))
    found = predictor.explain(IMAGES[0])
    assert found.text == predictor.caption(IMAGES[0])
    given = predictor.explain(IMAGES[0], found.text)
    torch.testing.assert_close(given.heat[0], found.heat[0])
    assert given.words[: len(found.words)] == found.words


@pytest.mark.parametrize(
    ("heads", "text", "message"),
    [(("itc",), "a dog", "heads itm, llm, itg for a text"), (("itm",), None, "llm or itg head")],
)
def test_missing_heads_are_named(heads: Any, text: str | None, message: str) -> None:
    with pytest.raises(UnsupportedTaskError, match=message):
        blip2_predictor(heads).explain(IMAGES[0], text)


def test_another_layer_looks_elsewhere() -> None:
    predictor = blip2_predictor()
    first = predictor.explain(IMAGES[0], "a dog", layer=0)
    assert not torch.allclose(first.heat, predictor.explain(IMAGES[0], "a dog").heat)


class Drops(nn.Module):
    """An image encoder that loses some of its first tokens."""

    def __init__(self, vision: nn.Module, start: int) -> None:
        super().__init__()
        self.vision = vision
        self.start = start

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.vision(pixels)[:, self.start :]
        return features


def test_patches_are_a_grid_with_or_without_a_class_token() -> None:
    predictor = blip2_predictor()
    predictor.model.vision = Drops(predictor.model.vision, 1)  # type: ignore[assignment]
    assert predictor.explain(IMAGES[0], "a dog").heat.shape == (2, 2, 2)
    predictor.model.vision = Drops(predictor.model.vision, 1)  # type: ignore[assignment]
    with pytest.raises(UnsupportedTaskError, match="this one has 3 tokens"):
        predictor.explain(IMAGES[0], "a dog")


def test_marks_begin_words() -> None:
    tokenizer = language_tokenizer("opt")
    ids = tokenizer("a photo of two dogs", add_special_tokens=False).input_ids
    words, places = join_language_pieces(tokenizer, [*ids, tokenizer.eos_token_id])
    assert words == ("a", "photo", "of", "two", "dogs")
    assert [place for own in places for place in own] == list(range(len(ids)))
    with pytest.raises(ConfigError, match="nothing was written"):
        join_language_pieces(tokenizer, [tokenizer.eos_token_id])
