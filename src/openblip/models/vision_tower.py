"""Frozen image encoders of BLIP-2: our own ViT, or a vision model of transformers (BLIP-2 section 3.1).

B images, S image size, P patch size, G = S/P patches a side, N image tokens, Dv their width.
"""

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.errors import CheckpointError
from openblip.nn.vit import VisionTransformer


class VisionTower(nn.Module):
    """A vision model of transformers (SigLIP, DINOv2, ViT, ...) whose output is that of one of its layers.

    model: a vision model, or an image-text model, of which the image side is taken. layer: an index into its
    hidden states: 0 is the embeddings, -1 the last layer, -2 the layer before it (BLIP-2's choice).
    """

    def __init__(self, model: Any, layer: int) -> None:
        super().__init__()
        self.model = getattr(model, "vision_model", model)
        self.layer = layer
        check_layer(layer, int(self.model.config.num_hidden_layers))

    @property
    def hidden_dim(self) -> int:
        """Dv, the width of its features."""
        return int(self.model.config.hidden_size)

    @property
    def image_size(self) -> int:
        """S, the image size that the model's position embeddings are for."""
        config = self.model.config
        if config.model_type == "siglip2_vision_model":
            return int(round(config.num_patches**0.5) * config.patch_size)
        return int(config.image_size if isinstance(config.image_size, int) else config.image_size[0])

    def forward(self, pixels: Tensor) -> Tensor:
        """float (B, 3, S, S), normalised -> features (B, N, Dv), without the model's final norm. For another S than
        `image_size` the position embeddings are interpolated, where the model can do so.
        """
        pixels = pixels.to(next(self.model.parameters()).dtype)
        inputs: dict[str, Any] = {"pixel_values": pixels}
        if self.model.config.model_type == "siglip2_vision_model":  # takes images of any shape, as patches
            patch = int(self.model.config.patch_size)
            patches = F.unfold(pixels, patch, stride=patch).transpose(1, 2)  # (B, G*G, 3*P*P)
            patches = patches.unflatten(2, (3, -1)).transpose(2, 3).flatten(2)  # channels last
            shapes = torch.full((len(pixels), 2), pixels.shape[-1] // patch, dtype=torch.long, device=pixels.device)
            mask = torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device)  # none is padding
            inputs = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        elif (
            pixels.shape[-1] != self.image_size
            and "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        ):
            inputs["interpolate_pos_encoding"] = True
        return cast(Tensor, self.model(**inputs, output_hidden_states=True).hidden_states[self.layer])


def check_layer(layer: int, num_layers: int) -> None:
    """Raise CheckpointError unless `layer` is an index into hidden states: embeddings, then each layer's."""
    if not -num_layers - 1 <= layer <= num_layers:
        raise CheckpointError(
            f"The image encoder has {num_layers + 1} hidden states, embeddings first, and no layer {layer}."
        )


def run_frozen(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """Features of a frozen encoder, computed in its own precision and without a graph.

    An image's features do not depend on the other images of its batch nor on its position among them, to the last bit:
    the encoder sees images in groups of a fixed size, filled up with zeros. On a CPU a group is one image, because CPU
    kernels share the rows of a larger group among threads and round differently by position.
    """
    size, features = _group_size(pixels.device), []
    for group in pixels.split(size):
        missing = size - len(group)
        filled = torch.cat([group, group.new_zeros(missing, *group.shape[1:])]) if missing else group
        features.append(run_without_graph(encoder, filled)[: len(group)])
    with torch.autocast(pixels.device.type, enabled=False):  # which cannot join tensors of another half precision
        return torch.cat(features)


def _group_size(device: torch.device) -> int:
    """Number of images that a frozen encoder takes at a time."""
    return 1 if device.type == "cpu" else 32


def run_without_graph(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """Features of all images at once, in the encoder's own precision and without a graph."""
    weights = next(encoder.parameters())
    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        return cast(Tensor, encoder(pixels.to(weights.dtype)))


def encoder_depths(encoder: VisionTransformer | VisionTower) -> dict[str, int]:
    """How deep each parameter of an image encoder stands, by name, for a layer-wise learning rate decay. Parameters of
    the last block that is computed are at 1, of the first of L blocks at L, before the blocks at L + 1, after them at
    0.
    """
    if isinstance(encoder, VisionTower):
        num_blocks = int(encoder.model.config.num_hidden_layers)
        used = encoder.layer if encoder.layer >= 0 else num_blocks + 1 + encoder.layer
    else:
        num_blocks = used = len(encoder.blocks)
    lists = [(name, module) for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)]
    blocks = next(f"{name}." for name, module in lists if len(module) == num_blocks)
    depths = {}
    for name, _ in encoder.named_parameters():
        if name.startswith(blocks):
            depths[name] = max(0, used - int(name.removeprefix(blocks).split(".")[0]))
        else:
            depths[name] = 0 if name.startswith("norm.") else used + 1
    return depths
