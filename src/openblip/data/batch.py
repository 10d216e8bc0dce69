"""What a training step receives.

Shapes: B batch, S image size, T text tokens.
"""

import hashlib
from dataclasses import dataclass, replace

import torch

from openblip.data.tokenizer import Tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """B image-text pairs. `pixels` uint8 (B, 3, S, S); `tokens` [CLS]...[SEP]; `image_ids` int64 (B), equal
    exactly for pairs of the same image.
    """

    pixels: torch.Tensor
    tokens: Tokens
    captions: list[str]
    image_ids: torch.Tensor
    keys: list[str]
    shards: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> "Batch":
        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=True),
            tokens=self.tokens.to(device),
            image_ids=self.image_ids.to(device, non_blocking=True),
        )


def hash_image_id(image_id: str) -> int:
    """A stable non-negative 63-bit number for a `Sample.image_id`; two of a billion images collide with
    chance 5%.
    """
    digest = hashlib.blake2b(image_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
