"""What can stand between an image encoder and a language model in place of the Q-Former, and reads no text.

B images, N image tokens, Dv their width, Q tokens for the language model, D their width, G = sqrt(N) patches a side.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.errors import ConfigError
from openblip.nn.attention import CrossAttention
from openblip.nn.config import ConnectorConfig, PatchMlpConfig, PoolingConfig, ResamplerConfig, SoftPromptConfig
from openblip.nn.linear import FeedForward


class Connector(nn.Module):
    """Image tokens (B, N, Dv) -> tokens (B, Q, D) for the language model. `width` is D."""

    width: int


class Pooling(Connector):
    """The average of the patches of each field of a square grid; the class token, if there is one, is left out."""

    def __init__(self, config: PoolingConfig, context_dim: int) -> None:
        super().__init__()
        self.width, self.side = context_dim, config.side

    def forward(self, image_tokens: Tensor) -> Tensor:
        """(B, N, Dv) -> (B, side * side, Dv). ConfigError for tokens that are no square grid, as those of a video."""
        num_tokens = image_tokens.shape[1]
        grid = math.isqrt(num_tokens)
        num_others = num_tokens - grid * grid  # the class token
        if num_others > 1:
            raise ConfigError(f"{num_tokens} image tokens are no square grid, which pooling needs: give images.")
        patches = image_tokens[:, num_others:].transpose(1, 2).unflatten(2, (grid, grid))  # (B, Dv, G, G)
        return F.adaptive_avg_pool2d(patches, self.side).flatten(2).transpose(1, 2)


class PatchMlp(Connector):
    """A hidden layer over each image token; the language model's projection is the layer after it (LLaVA 1.5)."""

    def __init__(self, config: PatchMlpConfig, context_dim: int) -> None:
        super().__init__()
        self.width, self.hidden = config.hidden_dim, nn.Linear(context_dim, config.hidden_dim)

    def forward(self, image_tokens: Tensor) -> Tensor:
        """(B, N, Dv) -> (B, N, D)."""
        return F.gelu(self.hidden(image_tokens))


class SoftPrompts(Connector):
    """A linear map of the mean image token to several tokens (Frozen section 3.1)."""

    def __init__(self, config: SoftPromptConfig, context_dim: int) -> None:
        super().__init__()
        self.width = config.hidden_dim
        self.prompts = nn.Linear(context_dim, config.num_queries * config.hidden_dim)

    def forward(self, image_tokens: Tensor) -> Tensor:
        """(B, N, Dv) -> (B, Q, D)."""
        return cast(Tensor, self.prompts(image_tokens.mean(dim=1)).unflatten(1, (-1, self.width)))


class ResamplerLayer(nn.Module):
    """Queries attend to the image and to each other, and pass a feed-forward; both after a norm, and added."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.image_norm, self.query_norm, self.feed_forward_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = CrossAttention(width, width, config.num_heads)
        self.feed_forward = FeedForward(width, config.mlp_dim)

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        """Queries (B, Q, D) over image tokens (B, N, D) -> (B, Q, D)."""
        normed = self.query_norm(queries)
        context = torch.cat([self.image_norm(image), normed], dim=1)
        queries = queries + self.attention(normed, self.attention.project(context))
        return cast(Tensor, queries + self.feed_forward(self.feed_forward_norm(queries)))


class Resampler(Connector):
    """Learned queries that attend to the image, layer by layer (the Perceiver Resampler of Flamingo, section 3.1.1)."""

    def __init__(self, config: ResamplerConfig, context_dim: int) -> None:
        super().__init__()
        self.width = config.hidden_dim
        self.image_proj = nn.Linear(context_dim, config.hidden_dim)
        self.queries = nn.Parameter(torch.zeros(1, config.num_queries, config.hidden_dim))
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_dim)

    def forward(self, image_tokens: Tensor) -> Tensor:
        """(B, N, Dv) -> (B, Q, D)."""
        image = self.image_proj(image_tokens)
        queries = self.queries.expand(len(image), -1, -1)
        for layer in self.layers:
            queries = layer(queries, image)
        return cast(Tensor, self.norm(queries))


def make_connector(config: ConnectorConfig, context_dim: int) -> Connector:
    """The connector that a config describes, over image tokens of width `context_dim`."""
    match config:
        case PoolingConfig():
            return Pooling(config, context_dim)
        case PatchMlpConfig():
            return PatchMlp(config, context_dim)
        case SoftPromptConfig():
            return SoftPrompts(config, context_dim)
        case ResamplerConfig():
            return Resampler(config, context_dim)
