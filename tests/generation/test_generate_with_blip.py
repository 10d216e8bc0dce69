"""The loop over the real model: what is written with caches is what the uncached model says."""

import pytest
import torch
from torch import Tensor

from openblip.generation.decoding import Beam, Decoding, Greedy, Nucleus
from openblip.generation.search import best_candidates, generate
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig, TextConfig, VisionConfig
from tiny_blip import check_cached_decoding

EOS, PROMPT = 2, torch.tensor([3, 7])


@pytest.fixture(scope="module")
def model() -> Blip:
    torch.manual_seed(0)
    vision = VisionConfig(image_size=32, hidden_dim=32, num_layers=1, num_heads=2, mlp_dim=64)
    text = TextConfig(vocab_size=40, hidden_dim=32, num_layers=2, num_heads=4, mlp_dim=64, max_positions=32)
    model = Blip(BlipConfig(vision=vision, text=text, heads=("lm",))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model


@pytest.fixture(scope="module")
def image_tokens(model: Blip) -> Tensor:
    with torch.no_grad():
        return model.encode_image(torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("decoding", "num_captions"),
    [(Greedy(), 1), (Beam(num_beams=4, min_new_tokens=3), 4), (Nucleus(seed=2, repetition_penalty=1.1), 3)],
)
def test_cached_equals_uncached(model: Blip, image_tokens: Tensor, decoding: Decoding, num_captions: int) -> None:
    image_kv = model.image_kv(image_tokens, "decode")
    check_cached_decoding(model, image_kv, PROMPT, decoding, num_captions, EOS)


def test_ranking_gives_a_written_text_the_score_it_was_written_with(model: Blip, image_tokens: Tensor) -> None:
    image_kv = model.image_kv(image_tokens, "decode")
    texts = generate(model, image_kv, PROMPT, 5, Beam(num_beams=3, max_new_tokens=25), num_captions=3, eos_id=EOS)
    ended = [(i, t) for i, of in enumerate(texts) for t in of if len(t.token_logprobs) > len(t.ids)]
    assert len(ended) > 0
    for image, text in ended:
        own_kv = image_kv.select(torch.tensor([image]))
        (ranked,) = best_candidates(model, own_kv, PROMPT, [text.ids], 1, eos_id=EOS)
        assert ranked.generated.ids == text.ids
        assert ranked.generated.token_logprobs == pytest.approx(text.token_logprobs, abs=1e-4)
