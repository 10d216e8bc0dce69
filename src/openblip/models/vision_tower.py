"""Frozen image encoders of BLIP-2: our own ViT, or a vision model of Hugging Face (BLIP-2 section 3.1).

B images, S side of the picture, P patch size, G = S/P patches a side, N image tokens, Dv their width.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.errors import CheckpointError

GROUP = 32
"""Pictures that a frozen encoder takes at a time on an accelerator."""


class VisionTower(nn.Module):
    """A vision model of transformers (SigLIP, DINOv2, ViT, ...), read at one of its layers.

    model: a vision model, or one of image and text whose image side is taken. layer: an index into its hidden
    states, 0 the embeddings, -1 the last layer, -2 the one before (BLIP-2's choice).
    """

    def __init__(self, model: Any, layer: int) -> None:
        super().__init__()
        self.model = getattr(model, "vision_model", model)
        self.layer = layer
        check_layer(layer, int(self.model.config.num_hidden_layers))

    @property
    def hidden_dim(self) -> int:
        """Dv."""
        return int(self.model.config.hidden_size)

    @property
    def image_size(self) -> int:
        """S of the model's own position embeddings."""
        config = self.model.config
        if config.model_type == "siglip2_vision_model":
            return int(round(config.num_patches**0.5) * config.patch_size)
        size = config.image_size
        return int(size if isinstance(size, int) else size[0])

    def forward(self, pixels: Tensor) -> Tensor:
        """float (B, 3, S, S), normalised -> features (B, N, Dv), without the model's final norm.

        Another S than the model's own interpolates its position embeddings, where it can.
        """
        output = self.model(**self._inputs(pixels), output_hidden_states=True)
        features: Tensor = output.hidden_states[self.layer]
        return features

    def _inputs(self, pixels: Tensor) -> dict[str, Any]:
        if self.model.config.model_type == "siglip2_vision_model":  # takes pictures of any shape, as patches
            return flat_patches(pixels, int(self.model.config.patch_size))
        inputs: dict[str, Any] = {"pixel_values": pixels}
        if pixels.shape[-1] != self.image_size and _takes_interpolation(self.model):
            inputs["interpolate_pos_encoding"] = True
        return inputs


def check_layer(layer: int, num_layers: int) -> None:
    """CheckpointError unless `layer` is an index into hidden states: embeddings first, then each layer's."""
    if not -num_layers - 1 <= layer <= num_layers:
        raise CheckpointError(
            f"The image encoder has {num_layers + 1} hidden states, embeddings first, and no layer {layer}."
        )


def flat_patches(pixels: Tensor, patch_size: int) -> dict[str, Tensor]:
    """What SigLIP 2 of flexible shapes takes of whole pictures: patches (B, G*G, P*P*3), all of them real."""
    patches = F.unfold(pixels, patch_size, stride=patch_size).transpose(1, 2)  # (B, G*G, 3*P*P)
    patches = patches.unflatten(2, (3, -1)).transpose(2, 3).flatten(2)  # colours last
    grid = pixels.shape[-1] // patch_size
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device),
        "spatial_shapes": torch.full((len(patches), 2), grid, dtype=torch.long, device=pixels.device),
    }


def run_frozen(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """Features of an encoder that is not trained, in its own precision: no graph is kept.

    A picture's features do not depend on the others of its batch, nor on its place among them, to the last
    bit: the encoder sees pictures in groups of one fixed size, filled up with black ones. On a CPU that is
    one picture, since its kernels share out the rows of a larger group among threads, and round differently
    by place; on accelerators GROUP.
    """
    size = _group_size(pixels.device)
    features = []
    for group in pixels.split(size):
        missing = size - len(group)
        filled = torch.cat([group, group.new_zeros(missing, *group.shape[1:])]) if missing else group
        features.append(run_without_graph(encoder, filled)[: len(group)])
    return torch.cat(features)


def run_without_graph(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """Features in the encoder's own precision, all pictures at once."""
    weights = next(encoder.parameters())
    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        features: Tensor = encoder(pixels.to(weights.dtype))
    return features


def _takes_interpolation(model: nn.Module) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters


def _group_size(device: torch.device) -> int:
    return 1 if device.type == "cpu" else GROUP
