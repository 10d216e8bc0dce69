"""The vision transformer (BLIP section 3.1): pre-norm blocks, a class token, learned positions.

B batch, S image size in pixels, P patch size, G = S/P patches a side, N = G*G + 1 tokens, D width.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openblip.nn.attention import SelfAttention
from openblip.nn.config import VisionConfig
from openblip.nn.linear import FeedForward


class DropPath(nn.Module):
    """Skip a residual branch for whole samples (stochastic depth), keeping its expected value."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if not self.training or self.probability == 0.0:
            return x
        keep = 1.0 - self.probability
        return x * (x.new_empty(x.shape[0], 1, 1).bernoulli_(keep) / keep)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), which CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, kept."""
        return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class VitBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig, drop_path: float) -> None:
        super().__init__()
        width = config.hidden_dim
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = SelfAttention(width, config.num_heads)
        self.mlp_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = FeedForward(width, config.mlp_dim, _ACTIVATIONS[config.activation]())
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.drop_path(self.attention(self.attention_norm(x)))
        return cast(Tensor, x + self.drop_path(self.mlp(self.mlp_norm(x))))


class VisionTransformer(nn.Module):
    """Images to token features. Images are square and tiled by the patches; for other sizes than the config's
    `image_size` the position embeddings are interpolated.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.activation_checkpointing = config.activation_checkpointing
        self.mlp_dim = config.mlp_dim
        width, patch, eps = config.hidden_dim, config.patch_size, config.layer_norm_eps
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=not config.input_norm)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, config.grid**2 + 1, width))
        last = max(config.num_layers - 1, 1)
        self.blocks = nn.ModuleList(VitBlock(config, config.drop_path * i / last) for i in range(config.num_layers))
        self.input_norm = nn.LayerNorm(width, eps=eps) if config.input_norm else nn.Identity()
        self.norm = nn.LayerNorm(width, eps=eps) if config.output_norm else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: float (B, 3, S, S), normalised -> tokens (B, N, D), the class token first. Raises ValueError when the
        images are not square or the patches do not tile them.
        """
        patch, (height, width) = self.patch_embedding.stride[0], pixels.shape[-2:]
        if height != width or height % patch:
            raise ValueError(f"An image of {height}x{width}: patches of {patch} need a square that they tile.")
        positions = interpolate_positions(self.position_embedding, height // patch)
        x = embed_patches(self.patch_embedding, pixels.to(self.patch_embedding.weight.dtype))  # (B, G*G, D)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        x = self.input_norm(x + positions.to(x.dtype))
        together: Sequence[Tensor] = (x,)
        if x.device.type == "cpu" and not torch.is_grad_enabled() and not is_traced():
            together = x.split(max(1, CACHED_BYTES // (x.shape[1] * self.mlp_dim * x.itemsize)))
        groups = []
        for group in together:
            for block in self.blocks:
                if self.activation_checkpointing and self.training:
                    group = checkpoint(block, group, use_reentrant=False)
                else:
                    group = block(group)
            groups.append(self.norm(group))
        return groups[0] if len(groups) == 1 else torch.cat(groups)


CACHED_BYTES = 2**24
"""The largest activations of a layer that stay in the last cache of a CPU: so many images go through all blocks before
the next do.
"""


def is_traced() -> bool:
    """Whether torch records the operations of a call, to repeat them for any number of images."""
    is_recorded: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return is_recorded or torch.compiler.is_compiling()


def embed_patches(convolution: nn.Conv2d, pixels: Tensor) -> Tensor:
    """A convolution whose kernels do not overlap, (B, 3, S, S) -> (B, G*G, D). On a GPU it is one matrix product, whose
    output is laid out as the blocks read it.
    """
    if pixels.device.type != "cuda":
        return cast(Tensor, convolution(pixels)).flatten(2).transpose(1, 2)
    patch = convolution.stride[0]
    patches = pixels.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, 3, G, P, G, P)
    rows = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, G*G, 3*P*P)
    return F.linear(rows, convolution.weight.flatten(1), convolution.bias)


def interpolate_positions(position_embedding: Tensor, grid: int) -> Tensor:
    """Positions (1, N0, D) of a square grid -> (1, grid*grid + 1, D), bicubic, the class token kept. The released
    code's choice (bicubic, align_corners=False), so that its checkpoints fit any size.
    """
    old_grid = math.isqrt(position_embedding.shape[1])  # of a square and one
    if old_grid == grid:
        return position_embedding
    class_position, patch_positions = position_embedding[:, :1], position_embedding[:, 1:]
    square = patch_positions.unflatten(1, (old_grid, old_grid)).permute(0, 3, 1, 2)  # (1, D, G0, G0)
    resized = F.interpolate(square.float(), size=(grid, grid), mode="bicubic", align_corners=False)
    patches = resized.to(position_embedding.dtype).flatten(2).transpose(1, 2)
    return torch.cat([class_position, patches], dim=1)


def sine_positions(grid: int, dim: int) -> Tensor:
    """Initial position embeddings (1, grid*grid + 1, dim): sines of row and column, zero for the class token.

    One half of `dim` holds the row and the other the column, at wave lengths from 2 pi to 200 pi patches; up
    to three remaining dimensions are zero. They are as large as patch embeddings become within the first
    thousand steps from random weights; small random positions have no effect beside those (docs/results.md).
    """
    num_waves = dim // 4
    rates = 100.0 ** (-torch.arange(num_waves) / max(num_waves, 1))
    angles = torch.arange(grid)[:, None] * rates  # (G, W)
    waves = 2.8 * torch.cat([angles.sin(), angles.cos()], dim=1)  # (G, 2W)
    rows = waves[:, None].expand(grid, grid, -1)
    columns = waves[None].expand(grid, grid, -1)
    patches = F.pad(torch.cat([rows, columns], dim=-1).flatten(0, 1), (0, dim - 4 * num_waves))
    return F.pad(patches, (0, 0, 1, 0))[None]
