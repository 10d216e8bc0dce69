"""One thing or a list of them, taken in batches."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from openblip.errors import ConfigError

DEFAULT_BATCH_SIZE = 64
MAX_ROWS = 512
"""Texts that the model reads at a time where many go with one image."""

Item = TypeVar("Item")


def is_one(item: Any) -> bool:
    """Whether this is one picture, clip or text, and no list of them."""
    return isinstance(item, str | os.PathLike | Image.Image | bytes | np.ndarray)


def as_list(items: Any) -> list[Any]:
    """One item or a sequence of them, as a list."""
    return [items] if is_one(items) else list(items)


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive slices of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def checked_batch_size(batch_size: int | None) -> int:
    """The batch size to use; ConfigError for one below 1."""
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1.")
    return batch_size or DEFAULT_BATCH_SIZE
