"""RandAugment with the operations and levels of BLIP's released code (transform/randaugment.py), on PIL
images.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_MAX_MAGNITUDE = 10  # levels are fractions of this
_TRANSLATE_PIXELS = 10
_ROTATE_DEGREES = 30
_SHEAR = 0.3
_FILL = (128, 128, 128)

Operation = Callable[[Image.Image, float, np.random.Generator], Image.Image]


def rand_augment(
    image: Image.Image, rng: np.random.Generator, num_ops: int, magnitude: float, probability: float
) -> Image.Image:
    """`num_ops` operations drawn with replacement, each applied with `probability`, at `magnitude` of 10.

    Brightness and sharpness take the factor 1.8 * magnitude / 10 + 0.1, which is exactly 1, no change, at the
    magnitude 5 of every BLIP configuration. That is what the released code does, so it is kept.
    """
    level = magnitude / _MAX_MAGNITUDE
    for choice in rng.integers(len(OPERATIONS), size=num_ops):
        if rng.random() < probability:
            image = OPERATIONS[choice](image, level, rng)
    return image


def _signed(value: float, rng: np.random.Generator) -> float:
    return -value if rng.random() < 0.5 else value


def _affine(image: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=_FILL
    )


def _identity(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return image


def _auto_contrast(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return ImageOps.equalize(image)


def _brightness(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1.8 * level + 0.1)


def _sharpness(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(1.8 * level + 0.1)


def _shear_x(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, _signed(_SHEAR * level, rng), 0, 0, 1, 0))


def _shear_y(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, 0, 0, _signed(_SHEAR * level, rng), 1, 0))


def _translate_x(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, 0, _signed(_TRANSLATE_PIXELS * level, rng), 0, 1, 0))


def _translate_y(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, _signed(_TRANSLATE_PIXELS * level, rng)))


def _rotate(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    degrees = _signed(_ROTATE_DEGREES * level, rng)
    return image.rotate(degrees, resample=Image.Resampling.BILINEAR, fillcolor=_FILL)


OPERATIONS: tuple[Operation, ...] = (
    _identity,
    _auto_contrast,
    _brightness,
    _sharpness,
    _equalize,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
    _rotate,
)
