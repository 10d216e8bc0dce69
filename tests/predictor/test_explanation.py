"""Explanations: attention times what more of it would do, checked by doing it; words, layers, grids, drawings.

Q queries, T text tokens, N image tokens, H heads, G patches a side.
"""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_predictor import IMAGES, TOKENIZER, blip2_predictor, make_predictor, tokens_from_enc
from torch import Tensor, nn

import openblip
from marks import slow
from openblip.errors import ConfigError, ImageError, UnsupportedTaskError
from openblip.generation.decoding import Beam
from openblip.models.config import Head
from openblip.nn.attention import CrossAttention
from openblip.predictor import Blip2Predictor, BlipPredictor, Explanation
from openblip.predictor.explain import join_language_pieces, join_pieces
from tiny_blip import tiny_tokenizer
from tiny_blip2 import language_tokenizer

TEXT = "a small bird beside the tree"


class Changed:
    """Stands in for the attention of a layer: its weights (H, Q, N) plus a change, at the first reading."""

    def __init__(self, change: Tensor | float = 0.0) -> None:
        self.change = change
        self.weights: list[Tensor] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **_: Any) -> Tensor:
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(dim=-1)
        if not self.weights:
            weights = weights + self.change
        self.weights.append(weights)
        return weights @ value


def maps_by_hand(predictor: BlipPredictor, mode: str, layer: int, score: Any) -> Tensor:
    """Attention * relu(d score / d attention), heads averaged: (Q, N), by changing every weight in turn."""
    attention = predictor.model.text.layers[layer].cross_attention[mode].branch
    assert isinstance(attention, CrossAttention)
    usual = attention.attend
    try:
        attention.attend = plain = Changed()  # type: ignore[assignment]
        score()
        weights = plain.weights[0]  # (1, H, Q, N)
        gradient = torch.zeros(weights.numel(), dtype=weights.dtype)
        for place in range(weights.numel()):
            change = torch.zeros(weights.numel(), dtype=weights.dtype)
            change[place] = 1e-5
            results = []
            for sign in (1.0, -1.0):
                attention.attend = Changed(sign * change.view(weights.shape))  # type: ignore[assignment]
                results.append(float(score()))
            gradient[place] = (results[0] - results[1]) / 2e-5
    finally:
        attention.attend = usual
    return (weights * gradient.view(weights.shape).clamp(min=0)).mean(dim=1)[0]


def in_double(*heads: Head) -> tuple[BlipPredictor, Tensor]:
    """A predictor in double precision, and the tokens of an image (1, N, Dv)."""
    predictor = BlipPredictor(make_predictor(*heads).checkpoint, dtype=torch.float64)
    return predictor, predictor.encode(IMAGES[0]).tokens.clone()


def words_of(maps: Tensor, text: str) -> Tensor:
    """Maps of [ENC], words and [SEP] (Q, N) -> (W, G, G), the mean of the pieces of each word."""
    pieces = TOKENIZER.pieces(TOKENIZER.prompt(text).tolist()[1:])
    _, places = join_pieces(pieces)
    return torch.stack([maps[1:-1][own].mean(dim=0)[1:].view(2, 2) for own in places])


@pytest.mark.parametrize("layer", [0, *slow(1)])
def test_a_match_is_explained_by_what_changes_of_attention_would_do(layer: int) -> None:
    predictor, image = in_double("itm")
    tokens = tokens_from_enc("a bird")

    @torch.no_grad()
    def score() -> Tensor:
        kv = predictor.model.image_kv(image, "encode")
        return predictor.model.match_logits(tokens.ids, tokens.mask, kv)[0, 1]

    maps = maps_by_hand(predictor, "encode", layer, score)
    found = predictor.explain(IMAGES[0], "a bird", layer)
    torch.testing.assert_close(found.heat, words_of(maps, "a bird").float(), atol=1e-6, rtol=1e-4)
    overall = maps.mean(dim=0)[1:].view(2, 2).float()
    torch.testing.assert_close(found.overall, overall, atol=1e-6, rtol=1e-4)
    assert found.overall.any()
    assert bool(found.heat.any()) == (layer == 0)  # in the last layer only the first token counts
    assert found.score == pytest.approx(float(predictor.match(IMAGES[0], "a bird")), abs=1e-6)


