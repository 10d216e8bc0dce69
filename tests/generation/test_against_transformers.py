"""Greedy and beam write the same tokens as transformers' `generate` with the same weights, in float32."""

import itertools

import pytest
import torch
from tiny_decoders import DEC, EOS, PROMPT, HuggingFaceDecoder, Images
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from marks import slow
from openblip.generation.decoding import Beam, Greedy
from openblip.generation.search import generate

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


@pytest.mark.parametrize("decoding", [Greedy(), Beam(num_beams=3)], ids=["greedy", "beam"])
@pytest.mark.parametrize("penalty", [1.4, *slow(0.7)])
def test_repetition_penalty_equals_transformers_beyond_the_prompt(decoding: Greedy | Beam, penalty: float) -> None:
    prompt = torch.tensor([DEC, 9, 14])
    for seed in range(2):
        model = HuggingFaceDecoder(seed)
        penalised = type(decoding)(repetition_penalty=penalty)
        ours = generate(model, FOUR_IMAGES, prompt, 4, penalised, eos_id=EOS)
        beyond_prompt = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=len(prompt))
        theirs = model.generate_there(
            FOUR_IMAGES, prompt, num_beams=getattr(decoding, "num_beams", 1), max_new_tokens=20,
            logits_processor=LogitsProcessorList([beyond_prompt]),
        )  # fmt: skip
        assert [texts[0].ids for texts in ours] == theirs
