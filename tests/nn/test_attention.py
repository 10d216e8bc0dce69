"""Attention against loops, gradients included; folding and caching against the plain form."""

import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from openblip.nn import attention
from openblip.nn.attention import (
    CrossAttention,
    DecodingCache,
    LayerBuffer,
    LayerCache,
    PairCrossAttention,
    SelfAttention,
    SelfAttentionCache,
    attend,
    record_attention,
)
from tiny_blip import assert_same, randomise


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
    assert_same(ours, slow, inputs)


@pytest.mark.parametrize("kind", ["everywhere", "mask", "causal"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_bfloat16_attention_on_a_cpu_stays_close_to_float32(training: bool, kind: str) -> None:
    inputs = [random(2, 3, 6, 8, seed=i, dtype=torch.bfloat16) for i in range(3)]
    full = [x.detach().float().requires_grad_() for x in inputs]
    mask = torch.arange(6) < torch.tensor([4, 5])[:, None, None, None] if kind == "mask" else None
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        ours = attend(*(inputs if training else [x.detach() for x in inputs]), mask, causal=kind == "causal")
    assert ours.dtype == torch.bfloat16
    exact = attend(*full, mask, causal=kind == "causal")
    torch.testing.assert_close(ours.float(), exact.detach(), atol=2e-2, rtol=2e-2)
    if training:
        found = [gradient.float() for gradient in torch.autograd.grad(ours.float().square().sum(), inputs)]
        expected = list(torch.autograd.grad(exact.square().sum(), full))
        torch.testing.assert_close(found, expected, atol=6e-2, rtol=6e-2)


def test_bfloat16_attention_drops_weights_of_values_only() -> None:
    """Dropout leaves the expected value: the mean over many rows of equal queries."""
    query, key, value = (random(1, 1, 1, 8, seed=i, dtype=torch.bfloat16) for i in range(3))
    torch.manual_seed(0)
    mixed = attend(query.expand(2000, 2, -1, -1), key.expand(2000, 2, 3, -1), value.expand(2000, 2, 3, -1), dropout=0.5)
    shares = (mixed / value).float()  # each of three weights of 1/3 is dropped or doubled
    assert set(shares.detach().mul(3).round().unique().tolist()) == {0.0, 2.0, 4.0, 6.0}
    assert shares.mean().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("scores_at_once", [1, 2**22])
@pytest.mark.parametrize("shape", [None, (2, 1, 1, 7), (5, 7), (1, 1, 5, 7), (2, 3, 5, 7)])
def test_attention_by_products_takes_every_mask(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...] | None, scores_at_once: int
) -> None:
    """In bfloat16 on a CPU, as many images at a time as the constant says."""
    monkeypatch.setattr(attention, "HAS_AMX", False)
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", scores_at_once)
    query, key, value = (random(2, 3, n, 8, seed=n).detach() for n in (5, 7, 7))
    mask = None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    if mask is not None:
        mask[..., 0] = True  # nothing attends to nothing
    exact = attend(query, key, value, mask)
    found = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), mask)
    torch.testing.assert_close(found.float(), exact, atol=3e-2, rtol=3e-2)


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
    # and together with a mask of padding
    padded_first = torch.tensor([[False, True, True, True, True]] * 2)[:, None, None, :]
    whole = layer(x[:, :5], padded_first, causal=True)
    torch.testing.assert_close(whole[:, 1:], layer(x[:, 1:5], causal=True), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunks", [[1] * 7, [3, 1, 2, 1], [7], [1, 6]], ids=str)
def test_cached_self_attention_equals_uncached(chunks: list[int]) -> None:
    """Concatenated, and in the slots of a buffer with room to spare, from last to first."""
    layer, x = self_attention(), random(3, 7, 24).detach()
    cache, buffer, later = LayerCache(), LayerBuffer(9), torch.arange(9).flip(0)
    for part, slots in zip(x.split(chunks, dim=1), later[:7].split(chunks), strict=True):
        grown = layer(part, causal=True, cache=cache)
        buffer.slots = slots
        written = layer(part, torch.arange(9) >= slots[:, None], causal=True, cache=buffer)
        expected = layer(x, causal=True)[:, cache.length - part.shape[1] : cache.length]
        torch.testing.assert_close(grown, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(written, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_acts_in_training_only(training: bool) -> None:
    layer, x = SelfAttention(24, 3, dropout=0.5).train(training), random(2, 6, 24).detach()
    assert torch.equal(layer(x), layer(x)) != training


def test_folding_texts_of_an_image_equals_repeating_the_image_gradients_included() -> None:
    layer = cross_attention()
    image, text = random(2, 5, 16, seed=1), random(6, 4, 24, seed=2)  # three texts for each of two images
    folded = layer(text, layer.project(image))
    repeated = layer(text, layer.project(image.repeat_interleave(3, dim=0)))
    assert_same(folded, repeated, [image, text, *layer.parameters()])
    with pytest.raises(ValueError, match="5 rows of text do not divide over 2 images"):
        layer(random(5, 4, 24), layer.project(image))


MASK = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [True] * 4 + [False]])  # of three contexts


def cross_attention(dtype: torch.dtype = torch.float32) -> CrossAttention:
    layer = CrossAttention(24, 16, 3).to(dtype)
    randomise(layer, seed=0)
    return layer.eval()


def test_a_padded_context_equals_the_context_alone_gradients_included() -> None:
    layer, context, text = cross_attention(), random(3, 5, 16, seed=1), random(6, 4, 24, seed=2)
    padded = layer(text, layer.project(context, MASK))
    alone = torch.cat(
        [
            layer(text[2 * row : 2 * row + 2], layer.project(context[row : row + 1, :length]))
            for row, length in enumerate(MASK.sum(dim=1).tolist())
        ]
    )
    context_gradient, *_ = assert_same(padded, alone, [context, text, *layer.parameters()])
    assert (context_gradient[~MASK] == 0).all()


def test_a_masked_context_is_softmax_over_its_real_tokens() -> None:
    layer, context, text = cross_attention(), random(3, 5, 16, seed=1), random(3, 2, 24, seed=2)
    kv = layer.project(context, MASK)
    query = layer.query(text).unflatten(-1, (3, 8)).transpose(1, 2)
    mixed = attend_by_loops(query, kv.key, kv.value, MASK[:, None, None].expand(3, 3, 2, 5))
    expected = layer.out(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(text, kv), expected, atol=1e-5, rtol=1e-5)


def test_a_context_is_selected_with_its_mask() -> None:
    layer, context, text = cross_attention(), random(3, 5, 16).detach(), random(4, 2, 24, seed=2)
    index = torch.tensor([1, 2, 1, 0])
    selected = layer.project(context, MASK).select(index)
    expected = layer.project(context[index], MASK[index])
    assert torch.equal(selected.key, expected.key)
    assert torch.equal(selected.value, expected.value)
    torch.testing.assert_close(layer(text, selected), layer(text, expected), atol=0, rtol=0)
    assert not torch.allclose(layer(text, selected), layer(text, layer.project(context[index])), atol=1e-3)


def pair_attention(learned_merge: bool, dropout: float = 0.0) -> PairCrossAttention:
    layer = PairCrossAttention(24, 16, 3, dropout, learned_merge)
    randomise(layer, seed=0)
    return layer.eval()


def test_two_images_are_merged_by_their_mean_or_by_a_linear_layer_over_both() -> None:
    context, text = random(2, 2, 5, 16, seed=1), random(6, 4, 24, seed=2)  # three texts for each pair
    mean, linear = pair_attention(learned_merge=False), pair_attention(learned_merge=True)
    for layer in (mean, linear):
        first = layer.first(text, layer.first.project(context[:, 0]))
        second = layer.second(text, layer.second.project(context[:, 1]))
        assert not torch.allclose(first, second, atol=1e-2)
        if layer.merge is None:
            expected = (first + second) / 2
        else:
            weight, bias = (layer.merge.weight, layer.merge.bias)  # (D, 2D): the first image's half, then the other
            expected = first @ weight[:, :24].T + second @ weight[:, 24:].T + bias
        torch.testing.assert_close(layer(text, layer.project(context)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("learned_merge", [False, True])
def test_folding_texts_of_a_pair_equals_repeating_the_pair_gradients_included(learned_merge: bool) -> None:
    layer, context, text = pair_attention(learned_merge), random(2, 2, 5, 16), random(6, 4, 24, seed=2)
    folded = layer(text, layer.project(context))
    repeated = layer(text, layer.project(context.repeat_interleave(3, dim=0)))
    assert_same(folded, repeated, [context, text, *layer.parameters()])
    assert not torch.allclose(folded, layer(text, layer.project(context.flip(1))), atol=1e-2)  # not exchangeable
    index = torch.tensor([1, 0, 1])
    selected = layer(text, layer.project(context).select(index))
    torch.testing.assert_close(selected, layer(text, layer.project(context[index])), atol=0, rtol=0)
    with pytest.raises(ValueError, match="no padding: pass no mask"):
        layer.project(context, torch.ones(2, 5, dtype=torch.bool))


TWO_MASKS = torch.tensor([[True, True, True, False, False], [True, False, True, True, True]])


@pytest.mark.parametrize("mask", [None, TWO_MASKS], ids=["whole", "padded"])
def test_written_out_equals_fused_gradients_included(mask: Tensor | None) -> None:
    layer = cross_attention()
    context, text = random(2, 5, 16), random(6, 4, 24, seed=1)
    fused = layer(text, layer.project(context, mask))
    recording, weights = record_attention(layer, layer)
    written_out = recording(text, layer.project(context, mask))
    assert_same(written_out, fused, [context, text, *layer.parameters()])
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

    recording, weights = record_attention(layer, layer)
    output = recording(text, kv)
    (gradient,) = torch.autograd.grad(output.square().sum(), weights[0])
    for place in range(gradient.numel()):
        change = torch.zeros(gradient.numel(), dtype=torch.float64)
        change[place] = 1e-6
        change = change.view(gradient.shape)
        difference = (score(change) - score(-change)) / 2e-6
        assert float(gradient.flatten()[place]) == pytest.approx(float(difference), rel=1e-5, abs=1e-7)


def test_frozen_weights_are_explained_as_well() -> None:
    layer = cross_attention().requires_grad_(False)
    recording, weights = record_attention(layer, layer)
    output = recording(random(1, 2, 24).detach(), layer.project(random(1, 4, 16).detach()))
    assert torch.autograd.grad(output.sum(), weights[0])[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_keep_wide_weights(dtype: torch.dtype) -> None:
    layer = cross_attention(dtype)
    text, context = random(1, 2, 24, dtype=dtype), random(1, 4, 16, dtype=dtype)
    recording, weights = record_attention(layer, layer)
    found = recording(text, layer.project(context))
    assert found.dtype == dtype
    assert weights[0].dtype == torch.float32
    torch.testing.assert_close(found, layer(text, layer.project(context)), atol=0.1, rtol=0.1)


def test_only_the_view_records_and_shares_all_else() -> None:
    model = nn.ModuleDict({"other": cross_attention(), "pair": pair_attention(learned_merge=True)})
    attention = model["pair"].second
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    view, weights = record_attention(model, attention)
    text, context = random(1, 2, 24), random(1, 2, 4, 16)
    output = model["pair"](text, model["pair"].project(context))
    assert weights == []
    torch.testing.assert_close(view["pair"](text, view["pair"].project(context)), output)
    assert len(weights) == 1
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert view["other"] is model["other"]
    assert all(a is b for a, b in zip(view.parameters(), model.parameters(), strict=True))
    pickle.dumps(model)
    with pytest.raises(ValueError, match="never causal"):
        view["pair"].second.attend(text[None], text[None], text[None], causal=True)


def test_tokens_stand_in_their_slots_and_rows_can_be_selected() -> None:
    """Row r of layer l has keys of 10 * l + r in slots 4 and 1, and values of that plus 100; the rest is zero."""
    cache = DecodingCache(2, 5).at(torch.tensor([4, 1]))
    for number, layer in enumerate(cache.layers):
        key = (10.0 * number + torch.arange(3)).view(3, 1, 1, 1).expand(3, 2, 2, 4)
        buffers = layer.append(key, key + 100)
        assert all(buffer.shape == (3, 2, 5, 4) for buffer in buffers)
        assert not buffers[0][:, :, [0, 2, 3]].any()
    part, repeated = cache.map(lambda x: x[1:]), cache.map(lambda x: x[torch.tensor([0, 0])])
    for each, rows in ((cache, [0, 1, 2]), (part, [1, 2]), (repeated, [0, 0])):
        found = [x[:, 1, slot, 2].tolist() for x in each.tensors() for slot in (1, 4)]
        starts = (0.0, 100.0, 10.0, 110.0)
        assert found == [[start + row for row in rows] for start in starts for _ in range(2)]
    part.tensors()[0].zero_()
    assert cache.tensors()[0].any(dim=1).any(dim=-1).any(dim=-1).tolist() == [False, False, False]
    assert repeated.tensors()[2].any()


def test_a_growing_cache_keeps_gradients_and_branches() -> None:
    """What one branch reads, neither the other nor the trunk ever sees."""
    trunk, first = SelfAttentionCache(2), torch.ones(1, 1, 2, 3, requires_grad=True)
    for layer in trunk.layers:
        layer.append(first, 2 * first)
    branch, other = trunk.copy(), trunk.copy()
    for number, layer in enumerate(branch.layers):
        key, value = layer.append(torch.full((1, 1, 1, 3), 7.0 + number), torch.zeros(1, 1, 1, 3))
        assert key[0, 0, :, 0].tolist() == [1.0, 1.0, 7.0 + number]
        assert value[0, 0, :, 0].tolist() == [2.0, 2.0, 0.0]
    key, value = other.layers[0].append(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3))
    assert (trunk.length, branch.length, other.length) == (2, 3, 5)
    (key.sum() + value.sum()).backward()
    assert torch.equal(first.grad, torch.full((1, 1, 2, 3), 3.0))
    assert SelfAttentionCache(2).length == SelfAttentionCache(2).copy().length == 0
