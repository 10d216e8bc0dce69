"""How deep in an image encoder each parameter stands, for a learning rate that decays layer by layer."""

from torch import nn

from openblip.models.vision_tower import VisionTower
from openblip.nn.vit import VisionTransformer


def encoder_depths(encoder: VisionTransformer | VisionTower) -> dict[str, int]:
    """Of every parameter by name: 1 in the last block that is computed, L in the first of L, L + 1 before it.

    What comes after the blocks is at 0.
    """
    if isinstance(encoder, VisionTower):
        num_blocks = int(encoder.model.config.num_hidden_layers)
        used = encoder.layer if encoder.layer >= 0 else num_blocks + 1 + encoder.layer
    else:
        num_blocks = used = len(encoder.blocks)
    blocks = next(
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks
    )
    return {name: _depth(name, f"{blocks}.", used) for name, _ in encoder.named_parameters()}


def _depth(name: str, blocks: str, used: int) -> int:
    if name.startswith(blocks):
        return max(0, used - int(name.removeprefix(blocks).split(".")[0]))
    return 0 if name.startswith("norm.") else used + 1
