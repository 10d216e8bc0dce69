"""Attention against loops, gradients included; folding and caching against the plain form."""

import math

import pytest
import torch
from torch import Tensor

from openblip.nn.attention import CrossAttention, SelfAttention, attend
from openblip.nn.kv_cache import LayerCache
from tiny_blip import randomise


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_()


def attend_by_loops(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention, one query at a time; allowed: bool (B, H, T, S)."""
    rows = []
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for t in range(query.shape[2]):
                keys = [s for s in range(key.shape[2]) if allowed[b, h, t, s]]
                scores = [(query[b, h, t] * key[b, h, s]).sum() / math.sqrt(query.shape[3]) for s in keys]
                weights = torch.stack(scores).exp()
                weights = weights / weights.sum()
                rows.append(sum(w * value[b, h, s] for w, s in zip(weights, keys, strict=True)))
    return torch.stack(rows).view(query.shape)


@pytest.mark.parametrize("kind", ["everywhere", "mask", "causal"])
def test_attend_is_softmax_attention_with_its_gradients(kind: str) -> None:
    inputs = [random(2, 3, 4, 5, seed=1), random(2, 3, 4, 5, seed=2), random(2, 3, 4, 5, seed=3)]
    mask = None
    allowed = torch.ones(2, 3, 4, 4, dtype=torch.bool)
    if kind == "mask":
        mask = torch.tensor([[True, True, False, True], [True, False, True, True]])[:, None, None, :]
        allowed = mask.expand_as(allowed)
    elif kind == "causal":
        allowed = torch.tril(allowed)
    ours = attend(*inputs, mask, causal=kind == "causal")
    slow = attend_by_loops(*inputs, allowed)
    torch.testing.assert_close(ours, slow, atol=1e-5, rtol=1e-5)
    weights = random(*ours.shape, seed=4).detach()
    for found, expected in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((slow * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_bfloat16_attention_on_a_cpu_stays_close_to_float32(training: bool) -> None:
    inputs = [random(2, 3, 6, 8, seed=i, dtype=torch.bfloat16) for i in range(3)]
    full = [x.detach().float().requires_grad_() for x in inputs]
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        ours = attend(*(inputs if training else [x.detach() for x in inputs]))
    assert ours.dtype == torch.bfloat16
    exact = attend(*full)
    torch.testing.assert_close(ours.float(), exact.detach(), atol=2e-2, rtol=2e-2)
    if training:
        found = torch.autograd.grad(ours.float().square().sum(), inputs)
        expected = torch.autograd.grad(exact.square().sum(), full)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f.float(), e, atol=6e-2, rtol=6e-2)


def self_attention() -> SelfAttention:
    layer = SelfAttention(24, 3)
    randomise(layer, seed=0)
    return layer.eval()


def test_causal_attention_does_not_see_later_tokens() -> None:
    layer, x = self_attention(), random(2, 6, 24).detach()
    changed = x.clone()
    changed[:, 4:] += 1.0
    before, after = layer(x, causal=True), layer(changed, causal=True)
    torch.testing.assert_close(before[:, :4], after[:, :4], atol=0, rtol=0)
    assert not torch.allclose(before[:, 4:], after[:, 4:])
    assert not torch.allclose(layer(x)[:, :4], layer(changed)[:, :4])  # both ways it does


def test_causal_and_padding_masks_combine() -> None:
    layer, x = self_attention(), random(2, 5, 24).detach()
    padded_first = torch.tensor([[False, True, True, True, True]] * 2)[:, None, None, :]
    whole = layer(x, padded_first, causal=True)
    torch.testing.assert_close(whole[:, 1:], layer(x[:, 1:], causal=True), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunks", [[1] * 7, [3, 1, 2, 1], [7], [1, 6]], ids=str)
def test_cached_self_attention_equals_uncached(chunks: list[int]) -> None:
    layer, x = self_attention(), random(3, 7, 24).detach()
    cache = LayerCache(9)
    parts = [layer(part, causal=True, cache=cache) for part in x.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x, causal=True), atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    layer, x = SelfAttention(24, 3, dropout=0.5), random(2, 6, 24).detach()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x), atol=0, rtol=0)


def test_folding_texts_of_an_image_equals_repeating_the_image_gradients_included() -> None:
    layer = CrossAttention(24, 16, 3)
    randomise(layer, seed=0)
    image, text = random(2, 5, 16, seed=1), random(6, 4, 24, seed=2)  # three texts for each of two images
    folded = layer(text, layer.project(image))
    repeated = layer(text, layer.project(image.repeat_interleave(3, dim=0)))
    torch.testing.assert_close(folded, repeated, atol=1e-6, rtol=1e-5)
    weights, wanted = random(*folded.shape, seed=3).detach(), [image, text, *layer.parameters()]
    for found, expected in zip(
        torch.autograd.grad((folded * weights).sum(), wanted, retain_graph=True),
        torch.autograd.grad((repeated * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_rows_that_do_not_divide_over_the_images_are_refused() -> None:
    layer = CrossAttention(24, 16, 3)
    with pytest.raises(ValueError, match="5 rows of text do not divide over 2 images"):
        layer(random(5, 4, 24), layer.project(random(2, 3, 16)))


def test_selected_images_are_the_named_ones_also_twice() -> None:
    layer, image = CrossAttention(24, 16, 3), random(3, 5, 16)
    index = torch.tensor([2, 0, 2])
    selected = layer.project(image).select(index)
    expected = layer.project(image[index])
    torch.testing.assert_close(selected.key, expected.key)
    torch.testing.assert_close(selected.value, expected.value)
