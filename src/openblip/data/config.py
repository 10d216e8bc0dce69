"""The data part of a run's settings: which samples it reads, and how an image becomes the model's input.

`openblip train --help` imports these settings, so numpy, PIL and torch are imported where pixels are touched.

Shapes: B batch, H and W of an image, S image size. Pixels are uint8 (3, S, S) until they are on the device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from openblip.errors import Condition

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
        """RGB image -> uint8 (3, S, S): bicubic, bit for bit what transformers' BlipImageProcessorPil resizes to."""
        from PIL import Image

        return _to_planes(image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC))

    def normalize(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """uint8 (B, 3, S, S) -> float32 (B, 3, S, S), on the tensor's device."""
        import torch

        mean, std = _statistics(self, pixels.device)
        return pixels.to(torch.float32).div_(255.0).sub_(mean).div_(std)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The training views of BLIP's released code: random resized crop (bicubic), horizontal flip, RandAugment.

    `crop_scale` (0.5, 1.0) is the fine-tuning value, pre-training used (0.2, 1.0). A flip makes "left of" wrong;
    captions with sides want `horizontal_flip=False`. RandAugment draws `num_ops` operations with replacement, and
    applies each with `op_probability`, at `magnitude` of 10.
    """

    conditions: ClassVar = (
        Condition("magnitude op-probability", lambda views: views.num_ops > 0, "no operation is drawn; see num-ops"),
    )
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the image's area that a crop has."""
    horizontal_flip: bool = True
    """Whether half of the images are mirrored; captions with sides are wrong then."""
    num_ops: int = 2
    """Operations of RandAugment on each image."""
    magnitude: float = 5
    """Strength of the operations, 0 to 10."""
    op_probability: float = 0.5
    """Probability with which each drawn operation is applied."""

    def __call__(self, image: "Image.Image", rng: "np.random.Generator", image_size: int) -> "np.ndarray":
        """RGB image -> uint8 (3, S, S). Equal states of `rng` give equal views."""
        from PIL import Image

        box = self._draw_box(image, rng)
        view = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
        if self.horizontal_flip and rng.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for choice in rng.integers(len(OPERATIONS), size=self.num_ops):
            if rng.random() < self.op_probability:
                view = apply_operation(OPERATIONS[choice], view, self.magnitude / 10, rng)
        return _to_planes(view)

    def _draw_box(self, image: "Image.Image", rng: "np.random.Generator") -> tuple[int, int, int, int]:
        """A part of the area with a ratio of 3/4 to 4/3 (log-uniform); after ten that do not fit, the whole image."""
        import numpy as np

        width, height = image.size
        for _ in range(10):
            area = width * height * rng.uniform(*self.crop_scale)
            ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return left, top, left + w, top + h
        return 0, 0, width, height


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a data source does not say of itself. Columns are those of each table that is read."""

    images: str | None = None
    """The folder of the images or videos that an annotation file or table names."""
    image_column: str | None = None
    """Column of a table with the image or its path, where it has a name of its own."""
    caption_column: str | None = None
    """Column of a table, or field of a shard's json files, with the captions, where it has a name of its own."""

    @property
    def reading(self) -> dict[str, str | None]:
        """The arguments of `open_source`."""
        return {field.name: getattr(self, field.name) for field in fields(SourceOptions)}

    @classmethod
    def stated(cls, settings: Mapping[str, Any]) -> Self:
        """The options among the settings that a file states."""
        return cls(**{field.name: settings.get(field.name) for field in fields(SourceOptions)})


@dataclass(frozen=True, kw_only=True)
class DecodingAhead(SourceOptions):
    """How images are read and decoded ahead of a model."""

    num_workers: int | None = None
    """Threads that read and decode images; as many as there are processor cores when not given."""
    jpeg: Literal["scaled", "exact"] = "scaled"
    """How large JPEG files are decoded: to the half, quarter or eighth of their size that the model needs, which is
    faster and moves values of pixels by about one of 255 steps; or exactly, as evaluations do."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceOptions):
    """Which pairs a training reads, and how."""

    conditions: ClassVar = (
        Condition("validation-limit", lambda data: data.validation is not None, "there is no --data.validation"),
    )

    source: str | None = None
    """Training pairs: tar shards, parquet, jsonl, csv, a folder, capfilt:DIR, or several with the probabilities
    with which they are drawn, a.tar@0.7,b.tar@0.3; without these every sample is drawn equally often. It must be
    given."""
    validation: str | None = None
    """Samples on which the model is measured during the training: any data source."""
    validation_limit: int | None = None
    """Number of samples that are used for it, the first of the source; None uses all."""
    augmentation: Augmentation | None = None
    """Random views of images; None: every image is squashed to a square."""
    num_workers: int = 1
    """Processes that read and decode, for each training process; 0: the training process does. No more than there are
    processor cores, rounded down to a divisor of its streams, which are 64 in all (8 for each process where there are
    not 1, 2, 4 or 8)."""
    max_text_length: int = 30
    """Most tokens of a caption, question, answer, statement, dialog or instruction that BLIP or a Q-Former reads,
    [CLS] and [SEP] included. Longer texts are cut, and metrics.jsonl counts them."""
    num_frames: int | None = None
    """Frames of each video, evenly spaced; None: the source has images."""


@lru_cache(maxsize=64)
def _statistics(preprocessing: Preprocessing, device: "torch.device") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Mean and std, (3, 1, 1) each. They are kept: to copy them anew, the CPU would wait for a GPU."""
    import torch

    with torch.inference_mode(False):
        mean, std = (torch.tensor(each, device=device) for each in (preprocessing.mean, preprocessing.std))
    return mean.view(3, 1, 1), std.view(3, 1, 1)


def _to_planes(image: "Image.Image") -> "np.ndarray":
    """RGB image -> contiguous uint8 (3, H, W)."""
    import numpy as np

    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


# RandAugment with the operations and levels of the released code (transform/randaugment.py), on PIL images.
OPERATIONS = (
    *("identity", "auto_contrast", "brightness", "sharpness", "equalize"),
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
)


def apply_operation(name: str, image: "Image.Image", level: float, rng: "np.random.Generator") -> "Image.Image":
    """One of `OPERATIONS` at a level from 0 to 1. Those that move pixels draw a direction, and fill up with gray.
    Brightness and sharpness take the factor 1.8 * level + 0.1, which is exactly 1, no change, at the magnitude 5 of
    every BLIP configuration. That is what the released code does, so it is kept.
    """
    from PIL import Image, ImageEnhance, ImageOps

    match name:
        case "identity":
            return image
        case "auto_contrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "brightness":
            return ImageEnhance.Brightness(image).enhance(1.8 * level + 0.1)
        case "sharpness":
            return ImageEnhance.Sharpness(image).enhance(1.8 * level + 0.1)
    level = -level if rng.random() < 0.5 else level
    gray, bilinear = (128, 128, 128), Image.Resampling.BILINEAR
    if name == "rotate":
        return image.rotate(30 * level, resample=bilinear, fillcolor=gray)  # degrees
    matrix = {
        "shear_x": (1, 0.3 * level, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * level, 1, 0),
        "translate_x": (1, 0, 10 * level, 0, 1, 0),  # pixels
        "translate_y": (1, 0, 0, 0, 1, 10 * level),
    }[name]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=bilinear, fillcolor=gray)
