"""From a picture to the model's input: what inference does, and the random views of training.

Settings only: what they do to pixels is in `views.py`, so that a configuration imports without numpy and PIL.

Shapes: B batch, S image size. Pixels are uint8 (3, S, S) until they are on the model's device.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

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
        """RGB picture of any size -> uint8 (3, S, S), bit for bit what transformers' BlipImageProcessorPil
        resizes to.
        """
        from openblip.data.views import squash

        return squash(image, self.image_size)

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
        """RGB picture -> uint8 (3, S, S). Equal states of `rng` give equal views."""
        from openblip.data.views import random_view

        return random_view(image, self, rng, image_size)
