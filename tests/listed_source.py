"""Sources of samples that are there already, and what a model makes of images that are numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openblip.data.sample import Record, Reject, Sample, ShardIndex
from openblip.errors import ImageError, SourceError


@dataclass(frozen=True)
class Written:
    """A record that is there already; without a sample, one that cannot be read."""

    key: str
    shard: str
    sample: Sample | None

    def read(self) -> Sample:
        if self.sample is None:
            raise SourceError("damaged")
        return self.sample


@dataclass
class ListSource:
    """Samples in shards of `per_shard`; a string in the place of a sample is the key of a damaged one."""

    samples: Sequence[Sample | str]
    name: str = "list"
    per_shard: int = 1000
    rejects: dict[str, list[Reject]] = field(default_factory=dict)

    def shards(self) -> Sequence[str]:
        return [
            f"s{start // self.per_shard}" for start in range(0, max(len(self.samples), 1), self.per_shard)
        ]

    def index(self, shard: str) -> ShardIndex:
        start = int(shard[1:]) * self.per_shard
        records: list[Record] = [
            Written(each, shard, None) if isinstance(each, str) else Written(each.key, shard, each)
            for each in self.samples[start : start + self.per_shard]
        ]
        return ShardIndex(records, self.rejects.get(shard, []))


def sample(
    number: int, *captions: str, image_id: str = "", second: bytes | None = None, **info: Any
) -> Sample:
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


class NumberEncoder:
    """The image encoder of models whose answers are written down."""

    def encode(self, images: Any, batch_size: int | None = None) -> Numbered:
        return images if isinstance(images, Numbered) else Numbered(torch.tensor(numbers(images)))

    def encode_videos(self, clips: Any, num_frames: int, batch_size: int | None = None) -> Numbered:
        return Numbered(torch.tensor(numbers(clips)), num_frames)
