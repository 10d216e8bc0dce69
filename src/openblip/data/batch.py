"""From samples to a training batch: the base of all sample processors and batches, and image-text pairs.

A sample processor turns a sample into an example, in a worker process, and examples into a batch, in the training
process, where the tokenizer is. What it draws comes from the sample's own generator, so examples do not depend on which
worker makes them. Tasks define processors and batches of their own in `openblip.tasks`.

B examples, F frames, S image size, T text tokens, N image tokens, Dv their width.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image

from openblip.data.images import read_frames, read_image
from openblip.data.sample import Sample
from openblip.data.texts import draw_caption
from openblip.data.tokenizer import BATCH_LENGTH_STEP, Tokenizer, Tokens
from openblip.files import hash_int

View = Callable[[Image.Image, np.random.Generator], np.ndarray]
"""RGB image -> uint8 (3, S, S): the plain preprocessing or a random view."""
PixelReader = Callable[[Sample, View, np.random.Generator], np.ndarray]
"""What the image encoder sees of a sample: uint8 (3, S, S) or (F, 3, S, S), or cached features (N, Dv).
Raises `ImageError`."""


def image_pixels(sample: Sample, view: View, rng: np.random.Generator, num_frames: int | None = None) -> np.ndarray:
    """A view of the sample's image, uint8 (3, S, S); or evenly spaced frames of its video (BLIP section 5.6) in the
    same view, uint8 (F, 3, S, S).
    """
    name = f"{sample.shard}/{sample.key}"
    if num_frames is None:
        return view(read_image(sample.image, name=name), rng)
    frames = read_frames(sample.image, num_frames, name=name)
    return np.stack([view(frame, copy.deepcopy(rng)) for frame in frames])


def pixel_reader(num_frames: int | None) -> PixelReader:
    """Reads `num_frames` frames of videos, or images when None."""
    return partial(image_pixels, num_frames=num_frames)


class Example(NamedTuple):
    """What a task takes of one sample."""

    key: str
    shard: str
    pixels: np.ndarray
    """As a `PixelReader` gives them; bfloat16 features as uint16 with the same bits, since numpy has none."""
    content: Any  # what else the task's `SampleProcessor.collate` needs; small, because it crosses processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B examples. Every task has a subclass with the fields that it needs beside these."""

    pixels: torch.Tensor
    """uint8 (B, 3, S, S), of videos (B, F, 3, S, S), of two images (B, 2, 3, S, S); float (B, N, Dv) where
    cached features take the place of images; (B, 0) of texts alone."""
    keys: list[str]
    shards: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Equal for batches that a model takes the same operations for."""
        values = [getattr(self, field.name) for field in fields(self)]
        tensors = [value.ids if isinstance(value, Tokens) else value for value in values]
        return tuple(value.shape for value in tensors if isinstance(value, torch.Tensor))

    def to(self, device: torch.device | str) -> Self:
        """The same with every tensor on a device."""
        return self._with_tensors(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same with every tensor in page-locked memory, from which a copy to a GPU runs on its own."""
        return self._with_tensors(lambda value: value.pin_memory())

    def _with_tensors(self, change: Callable[[Any], Any]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{n: change(v) for n, v in values.items() if isinstance(v, torch.Tensor | Tokens)})


def shared_fields(examples: Sequence[Example]) -> dict[str, Any]:
    """The fields that every `Batch` has, of B examples with pixels of one shape. uint16 pixels become the bfloat16 with
    these bits. Where there is a GPU, the pixels are page-locked.
    """
    first = torch.from_numpy(examples[0].pixels)
    pixels = torch.empty((len(examples), *first.shape), dtype=first.dtype, pin_memory=torch.cuda.is_available())
    np.stack([example.pixels for example in examples], out=pixels.numpy())
    return {
        "pixels": pixels.view(torch.bfloat16) if first.dtype == torch.uint16 else pixels,
        "keys": [example.key for example in examples],
        "shards": [example.shard for example in examples],
    }


@dataclass(frozen=True, kw_only=True)
class SampleProcessor(ABC):
    """Makes examples of samples and a batch of examples. Pickled into worker processes, so modules that define one do
    not import transformers.
    """

    read_pixels: PixelReader = image_pixels

    def __call__(self, sample: Sample, view: View, rng: np.random.Generator) -> Example:
        """The example of a sample; everything random is drawn from `rng`. Raises `SourceError` for a sample without
        what the task needs, and `ImageError` for a damaged image.
        """
        content = self.content(sample, rng)
        return Example(sample.key, sample.shard, self.read_pixels(sample, view, rng), content)

    @abstractmethod
    def content(self, sample: Sample, rng: np.random.Generator) -> Any:
        """What the task takes of a sample beside its pixels. Raises `SourceError`."""

    @abstractmethod
    def collate(self, examples: Sequence[Example], tokenizer: Tokenizer) -> Batch:
        """The batch of B examples. Texts are padded by the tokenizer, to the longest of the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTextBatch(Batch):
    """B images or videos, each with a text."""

    tokens: Tokens
    """(B, T): [CLS] ... [SEP]."""
    captions: list[str]
    image_ids: torch.Tensor
    """int64 (B,), equal for pairs of the same image."""


@dataclass(frozen=True, kw_only=True)
class ImageTextProcessor(SampleProcessor):
    """An image or video with one of its captions, drawn at random."""

    max_text_length: int = 30
    """Tokens of a caption, [CLS] and [SEP] included; more are cut."""

    def content(self, sample: Sample, rng: np.random.Generator) -> tuple[str, int]:
        return draw_caption(sample, rng), hash_int(sample.image_id)

    def collate(self, examples: Sequence[Example], tokenizer: Tokenizer) -> ImageTextBatch:
        captions = [example.content[0] for example in examples]
        return ImageTextBatch(
            **shared_fields(examples),
            tokens=tokenizer.encode(captions, self.max_text_length, BATCH_LENGTH_STEP),
            captions=captions,
            image_ids=torch.tensor([example.content[1] for example in examples], dtype=torch.long),
        )
