"""The momentum side of ITC: encoders that follow the trained ones, and a queue of their embeddings.

B rows put in at once, Q capacity of the queue, E embedding width. (ALBEF section 3.2, after MoCo.)
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from openblip.errors import ConfigError

NO_ID = -1  # no sample has it, so an empty slot is nobody's positive


class EmbeddingQueue(nn.Module):
    """The last Q image and text embeddings of the momentum encoders, with their image ids.

    Empty slots are not used as negatives. The released code starts with Q random vectors instead, and asks
    that the global batch divide Q; here any batch goes with any queue.
    """

    images: Tensor
    texts: Tensor
    ids: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, capacity: int, embed_dim: int) -> None:
        super().__init__()
        if capacity < 0:
            raise ConfigError(f"A queue of {capacity} embeddings: use 0 for none.")
        self.capacity = capacity
        self.register_buffer("images", torch.zeros(capacity, embed_dim))
        self.register_buffer("texts", torch.zeros(capacity, embed_dim))
        self.register_buffer("ids", torch.full((capacity,), NO_ID, dtype=torch.int64))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def content(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image embeddings (F, E), text embeddings (F, E) and ids (F,) of the F filled slots."""
        filled = int(self.filled)
        return self.images[:filled], self.texts[:filled], self.ids[:filled]

    @torch.no_grad()
    def put(self, images: Tensor, texts: Tensor, ids: Tensor) -> None:
        """Store (B, E), (B, E) and (B,), over the oldest; of more than Q the last Q stay."""
        if self.capacity == 0:
            return
        images, texts, ids = (x[-self.capacity :] for x in (images, texts, ids))
        slots = (int(self.pointer) + torch.arange(len(ids), device=self.ids.device)) % self.capacity
        self.images[slots] = images.to(self.images)
        self.texts[slots] = texts.to(self.texts)
        self.ids[slots] = ids.to(self.ids)
        self.pointer.fill_((int(self.pointer) + len(ids)) % self.capacity)
        self.filled.fill_(min(int(self.filled) + len(ids), self.capacity))


@torch.no_grad()
def update_average(average: Iterable[Tensor], current: Iterable[Tensor], momentum: float) -> None:
    """average <- momentum * average + (1 - momentum) * current, in place and in float32."""
    averages, currents = list(average), [x.detach() for x in current]
    torch._foreach_lerp_(averages, currents, 1.0 - momentum)
