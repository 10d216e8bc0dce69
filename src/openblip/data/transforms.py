"""From an image to the model's input: the resize of inference, and the random views of training.

`Preprocessing` and `Augmentation` are settings of a run, which `openblip train --help` imports; so numpy, PIL
and torch are imported where pixels are touched.

Shapes: B batch, H and W of an image, S image size. Pixels are uint8 (3, S, S) until they are on the device.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import torch
    from PIL import Image

    Operation = Callable[[Image.Image, float, np.random.Generator], Image.Image]

# The statistics of CLIP's training images, which BLIP took over (configs of the released code).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a checkpoint expects of pixels: squashed to a square, without crop, then normalised."""

    image_size: int = 384
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, image: "Image.Image") -> "np.ndarray":
        """RGB image of any size -> uint8 (3, S, S): bicubic, whatever the image's proportions.

        Bit for bit what transformers' BlipImageProcessorPil resizes to.
        """
        from PIL import Image

        size = (self.image_size, self.image_size)
        return _to_planes(image.resize(size, Image.Resampling.BICUBIC))

    def normalize(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """uint8 (B, 3, S, S) -> float32 (B, 3, S, S), on the tensor's device."""
        import torch

        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1)
        return (pixels.to(torch.float32) / 255.0 - mean) / std


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The training views of BLIP's released code: random resized crop (bicubic), horizontal flip,
    RandAugment.

    `crop_scale` (0.5, 1.0) is the fine-tuning value, pre-training used (0.2, 1.0). A flip makes "left of"
    wrong; captions with sides want `horizontal_flip=False`.
    """

    crop_scale: tuple[float, float] = (0.5, 1.0)
    horizontal_flip: bool = True
    num_ops: int = 2
    magnitude: float = 5
    op_probability: float = 0.5

    def __call__(self, image: "Image.Image", rng: "np.random.Generator", image_size: int) -> "np.ndarray":
        """RGB image -> uint8 (3, S, S). Equal states of `rng` give equal views."""
        from PIL import Image

        box = _crop_box(image.width, image.height, self.crop_scale, rng)
        view = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
        if self.horizontal_flip and rng.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _to_planes(rand_augment(view, rng, self.num_ops, self.magnitude, self.op_probability))


def _to_planes(image: "Image.Image") -> "np.ndarray":
    """RGB image -> contiguous uint8 (3, H, W)."""
    import numpy as np

    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def _crop_box(
    width: int, height: int, scale: tuple[float, float], rng: "np.random.Generator"
) -> tuple[int, int, int, int]:
    """A crop of `scale` of the area with a ratio of 3/4 to 4/3 (log-uniform), or the whole image after ten
    draws that do not fit.
    """
    import numpy as np

    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height


# RandAugment with the operations and levels of the released code (transform/randaugment.py), on PIL images.

_MAX_MAGNITUDE = 10  # levels are fractions of this
_TRANSLATE_PIXELS = 10
_ROTATE_DEGREES = 30
_SHEAR = 0.3
_FILL = (128, 128, 128)


def rand_augment(
    image: "Image.Image", rng: "np.random.Generator", num_ops: int, magnitude: float, probability: float
) -> "Image.Image":
    """`num_ops` operations drawn with replacement, each applied with `probability`, at `magnitude` of 10.

    Brightness and sharpness take the factor 1.8 * magnitude / 10 + 0.1, which is exactly 1, no change, at the
    magnitude 5 of every BLIP configuration. That is what the released code does, so it is kept.
    """
    level = magnitude / _MAX_MAGNITUDE
    for choice in rng.integers(len(OPERATIONS), size=num_ops):
        if rng.random() < probability:
            image = OPERATIONS[choice](image, level, rng)
    return image


def _identity(image: "Image.Image", level: float, rng: "np.random.Generator") -> "Image.Image":
    return image


def _auto_contrast(image: "Image.Image", level: float, rng: "np.random.Generator") -> "Image.Image":
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def _brightness(image: "Image.Image", level: float, rng: "np.random.Generator") -> "Image.Image":
    from PIL import ImageEnhance

    return ImageEnhance.Brightness(image).enhance(1.8 * level + 0.1)


def _sharpness(image: "Image.Image", level: float, rng: "np.random.Generator") -> "Image.Image":
    from PIL import ImageEnhance

    return ImageEnhance.Sharpness(image).enhance(1.8 * level + 0.1)


def _equalize(image: "Image.Image", level: float, rng: "np.random.Generator") -> "Image.Image":
    from PIL import ImageOps

    return ImageOps.equalize(image)


def _shear_x(image: "Image.Image", level: float, rng: "np.random.Generator") -> "Image.Image":
    return _affine(image, (1, _signed(_SHEAR * level, rng), 0, 0, 1, 0))


def _shear_y(image: "Image.Image", level: float, rng: "np.random.Generator") -> "Image.Image":
    return _affine(image, (1, 0, 0, _signed(_SHEAR * level, rng), 1, 0))


def _translate_x(image: "Image.Image", level: float, rng: "np.random.Generator") -> "Image.Image":
    return _affine(image, (1, 0, _signed(_TRANSLATE_PIXELS * level, rng), 0, 1, 0))


def _translate_y(image: "Image.Image", level: float, rng: "np.random.Generator") -> "Image.Image":
    return _affine(image, (1, 0, 0, 0, 1, _signed(_TRANSLATE_PIXELS * level, rng)))


def _rotate(image: "Image.Image", level: float, rng: "np.random.Generator") -> "Image.Image":
    from PIL import Image

    degrees = _signed(_ROTATE_DEGREES * level, rng)
    return image.rotate(degrees, resample=Image.Resampling.BILINEAR, fillcolor=_FILL)


def _affine(image: "Image.Image", matrix: tuple[float, float, float, float, float, float]) -> "Image.Image":
    from PIL import Image

    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=_FILL
    )


def _signed(value: float, rng: "np.random.Generator") -> float:
    return -value if rng.random() < 0.5 else value


OPERATIONS: "tuple[Operation, ...]" = (
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
