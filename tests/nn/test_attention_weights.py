"""Attention written out: the same result as the fused one, and gradients with respect to its weights."""

import pytest
import torch
from torch import Tensor

from openblip.nn.attention import CrossAttention, attend, capture_attention
from tiny_blip import randomise


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cross_attention(dtype: torch.dtype = torch.float32) -> CrossAttention:
    layer = CrossAttention(24, 16, 3).to(dtype).eval()
    randomise(layer, seed=0)
    return layer


MASK = torch.tensor([[True, True, True, False, False], [True, False, True, True, True]])


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_written_out_equals_fused_gradients_included(mask: Tensor | None) -> None:
    layer = cross_attention()
    context, text = random(2, 5, 16).requires_grad_(), random(6, 4, 24, seed=1).requires_grad_()
    wanted, coefficients = [context, text, *layer.parameters()], random(6, 4, 24, seed=2)
    fused = layer(text, layer.project(context, mask))
    expected = torch.autograd.grad((fused * coefficients).sum(), wanted)
    with capture_attention(layer) as weights:
        written_out = layer(text, layer.project(context, mask))
    torch.testing.assert_close(written_out, fused, atol=1e-6, rtol=1e-5)
    found = torch.autograd.grad((written_out * coefficients).sum(), wanted)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)
    (recorded,) = weights
    assert recorded.shape == (2, 3, 12, 5)  # three texts of four tokens for each context
    torch.testing.assert_close(recorded.sum(dim=-1), torch.ones(2, 3, 12))
    if mask is not None:
        assert not recorded[0, ..., 3:].any()


def test_the_gradient_is_what_a_change_of_a_weight_does() -> None:
    """Against finite differences, in float64."""
    layer = cross_attention(torch.float64)
    context, text = random(1, 4, 16, dtype=torch.float64), random(1, 2, 24, seed=1, dtype=torch.float64)
    kv = layer.project(context)

    @torch.no_grad()
    def score(change: Tensor) -> Tensor:
        query = layer.query(text).unflatten(-1, (3, -1)).transpose(1, 2)
        mixing = (query @ kv.key.transpose(-2, -1) / 8**0.5).softmax(dim=-1) + change
        return layer.out((mixing @ kv.value).transpose(1, 2).flatten(2)).square().sum()

    with capture_attention(layer) as weights:
        output = layer(text, kv)
    (gradient,) = torch.autograd.grad(output.square().sum(), weights[0])
    for place in range(gradient.numel()):
        change = torch.zeros(gradient.numel(), dtype=torch.float64)
        change[place] = 1e-6
        change = change.view(gradient.shape)
        difference = (score(change) - score(-change)) / 2e-6
        assert float(gradient.flatten()[place]) == pytest.approx(float(difference), rel=1e-5, abs=1e-7)


def test_frozen_weights_are_explained_as_well() -> None:
    layer = cross_attention().requires_grad_(False)
    with capture_attention(layer) as weights:
        output = layer(random(1, 2, 24), layer.project(random(1, 4, 16)))
    (gradient,) = torch.autograd.grad(output.sum(), weights[0])
    assert gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_keep_wide_weights(dtype: torch.dtype) -> None:
    layer = cross_attention(dtype)
    text, context = random(1, 2, 24, dtype=dtype), random(1, 4, 16, dtype=dtype)
    with capture_attention(layer) as weights:
        found = layer(text, layer.project(context))
    assert found.dtype == dtype
    assert weights[0].dtype == torch.float32
    torch.testing.assert_close(found, layer(text, layer.project(context)), atol=0.1, rtol=0.1)


def test_afterwards_everything_is_as_before() -> None:
    layer = cross_attention()
    with pytest.raises(RuntimeError, match="stop"), capture_attention(layer) as weights:
        raise RuntimeError("stop")
    assert layer.attend is attend
    layer(random(1, 2, 24), layer.project(random(1, 4, 16)))
    assert weights == []


def test_cross_attention_is_never_causal() -> None:
    layer = cross_attention()
    with capture_attention(layer), pytest.raises(ValueError, match="never causal"):
        layer.attend(random(1, 3, 2, 8), random(1, 3, 2, 8), random(1, 3, 2, 8), causal=True)
