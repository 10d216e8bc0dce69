"""Connectors against slow and obvious computations, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.errors import ConfigError
from openblip.nn.config import PatchMlpConfig, PoolingConfig, ResamplerConfig, SoftPromptConfig
from openblip.nn.connectors import make_connector
from tiny_blip import assert_same, randomise

WIDTH = 12


def tokens(count: int) -> Tensor:
    return torch.randn(2, count, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_pooling_is_the_mean_of_the_patches_of_each_field() -> None:
    pooling, image = make_connector(PoolingConfig(side=2), WIDTH), tokens(1 + 16)
    fields = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    expected = torch.stack([image[:, [1 + patch for patch in field]].mean(dim=1) for field in fields], dim=1)
    assert_same(pooling(image), expected, [image])
    torch.testing.assert_close(pooling(image[:, 1:]), expected)  # of an encoder without a class token
    with pytest.raises(ConfigError, match="no square grid"):
        pooling(tokens(2 * 17))


def test_a_layer_over_each_patch_and_a_linear_map_of_their_mean() -> None:
    image = tokens(5)
    mlp, prompts = (
        make_connector(PatchMlpConfig(hidden_dim=7), WIDTH),
        make_connector(SoftPromptConfig(hidden_dim=6), WIDTH),
    )
    for module in (mlp, prompts):
        randomise(module, seed=1)
    weight, bias = mlp.hidden.weight, mlp.hidden.bias
    assert_same(mlp(image), F.gelu(torch.stack([row @ weight.T + bias for row in image])), [image, weight])
    weight, bias = prompts.prompts.weight, prompts.prompts.bias
    rows = [sum(patches) / 5 @ weight.T + bias for patches in image]
    assert_same(prompts(image), torch.stack([torch.stack([row[:6], row[6:]]) for row in rows]), [image, weight])


def test_a_resampler_attends_to_image_and_queries_one_query_and_head_at_a_time() -> None:
    config = ResamplerConfig(num_queries=3, hidden_dim=8, num_layers=2, num_heads=2, mlp_dim=16)
    resampler, image = make_connector(config, WIDTH), tokens(5)
    randomise(resampler, seed=2)

    def attended(layer: torch.nn.Module, queries: Tensor, context: Tensor) -> Tensor:
        attention, rows = layer.attention, []
        keys, values = attention.key_value(context).chunk(2, dim=-1)
        for query in attention.query(queries):
            heads = []
            for head in (slice(0, 4), slice(4, 8)):
                weights = (keys[:, head] @ query[head] / 2).softmax(0)
                heads.append(weights @ values[:, head])
            rows.append(torch.cat(heads))
        return attention.out(torch.stack(rows))

    expected = []
    for row in resampler.image_proj(image):
        queries = resampler.queries[0]
        for layer in resampler.layers:
            normed = layer.query_norm(queries)
            queries = queries + attended(layer, normed, torch.cat([layer.image_norm(row), normed]))
            queries = queries + layer.feed_forward(layer.feed_forward_norm(queries))
        expected.append(resampler.norm(queries))
    assert_same(resampler(image), torch.stack(expected), [image, resampler.queries])
