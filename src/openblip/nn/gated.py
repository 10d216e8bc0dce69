"""Gated cross-attention between the layers of a frozen language model (Flamingo section 3.1.2).

R rows of text, T text tokens, I images before a text, Q tokens of each, D width.
"""

from typing import cast

import torch
from torch import Tensor, nn

from openblip.nn.attention import CrossAttention, KeyValue
from openblip.nn.config import GatedConfig
from openblip.nn.linear import FeedForward


class GatedLayer(nn.Module):
    """Cross-attention to images and a feed-forward, each after a norm and times the tanh of a gate, which starts at 0:
    at first the language model is as it was.
    """

    def __init__(self, config: GatedConfig, width: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CrossAttention(width, width, config.num_heads)
        self.feed_forward = FeedForward(width, config.mlp_dim)
        self.attention_gate, self.feed_forward_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, x: Tensor, images: KeyValue) -> Tensor:
        """States (R, T, D) of texts over the keys and values of R rows of images -> (R, T, D)."""
        x = x + self.attention_gate.tanh() * self.attention(self.attention_norm(x), images)
        return cast(Tensor, x + self.feed_forward_gate.tanh() * self.feed_forward(self.feed_forward_norm(x)))