@pytest.mark.parametrize("layer", [0, *slow(1)])
def test_each_word_of_a_caption_is_explained_by_its_own_probability(layer: int) -> None:
    predictor, image = in_double("lm")
    ids = TOKENIZER.prompt(predictor.prompt + "a bird")
    start = len(TOKENIZER.prompt(predictor.prompt))
    words, places = join_pieces(TOKENIZER.pieces(ids[start:].tolist()))
    found = predictor.explain(IMAGES[0], "a bird", layer)
    assert found.words == tuple(words)
    for word, own in enumerate(places):

        @torch.no_grad()
        def score(own: list[int] = own) -> Tensor:
            kv = predictor.model.image_kv(image, "decode")
            logprobs = predictor.model.decode(ids[None], kv)[0].log_softmax(dim=-1)
            return sum(logprobs[start - 1 + n, ids[start + n]] for n in own)

        maps = maps_by_hand(predictor, "decode", layer, score)
        expected = maps.sum(dim=0)[1:].view(2, 2).float()
        assert expected.any()
        torch.testing.assert_close(found.heat[word], expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.overall, found.heat.mean(dim=0))


@pytest.mark.parametrize("layer", [0, *slow(1)])
def test_an_answer_is_explained_through_the_words_of_its_question(layer: int) -> None:
    """Also where the answer reads the question with the same cross-attention."""
    predictor, image = in_double("vqa")
    answer = predictor.answer(IMAGES[0], "a bird?", return_scores=True)
    tokens = tokens_from_enc("a bird?")
    ids = torch.tensor([TOKENIZER.dec_id, *answer.ids])

    @torch.no_grad()
    def score() -> Tensor:
        model = predictor.model
        kv = model.question_kv(tokens.ids, tokens.mask, model.image_kv(image, "encode"))
        logprobs = model.decode(ids[None, :-1], kv)[0].log_softmax(dim=-1)
        return logprobs.gather(1, ids[1:, None]).sum()

    maps = maps_by_hand(predictor, "encode", layer, score)
    found = predictor.explain(IMAGES[0], "a bird?", layer)
    torch.testing.assert_close(found.heat, words_of(maps, "a bird?").float(), atol=1e-6, rtol=1e-3)
    assert found.heat.any()
    assert found.text == answer.text
    assert found.score == pytest.approx(answer.logprob, abs=1e-4)


def test_without_a_text_the_caption_is_explained(predictor: BlipPredictor) -> None:
    caption = predictor.caption(IMAGES[0], return_scores=True)
    found = predictor.explain(IMAGES[0])
    assert found.text == caption.text
    assert found.score == pytest.approx(caption.logprob, abs=1e-3)
    assert len(found.words) == len(found.heat)
    assert (found.heat >= 0).all()
    assert found.heat.any()
    assert found.heat.dtype == found.overall.dtype == torch.float32


def test_word_pieces_are_joined() -> None:
    words, places = join_pieces(["a", "bir", "##d", "##s", ",", "##x"])
    assert words == ("a", "birds", ",x")
    assert places == [[0], [1, 2, 3], [4, 5]]
    assert join_pieces(["##s", "a"]) == (("##s", "a"), [[0], [1]])


@pytest.mark.parametrize(("size", "patch", "grid"), [(16, 4, 4), (24, 8, 3), (8, 8, 1)])
def test_any_resolution(size: int, patch: int, grid: int) -> None:
    predictor = make_predictor("itm", image_size=size, patch_size=patch)
    found = predictor.explain(IMAGES[0], TEXT)
    assert found.heat.shape == (6, grid, grid)
    assert found.overlay(IMAGES[0]).size == IMAGES[0].size


