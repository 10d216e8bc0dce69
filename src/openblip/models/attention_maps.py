"""Where the text transformer of BLIP looks at its image, and where the queries of BLIP-2 do.

B images, K rows of text for each, R = B * K, T text tokens, Q queries, N image tokens, H heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

from torch import Tensor

from openblip.errors import ConfigError
from openblip.models.blip import Blip
from openblip.models.blip2 import Blip2
from openblip.models.config import Mode
from openblip.nn.attention import CrossAttention, SelfAttention
from openblip.nn.attention_weights import recorded_weights
from openblip.nn.qformer import QFormerLayer
from openblip.nn.text_transformer import MedLayer


@contextmanager
def cross_attention_weights(model: Blip, mode: Mode, layer: int) -> Iterator[list[Tensor]]:
    """Inside, the list it gives receives the cross-attention weights (B, H, K * T, N) of a layer: one tensor
    for every reading in `mode`, and in the other one where both share their cross-attention.

    ConfigError when there is no such layer.
    """
    layers = model.text.layers
    if not 0 <= layer < len(layers):
        raise ConfigError(f"layer {layer}: this model has the layers 0 to {len(layers) - 1}.")
    branch = cast(MedLayer, layers[layer]).cross_attention[mode].branch
    with recorded_weights(cast(CrossAttention, branch)) as weights:
        yield weights


class QueryWeights(NamedTuple):
    """Attention weights of a layer of the Q-Former, a tensor for every reading."""

    image: list[Tensor]
    """(B, H, K * Q, N): where the queries look."""
    tokens: list[Tensor]
    """(R, H, Q + T, Q + T): what queries and text then see of each other, in the next layer (in the last one
    before)."""


@contextmanager
def query_weights(model: Blip2, layer: int | None) -> Iterator[QueryWeights]:
    """Inside, what it gives receives the weights of a layer whose queries attend to the image.

    layer: None is the middle one of these. ConfigError for another.
    """
    layers = [cast(QFormerLayer, each) for each in model.qformer.layers]
    looking = {i: each.cross_attention for i, each in enumerate(layers) if each.cross_attention is not None}
    layer = list(looking)[len(looking) // 2] if layer is None else layer
    if layer not in looking:
        possible = ", ".join(map(str, looking))
        raise ConfigError(f"layer {layer}: the queries attend to the image in layers {possible}.")
    cross = cast(CrossAttention, looking[layer].branch)
    following = cast(SelfAttention, layers[min(layer + 1, len(layers) - 1)].self_attention.branch)
    with recorded_weights(cross) as image, recorded_weights(following) as tokens:
        yield QueryWeights(image, tokens)
