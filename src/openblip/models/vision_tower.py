"""Frozen image encoders of BLIP-2: our own ViT, or a vision model of Hugging Face (BLIP-2 section 3.1).

B images, S side of the picture, N image tokens, Dv their width.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from openblip.errors import CheckpointError


class ImageEncoder(Protocol):
    """What the Q-Former needs of an image encoder."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """float (B, 3, S, S), normalised -> features (B, N, Dv)."""
        ...


class VisionTower(nn.Module):
    """A vision model of transformers (CLIP, SigLIP, DINOv2, ...), read at one of its layers.

    model: a vision model, or one of image and text whose image side is taken. layer: an index into its hidden
    states, 0 the embeddings, -1 the last layer, -2 the one before (BLIP-2's choice).
    """

    def __init__(self, model: Any, layer: int) -> None:
        super().__init__()
        self.model = getattr(model, "vision_model", model)
        self.layer = layer
        depth = int(self.model.config.num_hidden_layers) + 1
        if not -depth <= layer < depth:
            raise CheckpointError(
                f"The image encoder has {depth} hidden states, embeddings first; there is no layer {layer}."
            )

    @property
    def hidden_dim(self) -> int:
        """Dv."""
        return int(self.model.config.hidden_size)

    @property
    def image_size(self) -> int:
        """S."""
        return int(self.model.config.image_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """float (B, 3, S, S), normalised -> features (B, N, Dv), without the model's final norm."""
        output = self.model(pixel_values=pixels, output_hidden_states=True)
        features: Tensor = output.hidden_states[self.layer]
        return features


def run_frozen(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """Features of an encoder that is not trained, in its own precision: no graph is kept."""
    weights = next(encoder.parameters())
    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        features: Tensor = encoder(pixels.to(weights.dtype))
    return features
