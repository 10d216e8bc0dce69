"""Sources of samples that are there already, and what a model makes of images that are numbers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openblip.data.sample import Located, Reject, Sample, Selection, Source
from openblip.errors import ImageError
from openblip.predictor.values import ScoredText


@dataclass
class ListSource(Source):
    """Samples in shards of `per_shard`; a string in the place of a sample is the key of a damaged one."""

    samples: Sequence[Sample | str]
    name: str = "list"
    per_shard: int = 1000
    rejects: dict[str, list[Reject]] = field(default_factory=dict)

    def shards(self) -> Sequence[str]:
        return [f"s{start // self.per_shard}" for start in range(0, max(len(self.samples), 1), self.per_shard)]

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        start = int(shard[1:]) * self.per_shard
        items = [
            Reject(shard, item, "damaged") if isinstance(item, str) else item
            for item in self.samples[start : start + self.per_shard]
        ]
        for number, item in enumerate([*items, *self.rejects.get(shard, [])]):
            if selection.has(number) and (isinstance(item, Reject) or not selection.skips(item)):
                yield Located(number, item)


def sample(number: int, *captions: str, image_id: str = "", second: bytes | None = None, **info: Any) -> Sample:
    """A sample whose image is its number."""
    image = str(number).encode()
    own_id = image_id or f"list/{number}"
    return Sample(f"{number:03d}", "s0", image, captions, own_id, info, second)


def numbers(images: Any) -> list[int]:
    """The images' numbers; ImageError for what is no number."""
    found = []
    for image in images:
        try:
            found.append(int(image))
        except ValueError as error:
            raise ImageError(f"{image!r} is no number") from error
    return found


@dataclass(frozen=True)
class Numbered:
    """Images as a model encodes them; here by their number."""

    numbers: Tensor
    num_frames: int = 1

    def select(self, index: Tensor) -> "Numbered":
        return Numbered(self.numbers[index], self.num_frames)


def scored(text: str, *probabilities: float) -> ScoredText:
    """A text whose tokens have these probabilities."""
    logprobs = tuple(map(math.log, probabilities))
    count = len(logprobs)
    settings: dict[str, Any] = {"tokens": ("",) * count, "ids": (0,) * count, "has_end": False}
    return ScoredText(text=text, logprob=sum(logprobs), token_logprobs=logprobs, **settings)


class NumberEncoder:
    """The image encoder of models whose answers are written down."""

    def encode(self, images: Any, batch_size: int | None = None) -> Numbered:
        return images if isinstance(images, Numbered) else Numbered(torch.tensor(numbers(images)))

    def encode_videos(self, clips: Any, num_frames: int, batch_size: int | None = None) -> Numbered:
        return Numbered(torch.tensor(numbers(clips)), num_frames)
