"""The random weights that a new model starts from."""

import torch
from torch import nn

from openblip.nn.attention import PairCrossAttention


def initialise(module: nn.Module) -> None:
    """Truncated normal weights and zero biases, as ViT and BERT start.

    Their 0.02 suits a width of 768; it is scaled so that other widths pass signals on as well.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        fan_in = module.weight[0].numel()
        nn.init.trunc_normal_(module.weight, std=0.02 * (768 / fan_in) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, PairCrossAttention) and module.merge is not None:
        # As the mean that the lower layers take; the released code starts this layer from random weights.
        half = 0.5 * torch.eye(module.merge.out_features)
        with torch.no_grad():
            module.merge.weight.copy_(torch.cat([half, half], dim=1))
