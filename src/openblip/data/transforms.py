"""From a picture to the model's input: what inference does, and the random views of training.

Shapes: B batch, S image size. Pixels are uint8 (3, S, S) until they are on the model's device.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from openblip.data.rand_augment import rand_augment

if TYPE_CHECKING:
    import torch

# The statistics of CLIP's training images, which BLIP took over (configs of the released code).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_planes(image: Image.Image) -> np.ndarray:
    """RGB (H, W) picture -> contiguous uint8 (3, H, W)."""
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a checkpoint expects of pixels: squashed to a square, without crop, then normalised."""

    image_size: int = 384
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, image: Image.Image) -> np.ndarray:
        """RGB picture of any size -> uint8 (3, S, S), bit for bit what transformers' BlipImageProcessorPil
        resizes to.
        """
        return to_planes(image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC))

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

    def __call__(self, image: Image.Image, rng: np.random.Generator, image_size: int) -> np.ndarray:
        """RGB picture -> uint8 (3, S, S). Equal states of `rng` give equal views."""
        box = _crop_box(image.width, image.height, self.crop_scale, rng)
        view = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
        if self.horizontal_flip and rng.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_planes(rand_augment(view, rng, self.num_ops, self.magnitude, self.op_probability))


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
