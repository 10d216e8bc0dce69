"""What decoding needs of a model, and nothing more. `models.blip.Blip` satisfies it.

B images, P prompt tokens, T text tokens, V vocabulary, R rows (B * K: K consecutive rows per image).
"""

from typing import Any, Protocol

from torch import Tensor


class DecoderContext(Protocol):
    """The images as the decoder reads them (cross-attention K and V): one entry per image, not per row."""

    def select(self, index: Tensor, /) -> Any:
        """The context of the images `index` (int64, any length)."""


class DecoderCache(Protocol):
    """The self-attention K and V of the tokens read so far, one entry per row. Changed in place."""

    def reorder(self, index: Tensor, /) -> None:
        """Row r becomes what row index[r] was; index (int64) may be shorter than the number of rows."""

    def repeat(self, count: int, /) -> None:
        """Each row becomes `count` consecutive rows."""


class TextDecoder(Protocol):
    """A causal text decoder that looks at images."""

    def new_cache(self, max_length: int) -> Any:
        """An empty `DecoderCache` for rows of at most `max_length` tokens; the first step says how many."""

    def decode(self, ids: Tensor, context_kv: Any, cache: Any = None) -> Tensor:
        """Logits (R, T, V) for what follows each of ids (R, T); with a cache, ids are only the new tokens."""
