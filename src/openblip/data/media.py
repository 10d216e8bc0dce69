"""What of a sample the image encoder sees: its picture, its two pictures, or frames of its clip.

Shapes: F frames, S image size.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from openblip.data.images import read_image
from openblip.data.sample import Sample
from openblip.errors import SourceError

View = Callable[[Image.Image, np.random.Generator], np.ndarray]
"""RGB picture -> uint8 (3, S, S): the plain preprocessing or a random view."""


class Media(Protocol):
    """Decodes a sample's picture or clip and takes a view of it."""

    def __call__(self, sample: Sample, view: View, rng: np.random.Generator) -> np.ndarray:
        """uint8 (3, S, S) or (F, 3, S, S); features of a cache (N, Dv). Raises `ImageError`."""
        ...


@dataclass(frozen=True)
class Picture:
    """The sample's one picture, (3, S, S)."""

    def __call__(self, sample: Sample, view: View, rng: np.random.Generator) -> np.ndarray:
        return view(read_image(sample.image, name=f"{sample.shard}/{sample.key}"), rng)


@dataclass(frozen=True)
class Pair:
    """The left and the right picture, (2, 3, S, S), each with a view of its own."""

    def __call__(self, sample: Sample, view: View, rng: np.random.Generator) -> np.ndarray:
        if sample.second_image is None:
            raise SourceError("no second picture")
        name = f"{sample.shard}/{sample.key}"
        left = view(read_image(sample.image, name=f"{name} (left)"), rng)
        return np.stack([left, view(read_image(sample.second_image, name=f"{name} (right)"), rng)])


@dataclass(frozen=True)
class Clip:
    """Uniform frames of the sample's clip (BLIP section 5.6), (F, 3, S, S), all with the same view."""

    num_frames: int

    def __call__(self, sample: Sample, view: View, rng: np.random.Generator) -> np.ndarray:
        from openblip.data.video import read_frames

        frames = read_frames(sample.image, self.num_frames, name=f"{sample.shard}/{sample.key}")
        views = [view(frame, copy.deepcopy(rng)) for frame in frames]
        return np.stack(views)


def media(num_frames: int | None) -> Media:
    """Clips of so many frames, or pictures when None."""
    return Picture() if num_frames is None else Clip(num_frames)
