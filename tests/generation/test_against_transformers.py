"""Greedy and beam write the same tokens as transformers' `generate` with the same weights, in float32; sampling
chooses among the same tokens."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_decoders import DEC, EOS, PROMPT, VOCAB, HuggingFaceDecoder, Images
from torch import Tensor
from transformers import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from marks import slow
from openblip.generation.decoding import Beam, Greedy
from openblip.generation.search import generate, sample_nucleus

pytestmark = pytest.mark.slow

LIMITS = [(1, 0), (8, 0), (8, 3), (12, 12)]  # most, fewest new tokens
FOUR_IMAGES = Images(torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0)) * 2)


@pytest.mark.parametrize("seed", [0, 1, *slow(2, 3, 4, 5)])
def test_greedy_equals_transformers(seed: int) -> None:
    model = HuggingFaceDecoder(seed)
    lengths = set()
    for most, fewest in LIMITS:
        decoding = Greedy(max_new_tokens=most, min_new_tokens=fewest)
        ours = generate(model, FOUR_IMAGES, PROMPT, 4, decoding, eos_id=EOS)
        theirs = model.generate_there(FOUR_IMAGES, PROMPT, max_new_tokens=most, min_new_tokens=fewest)
        assert [texts[0].ids for texts in ours] == theirs
        lengths.update(len(ids) for ids in theirs)
    assert len(lengths) > 2, "the model is degenerate; the comparison says little"


@pytest.mark.parametrize("seed", [0, *slow(1, 2)])
@pytest.mark.parametrize("num_beams", [3, *slow(2, 5)])
def test_every_beam_equals_transformers(seed: int, num_beams: int) -> None:
    model = HuggingFaceDecoder(100 + seed)
    for (most, fewest), length_penalty in itertools.product(LIMITS, (-1.0, 0.0, 1.0, 2.0)):
        decoding = Beam(num_beams=num_beams, max_new_tokens=most, min_new_tokens=fewest, length_penalty=length_penalty)
        ours = generate(model, FOUR_IMAGES, PROMPT, 4, decoding, num_captions=num_beams, eos_id=EOS)
        theirs = model.generate_there(
            FOUR_IMAGES, PROMPT, num_beams=num_beams, num_return_sequences=num_beams, max_new_tokens=most,
            min_new_tokens=fewest, length_penalty=length_penalty, early_stopping=False,
        )  # fmt: skip
        assert [text.ids for texts in ours for text in texts] == theirs


LONG_PROMPT = torch.tensor([DEC, 9, 14, 9])


def beyond_prompt(processor: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The same processor of scores, which does not see the prompt."""
    return lambda ids, scores: processor(ids[:, len(LONG_PROMPT) :], scores)


@pytest.mark.parametrize("decoding", [Greedy(), Beam(num_beams=3)], ids=["greedy", "beam"])
@pytest.mark.parametrize(
    ("setting", "processor"),
    [
        ({"repetition_penalty": 1.4}, RepetitionPenaltyLogitsProcessor(1.4)),
        *slow(({"repetition_penalty": 0.7}, RepetitionPenaltyLogitsProcessor(0.7))),
        *[({"no_repeat_ngram_size": size}, NoRepeatNGramLogitsProcessor(size)) for size in (1, 2, 3)],
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else type(value).__name__,
)
def test_processors_of_scores_equal_those_of_transformers_beyond_the_prompt(
    decoding: Greedy | Beam, setting: dict[str, Any], processor: Any
) -> None:
    for seed in range(2):
        model = HuggingFaceDecoder(seed)
        ours, plain = (
            [texts[0].ids for texts in generate(model, FOUR_IMAGES, LONG_PROMPT, 4, each, eos_id=EOS)]
            for each in (replace(decoding, **setting), decoding)
        )
        theirs = model.generate_there(
            FOUR_IMAGES, LONG_PROMPT, num_beams=getattr(decoding, "num_beams", 1), max_new_tokens=20,
            logits_processor=[beyond_prompt(processor)],
        )  # fmt: skip
        assert ours == theirs != plain


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (3, 1.0), (3, 0.6), (50, 0.9), (0, 0.5)])
def test_tokens_are_sampled_as_by_transformers(top_k: int, top_p: float) -> None:
    scores = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    if top_p == 1.0:  # also where two are equally likely, whose order in a nucleus is ours
        scores[0, 5] = scores[0, 9] = scores[0].max()
    kept = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    expected = (kept if top_p == 1.0 else TopPLogitsWarper(top_p)(None, kept)).softmax(dim=-1)
    grid = (torch.arange(2000) + 0.5) / 2000
    for row, probabilities in zip(scores, expected, strict=True):
        tokens = sample_nucleus(row.expand(len(grid), -1), grid, top_p, top_k)
        shares = torch.bincount(tokens, minlength=VOCAB) / len(grid)
        torch.testing.assert_close(shares, probabilities, atol=1e-3, rtol=0)
