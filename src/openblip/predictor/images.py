"""Pictures and clips as a predictor takes them, and as it keeps them once they are encoded.

B images or clips, F frames, N image tokens, Dv their width, S side of the prepared picture.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from openblip.data.images import ImageInput
from openblip.errors import ConfigError
from openblip.predictor.batching import as_list, is_one

ClipInput = str | os.PathLike[str] | bytes
"""A clip by its path (or fsspec URL), or its encoded bytes."""


@dataclass(frozen=True)
class EncodedImages:
    """Images or clips that a predictor has already encoded; its calls take them as `images`."""

    tokens: Tensor
    """(B, F * N, Dv), on the model's device."""
    seeds: tuple[int, ...]
    """A hash of each prepared picture, by which seeded sampling does not depend on the order."""
    num_frames: int = 1
    """F; the tokens of a clip's frames stand one after the other."""

    def __len__(self) -> int:
        return len(self.seeds)

    def select(self, index: Tensor) -> "EncodedImages":
        """Those that `index` (B') of int64 names, repeats allowed."""
        return replace(self, tokens=self.tokens[index], seeds=tuple(self.seeds[i] for i in index.tolist()))

    def part(self, where: slice) -> "EncodedImages":
        """Consecutive ones."""
        return replace(self, tokens=self.tokens[where], seeds=self.seeds[where])


Images = ImageInput | Sequence[ImageInput] | Tensor | EncodedImages


def listed(images: Images) -> list[ImageInput] | Tensor | EncodedImages:
    """The same with its length known."""
    return images if isinstance(images, Tensor | EncodedImages) else as_list(images)


def is_single(images: Images) -> bool:
    """Whether one picture was given, so that one result goes back."""
    return is_one(images)


def input_name(item: Any, position: int, kind: str) -> str:
    """What an error calls a picture, pair or clip (`kind`): its path, or its place in the list."""
    return str(item) if isinstance(item, str | os.PathLike) else f"{kind} {position}"


def check_prepared(pixels: Tensor, size: int) -> None:
    """ConfigError unless a tensor is what `prepare` returns."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
        raise ConfigError(
            f"A {str(pixels.dtype).removeprefix('torch.')} tensor of {tuple(pixels.shape)} is no batch of "
            f"prepared images, uint8 (B, 3, {size}, {size}); give pictures, or what `prepare` returned."
        )


def picture_seed(picture: Tensor) -> int:
    """A 63-bit hash of a prepared picture, uint8 (3, S, S), or of a clip's frames, (F, 3, S, S)."""
    digest = hashlib.blake2b(picture.cpu().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
