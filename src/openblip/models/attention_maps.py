"""Where the text transformer looks at its image.

B images, K rows of text for each, T text tokens, N image tokens, H heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor

from openblip.errors import ConfigError
from openblip.models.blip import Blip
from openblip.models.config import Mode
from openblip.nn.attention import CrossAttention
from openblip.nn.attention_weights import recorded_weights
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
