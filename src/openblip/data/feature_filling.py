"""Fills a feature cache: every picture of a mixture, encoded once, by several processes.

The work is cut into blocks of records. A block becomes a part of the cache, whose name tells which records it
is of: what a killed process left undone is done by the next one, and what a source got since is added.

n pictures, S their side in pixels, N image tokens, Dv their width.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from openblip.data.features import FeatureStore, PartWriter, is_written, picture_key
from openblip.data.images import read_image
from openblip.data.loader import start_worker, unchanged
from openblip.data.sample import Record
from openblip.data.sources.opening import Mixture
from openblip.data.transforms import Preprocessing
from openblip.errors import ImageError, SourceError
from openblip.progress import Progress

BLOCK = 1024  # records of a part: as many as a killed process has to do again
AT_ONCE = 32

Encode = Callable[[torch.Tensor], torch.Tensor]
"""uint8 pictures (n, 3, S, S) -> features (n, N, Dv)."""


class Block(NamedTuple):
    """Some records of a shard, and the name of what they become."""

    name: str
    records: Sequence[Record]


class _Picture(NamedTuple):
    key: bytes
    pixels: np.ndarray | str
    """uint8 (3, S, S), or why it cannot be read."""


def fill(
    folder: Path,
    mixture: Mixture,
    preprocessing: Preprocessing,
    encode: Encode,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> None:
    """Encode this process's share of the pictures that the folder does not have yet.

    A picture that cannot be read is remembered with its reason. Raises SourceError when a whole shard cannot
    be opened.
    """
    # By their places among all blocks: other processes may be ahead, and have written some already.
    own = [block for number, block in enumerate(blocks(mixture)) if number % world_size == rank]
    share = [block for block in own if not is_written(folder, block.name)]
    if not share:
        return
    known = FeatureStore.open(folder)
    seen: set[bytes] = set()
    total = sum(len(block.records) for block in share)
    with Progress("encoding", total=total, unit="samples", visible=rank == 0) as bar:
        for block in share:
            with PartWriter(folder, block.name) as part:
                for pictures, num_records in _decoded(block, preprocessing, num_workers):
                    new = [p for p in pictures if p.key not in known and p.key not in seen]
                    seen |= {picture.key for picture in new}
                    _add(part, new, encode)
                    bar.advance(num_records)


def blocks(mixture: Mixture) -> Iterator[Block]:
    """All records of all sources, by shard and in file order."""
    for source in mixture.sources:
        for shard in source.shards():
            records = source.index(shard).records
            for start in range(0, len(records), BLOCK):
                some = records[start : start + BLOCK]
                names = json.dumps([source.name, shard, *(record.key for record in some)])
                yield Block(hashlib.blake2b(names.encode(), digest_size=16).hexdigest(), some)


def _add(part: PartWriter, pictures: Sequence[_Picture], encode: Encode) -> None:
    good = []
    for picture in pictures:
        if isinstance(picture.pixels, str):
            part.reject(picture.key, picture.pixels)
        else:
            good.append((picture.key, picture.pixels))
    if good:
        pixels = torch.from_numpy(np.stack([pixels for _, pixels in good]))
        part.add([key for key, _ in good], encode(pixels))


@dataclass(frozen=True)
class _Decoder(Dataset[tuple[list[_Picture], int]]):
    """Runs in the workers: some records in, their different pictures and the number of records out."""

    records: Sequence[Record]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return -(-len(self.records) // AT_ONCE)

    def __getitem__(self, number: int) -> tuple[list[_Picture], int]:
        pictures: dict[bytes, _Picture] = {}
        records = self.records[number * AT_ONCE : (number + 1) * AT_ONCE]
        for record in records:
            try:
                sample = record.read()
            except (SourceError, OSError):  # training meets it in the same way, and names it
                continue
            key = picture_key(sample.image)
            if key in pictures:
                continue
            try:
                image = read_image(sample.image, name=f"{sample.shard}/{sample.key}")
                pictures[key] = _Picture(key, self.preprocessing(image))
            except ImageError as error:
                pictures[key] = _Picture(key, str(error))
        return list(pictures.values()), len(records)


def _decoded(
    block: Block, preprocessing: Preprocessing, num_workers: int
) -> Iterator[tuple[list[_Picture], int]]:
    loader = DataLoader(
        _Decoder(block.records, preprocessing),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=unchanged,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # its own: the default would advance torch's global one
    )
    return iter(loader)
