"""The self-attention caches of a decoder. Cross-attention has none: an image's K/V are projected once.

R rows, H heads, T text tokens, E head width.
"""

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer for the tokens so far.

    With a `max_length` they are written into buffers of that length, for decoding. Without, they are concatenated, so
    that gradients flow: for training after a shared prefix.
    """

    def __init__(self, max_length: int | None = None) -> None:
        self.max_length = max_length
        self.length = 0
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add (R, H, T, E) and return the keys and values of all tokens so far, (R, H, length, E)."""
        end = self.length + key.shape[2]
        if self.max_length is None:
            if self._key is not None and self._value is not None:
                key, value = torch.cat([self._key, key], dim=2), torch.cat([self._value, value], dim=2)
            self._key, self._value, self.length = key, value, end
            return key, value
        if self._key is None or self._value is None:
            rows, heads, _, width = key.shape
            self._key = key.new_empty(rows, heads, self.max_length, width)
            self._value = value.new_empty(rows, heads, self.max_length, width)
        if end > self.max_length:
            raise ValueError(f"The cache holds {self.max_length} tokens; {end} were fed.")
        self._key[:, :, self.length : end] = key
        self._value[:, :, self.length : end] = value
        self.length = end
        return self._key[:, :, :end], self._value[:, :, :end]

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change`, which works along the row axis, to keys and values."""
        if self._key is not None and self._value is not None:
            self._key, self._value = change(self._key), change(self._value)


class SelfAttentionCache:
    """One `LayerCache` per layer. Without a `max_length` it is for training, and can be copied."""

    def __init__(self, num_layers: int, max_length: int | None = None) -> None:
        self.layers = [LayerCache(max_length) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return self.layers[0].length

    def copy(self) -> "SelfAttentionCache":
        """A cache without `max_length` that continues from here; this one does not change."""
        other = SelfAttentionCache(0)
        other.layers = [copy(layer) for layer in self.layers]
        return other

    def reorder(self, index: Tensor) -> None:
        """Row r becomes what row index[r] was; index (R') of int64, so rows can also be dropped."""
        for layer in self.layers:
            layer.map_rows(lambda buffer: buffer.index_select(0, index))

    def repeat(self, count: int) -> None:
        """Each row becomes `count` consecutive copies of itself."""
        for layer in self.layers:
            layer.map_rows(lambda buffer: torch.repeat_interleave(buffer, count, dim=0))
