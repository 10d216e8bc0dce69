"""What the settings of `transforms.py` do to pixels.

Shapes: H, W picture, S image size.
"""

import numpy as np
from PIL import Image

from openblip.data.rand_augment import rand_augment
from openblip.data.transforms import Augmentation


def to_planes(image: Image.Image) -> np.ndarray:
    """RGB (H, W) picture -> contiguous uint8 (3, H, W)."""
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def squash(image: Image.Image, image_size: int) -> np.ndarray:
    """RGB picture -> uint8 (3, S, S): bicubic, without regard to its proportions, as BLIP does."""
    return to_planes(image.resize((image_size, image_size), Image.Resampling.BICUBIC))


def random_view(
    image: Image.Image, settings: Augmentation, rng: np.random.Generator, image_size: int
) -> np.ndarray:
    """RGB picture -> uint8 (3, S, S): crop, flip and RandAugment as `settings` says."""
    box = _crop_box(image.width, image.height, settings.crop_scale, rng)
    view = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
    if settings.horizontal_flip and rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return to_planes(rand_augment(view, rng, settings.num_ops, settings.magnitude, settings.op_probability))


def _crop_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A crop of `scale` of the area and a ratio of 3/4 to 4/3 (log-uniform); the whole image where ten draws
    do not fit.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height
