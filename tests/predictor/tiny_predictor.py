"""Predictors with tiny random models, what is asked of them, and how their answers are compared."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openblip.checkpoints.checkpoint import BlipCheckpoint, EncoderToken
from openblip.data.config import Preprocessing
from openblip.data.tokenizer import Tokens
from openblip.models.blip import Blip
from openblip.models.config import Blip2Head, Head
from openblip.predictor import Blip2Predictor, BlipPredictor, ScoredText
from tiny_blip import TINY, randomise, tiny_tokenizer
from tiny_blip2 import Language, tiny_blip2

TOKENIZER = tiny_tokenizer()
PROMPT = "a picture of "
ORDER = [3, 0, 4, 2, 1]


def make_predictor(*heads: Head, encoder_token: EncoderToken = "[ENC]", **vision: int) -> BlipPredictor:
    """`vision` overrides the image encoder's sizes."""
    config = replace(TINY, text=replace(TINY.text, vocab_size=TOKENIZER.vocab_size))
    if "vqa" in heads:  # its shared cross-attention reads images and questions alike
        vision = {"hidden_dim": config.text.hidden_dim, "num_heads": 4, **vision}
    config = replace(config, vision=replace(config.vision, **vision), heads=heads)
    model = Blip(config)
    randomise(model, seed=0, scale=0.3)
    preprocessing = Preprocessing(image_size=config.vision.image_size)
    checkpoint = BlipCheckpoint(model, TOKENIZER, preprocessing, PROMPT, encoder_token)
    return BlipPredictor(checkpoint, device="cpu")


def blip2_predictor(
    heads: Sequence[Blip2Head] = ("itc", "itm", "itg"), language: Language | None = None, **settings: Any
) -> Blip2Predictor:
    """settings: `tower`, `instructed`, `projection`."""
    return Blip2Predictor(tiny_blip2(heads, language, **settings), device="cpu")


def random_image(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (20 + seed, 30, 3), dtype=np.uint8))


IMAGES = [random_image(seed) for seed in range(5)]
TEXTS = ["a dog", "two blue cars beside a tree", "the cat", "a small green bird below a big red tree", "tree"]


def random_video(seed: int, num_frames: int = 6) -> bytes:
    """An mp4 of random frames."""
    import av

    rng, file = np.random.default_rng(seed), io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream: Any = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(num_frames):
            values = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def tokens_from_enc(text: str) -> Tokens:
    """A text as it is read together with an image, (1, T)."""
    tokens = TOKENIZER.encode([text])
    tokens.ids[0, 0] = TOKENIZER.enc_id
    return tokens


def image_tokens(predictor: BlipPredictor, image: Image.Image) -> torch.Tensor:
    """(1, N, Dv) without anything of the predictor but its preprocessing."""
    pixels = torch.from_numpy(predictor.preprocessing(image))[None]
    with torch.no_grad():
        return predictor.model.encode_image(predictor.preprocessing.normalize(pixels))


def assert_same(found: Any, expected: Any) -> None:
    """Equal but for rounding."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    elif isinstance(expected, ScoredText):
        assert found.text == expected.text
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
    else:
        assert found == expected


def check_batches(
    call: Callable[..., Any], *lists: Sequence[Any], sizes: Sequence[int | None] = (None, 1, 2, 3, 5)
) -> Any:
    """Results for five items do not depend on batch size, order or what else is in the batch; returns them.

    call: takes the lists and a batch size.
    """
    expected = call(*lists, None)
    for size in sizes:
        for order in (range(5), ORDER) if size == 2 else (ORDER,):
            found = call(*([values[i] for i in order] for values in lists), size)
            for i, result in zip(order, found, strict=True):
                assert_same(result, expected[i])
    return expected
