"""The self-attention caches: rows are moved together in every layer, prefixes are read once."""

import pytest
import torch
from torch import Tensor

from openblip.nn.attention import SelfAttentionCache


def fed_cache(num_layers: int = 2, rows: int = 3, tokens: int = 2) -> SelfAttentionCache:
    """Row r of layer l holds keys of 10 * l + r, and values of that plus 100."""
    cache = SelfAttentionCache(num_layers, max_length=5)
    for number, layer in enumerate(cache.layers):
        key = (10.0 * number + torch.arange(rows)).view(rows, 1, 1, 1).expand(rows, 2, tokens, 4)
        layer.append(key, key + 100)
    return cache


def rows_of(cache: SelfAttentionCache) -> list[tuple[list[float], list[float]]]:
    """Per layer the rows' keys and values, read by appending nothing."""
    found = []
    for layer in cache.layers:
        rows = layer._key.shape[0]  # append needs the number of rows
        nothing = torch.zeros(rows, 2, 0, 4)
        key, value = layer.append(nothing, nothing)
        found.append((first_entries(key), first_entries(value)))
    return found


def first_entries(x: Tensor) -> list[float]:
    assert (x == x[:, :1, :1, :1]).all()
    return x[:, 0, 0, 0].tolist()


def test_reorder_moves_keys_and_values_of_every_layer() -> None:
    cache = fed_cache()
    cache.reorder(torch.tensor([2, 0, 2]))
    assert rows_of(cache) == [([2.0, 0.0, 2.0], [102.0, 100.0, 102.0]), ([12.0, 10.0, 12.0], [112.0, 110.0, 112.0])]
    assert cache.length == 2


def test_reorder_may_drop_rows() -> None:
    cache = fed_cache()
    cache.reorder(torch.tensor([1]))
    assert rows_of(cache)[0] == ([1.0], [101.0])


def test_repeat_makes_consecutive_copies() -> None:
    cache = fed_cache(rows=2)
    cache.reorder(torch.tensor([0, 0, 1, 1]))
    assert rows_of(cache)[1][0] == [10.0, 10.0, 11.0, 11.0]


def test_rows_of_a_new_cache_may_be_moved() -> None:
    cache = SelfAttentionCache(2, max_length=5)
    cache.reorder(torch.tensor([0]))
    assert cache.length == 0


def test_tokens_beyond_the_length_are_refused_by_name() -> None:
    cache = fed_cache(tokens=4)
    with pytest.raises(ValueError, match="holds 5 tokens; 6 were fed"):
        cache.layers[0].append(torch.zeros(3, 2, 2, 4), torch.zeros(3, 2, 2, 4))


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


def test_a_new_growing_cache_has_read_nothing() -> None:
    assert SelfAttentionCache(2).length == SelfAttentionCache(2).copy().length == 0