def test_explaining_leaves_nothing_behind(predictor: BlipPredictor) -> None:
    """No gradients, no change of later results; also where the caller has switched gradients off."""
    before = predictor.match(IMAGES, [TEXT] * 5)
    expected = predictor.explain(IMAGES[1], TEXT)
    with torch.no_grad():
        torch.testing.assert_close(predictor.explain(IMAGES[1], TEXT).heat, expected.heat)
    with torch.inference_mode():
        encoded = predictor.encode(IMAGES[1])
        torch.testing.assert_close(predictor.explain(encoded, TEXT).heat, expected.heat)
    predictor.explain(IMAGES[1])
    assert all(parameter.grad is None for parameter in predictor.model.parameters())
    assert torch.equal(predictor.match(IMAGES, [TEXT] * 5), before)
    assert not expected.heat.requires_grad


def test_half_precision_and_another_first_token(predictor: BlipPredictor, tmp_path: Any) -> None:
    predictor.save(tmp_path)
    half = openblip.load(tmp_path, device="cpu", dtype=torch.bfloat16)
    found = half.explain(IMAGES[0], TEXT)
    assert found.heat.dtype == torch.float32
    assert found.heat.isfinite().all()
    plain = make_predictor("itc", "itm", "lm", encoder_token="[CLS]")
    assert plain.explain(IMAGES[0], TEXT).score == pytest.approx(float(plain.match(IMAGES[0], TEXT)), abs=1e-5)


@pytest.mark.parametrize(("heads", "text"), [(("itc",), TEXT), (("nlvr",), TEXT), (("itm",), None), (("vqa",), None)])
def test_a_model_without_the_head_says_so(heads: tuple[Head, ...], text: str | None) -> None:
    with pytest.raises(UnsupportedTaskError, match=f"lm head.*{heads[0]}"):
        make_predictor(*heads).explain(IMAGES[0], text)


def explanation(heat: Tensor) -> Explanation:
    return Explanation(text="a dog a", score=0.5, words=("a", "dog", "a"), heat=heat, overall=heat.mean(dim=0))


def test_the_hottest_patch_turns_red_and_cold_ones_stay() -> None:
    heat = torch.zeros(3, 4, 4)
    heat[1, 0, 3] = 2.0
    grey = Image.new("RGB", (80, 40), (100, 100, 100))
    for word in (1, "dog", -2, None):
        drawn = np.asarray(explanation(heat).overlay(grey, word)).astype(int)
        assert drawn.shape == (40, 80, 3)
        red, _, blue = drawn[4, 72]
        assert red > 150 > 100 > blue
        assert (drawn[30:, :40] == 100).all()
    assert np.array_equal(explanation(heat).overlay(grey, "a"), grey)  # no heat, no colour


def test_an_overlay_takes_any_image(tmp_path: Any) -> None:
    path = tmp_path / "image.png"
    IMAGES[0].save(path)
    heat = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0))
    drawn = explanation(heat).overlay(path)
    assert drawn.mode == "RGB"
    assert np.array_equal(drawn, explanation(heat).overlay(np.asarray(IMAGES[0])))
    with pytest.raises(ImageError, match=r"absent\.png"):
        explanation(heat).overlay(tmp_path / "absent.png")


@pytest.mark.parametrize("word", ["cat", 3, -4, ""])
def test_a_word_that_is_not_there_is_refused(word: str | int) -> None:
    with pytest.raises(ConfigError, match="it has a, dog, a, at positions 0 to 2"):
        explanation(torch.zeros(3, 2, 2)).overlay(IMAGES[0], word)


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
    model, weights = predictor.model.recording_query_attention(DEFAULT_LAYER)
    logits = model.match_logits(read.ids, read.mask, model.image_kv(image_tokens(predictor)))
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
    model, weights = predictor.model.recording_query_attention(DEFAULT_LAYER)
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
