"""Pictures as a predictor takes them, and as it keeps them once they are encoded.

B images, N image tokens, Dv their width, S side of the prepared picture.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openblip.data.images import ImageInput
from openblip.errors import ConfigError
from openblip.predictor.batching import is_one


@dataclass(frozen=True)
class EncodedImages:
    """Images a predictor has already encoded; every `images` argument of that predictor takes them."""

    tokens: Tensor
    """(B, N, Dv), on the model's device."""
    seeds: tuple[int, ...]
    """A hash of each prepared picture, by which seeded sampling does not depend on the order."""

    def __len__(self) -> int:
        return len(self.seeds)

    def select(self, index: Tensor) -> "EncodedImages":
        """Those that `index` (B') of int64 names, repeats allowed."""
        return EncodedImages(self.tokens[index], tuple(self.seeds[i] for i in index.tolist()))

    def part(self, where: slice) -> "EncodedImages":
        """Consecutive ones."""
        return EncodedImages(self.tokens[where], self.seeds[where])


Images = ImageInput | Sequence[ImageInput] | Tensor | EncodedImages


def is_single(images: Images) -> bool:
    """Whether one picture was given, so that one result goes back."""
    return is_one(images)


def image_name(image: ImageInput, position: int) -> str:
    """What an error calls a picture: its path, or its place in the list."""
    return str(image) if isinstance(image, str | os.PathLike) else f"image {position}"


def check_prepared(pixels: Tensor, size: int) -> None:
    """ConfigError unless a tensor is what `prepare` returns."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
        raise ConfigError(
            f"A {str(pixels.dtype).removeprefix('torch.')} tensor of {tuple(pixels.shape)} is no batch of "
            f"prepared images, uint8 (B, 3, {size}, {size}); give pictures, or what `prepare` returned."
        )


def picture_seed(picture: Tensor) -> int:
    """A 63-bit hash of a prepared picture, uint8 (3, S, S)."""
    digest = hashlib.blake2b(picture.cpu().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
