"""Tiny BLIPs with random weights far from their start, so that every parameter matters to the result.

B batch, S side of the picture, T text tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.data.batch import ImageTextBatch
from openblip.data.config import Preprocessing
from openblip.data.tokenizer import Tokenizer, Tokens
from openblip.generation.decoding import Decoding
from openblip.generation.search import generate
from openblip.models.blip import Blip
from openblip.models.config import BlipConfig, Head
from openblip.nn.config import Sharing, TextConfig, VisionConfig

VOCAB_SIZE, SIZE = 60, 16
PAD, CLS, SEP, DEC, ENC = 0, 2, 3, 58, 59
TINY = BlipConfig(
    vision=VisionConfig(image_size=SIZE, patch_size=8, hidden_dim=24, num_layers=2, num_heads=3, mlp_dim=40),
    text=TextConfig(
        vocab_size=VOCAB_SIZE, hidden_dim=32, num_layers=2, num_heads=4, mlp_dim=48, max_positions=40, dropout=0.0
    ),
    embed_dim=12,
)


def randomise(module: nn.Module, seed: int, scale: float = 0.25) -> None:
    """Every parameter random, norms around one: an exchanged or forgotten weight shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm_weight = parameter.dim() == 1 and name.lower().endswith(("norm.weight", "norm1.weight"))
            parameter.copy_(1 + 0.1 * noise if is_norm_weight else scale * noise)
            if name == "log_temperature":
                parameter.fill_(math.log(0.2))


def tiny_blip(heads: tuple[Head, ...] = ("itc", "itm", "lm"), sharing: Sharing = "all_but_sa", seed: int = 0) -> Blip:
    """In eval mode, without dropout."""
    model = Blip(replace(TINY, heads=heads, text=replace(TINY.text, sharing=sharing)))
    randomise(model, seed)
    return model.eval()


def random_pixels(count: int, seed: int = 0, size: int = SIZE) -> Tensor:
    """Normalised images, float (B, 3, S, S)."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def random_tokens(lengths: Sequence[int], seed: int = 0, first: int = CLS) -> Tokens:
    """One text of each length: `first`, words, [SEP], padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(5, 57, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = first, SEP
        mask[row, :length] = True
    return Tokens(ids, mask)


def random_batch(lengths: Sequence[int], image_ids: Sequence[int], seed: int = 0) -> ImageTextBatch:
    """Pairs as the loader gives them; equal ids are given equal images."""
    images = {
        i: torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        for i in image_ids
    }
    names = [f"{seed}-{row}" for row in range(len(lengths))]
    return ImageTextBatch(
        pixels=torch.stack([images[i] for i in image_ids]),
        tokens=random_tokens(lengths, seed),
        captions=names,
        image_ids=torch.tensor(image_ids),
        keys=names,
        shards=["0000"] * len(names),
    )


def tiny_tokenizer() -> Tokenizer:
    """Trained on a few captions; about 150 entries."""
    captions = ["a red dog beside two blue cars", "the small cat below a big tree", "a picture of a green bird"]
    return Tokenizer.train(captions * 2, vocab_size=150)


def tiny_checkpoint(
    heads: tuple[Head, ...] = ("itc", "itm", "lm"), sharing: Sharing = "all_but_sa", **settings: Any
) -> BlipCheckpoint:
    """A model with the words of `tiny_tokenizer`; `settings` are further fields of the checkpoint."""
    tokenizer = tiny_tokenizer()
    if heads == ("vqa",):  # texts are wider than images, so that cross-attention to both cannot be one
        sharing = "none"
    model = Blip(replace(TINY, text=replace(TINY.text, vocab_size=tokenizer.vocab_size, sharing=sharing), heads=heads))
    randomise(model, seed=0)
    return BlipCheckpoint(model.eval(), tokenizer, Preprocessing(image_size=SIZE), **settings)


def assert_same(
    found: Tensor, expected: Tensor, inputs: Sequence[Tensor], atol: float = 1e-5, rtol: float = 1e-4
) -> Sequence[Tensor]:
    """Equal values, and equal gradients of a weighted sum of them with respect to the inputs, which are returned."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(4)).to(found.dtype)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), inputs, retain_graph=True) for x in (found, expected))
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)
    return ours


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """Of every parameter by name."""
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def contrastive_mask(num_queries: int, num_tokens: int) -> Tensor:
    """The uni-modal mask of the Q-Former's ITC, bool (S, S): ours runs queries and text one at a time."""
    is_text = torch.arange(num_queries + num_tokens) >= num_queries
    return is_text[:, None] == is_text[None, :]


def saved_bytes(run: Callable[[], object]) -> int:
    """What a forward pass leaves for the backward pass."""
    total = 0

    def count(x: Tensor) -> Tensor:
        nonlocal total
        total += x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        run()
    return total


class RereadTexts:
    """Texts whose every row is read from its first token again at every step, with a copy of the image for each."""

    def __init__(self, decode: Callable[[Tensor, Any], Tensor], context: Any, ids: Tensor, num_images: int) -> None:
        self.decode, self.context, self.ids, self.num_images = decode, context, ids, num_images

    def step(self, ids: Tensor, parents: Tensor | None = None) -> Tensor:
        if parents is not None:
            images = torch.arange(self.num_images)[:, None] * parents.shape[1]
            self.ids = self.ids[(images + parents).flatten()]
        self.ids = torch.cat([self.ids, ids[:, None]], dim=1)
        copies = torch.arange(self.num_images).repeat_interleave(len(ids) // self.num_images)
        return self.decode(self.ids, self.context.select(copies))[:, -1]

    def select(self, images: Tensor) -> "RereadTexts":
        ids = self.ids.unflatten(0, (self.num_images, -1))[images].flatten(0, 1)
        return RereadTexts(self.decode, self.context.select(images), ids, len(images))


class Uncached:
    """A model without caches, around a function that reads whole texts, `decode`."""

    decode: Callable[[Tensor, Any], Tensor]

    def begin_texts(
        self, context_kv: Any, prompt_ids: Tensor, num_images: int, *, samples: int, beams: int, max_new_tokens: int
    ) -> tuple[RereadTexts, Tensor]:
        logits = self.decode(prompt_ids.expand(num_images, -1), context_kv)[:, -1]
        ids = prompt_ids.expand(num_images * samples * beams, -1)
        return RereadTexts(self.decode, context_kv, ids, num_images), logits


def check_cached_decoding(model: Any, kv: Any, prompt: Tensor, decoding: Decoding, num_captions: int, eos: int) -> None:
    """What is written for five images with caches is what the uncached model writes, and texts differ."""
    plain_model = Uncached()
    plain_model.decode = model.decode
    cached, plain = (
        [
            text
            for texts in generate(m, kv, prompt, 5, decoding, num_captions=num_captions, eos_id=eos)
            for text in texts
        ]
        for m in (model, plain_model)
    )
    assert [text.ids for text in cached] == [text.ids for text in plain]
    for ours, theirs in zip(cached, plain, strict=True):
        assert ours.token_logprobs == pytest.approx(theirs.token_logprobs, abs=1e-4)
    assert len({tuple(text.ids) for text in cached}) > 2
    assert len({len(text.ids) for text in cached}) > 1
