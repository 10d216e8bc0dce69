"""Features of a frozen image encoder on disk: computed once, read in every epoch.

Features are stored under a hash of the image's encoded file, so they are found wherever a source keeps the image, and
never used for another image. A folder holds

    encoder.json        which encoder the features are of
    parts/NAME.bin      the features of some images one after the other, raw and little-endian
    parts/NAME.keys     the images' hashes, 16 bytes each
    parts/NAME.json     their number, shape and dtype, which images cannot be read, and how far the part goes in its
                        shard; written last

n images of a part, S their side in pixels, N image tokens, Dv their width.
"""

import json
import os
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from openblip.data.config import Preprocessing
from openblip.data.images import read_image
from openblip.data.reader import read_ahead
from openblip.data.sample import Located, Reject, Sample
from openblip.data.sources.opening import Mixture
from openblip.errors import ConfigError, ImageError
from openblip.files import atomic_file, hash_bytes, read_json, write_bytes, write_json
from openblip.progress import Progress

ENCODER, PARTS = "encoder.json", "parts"
SAMPLES_PER_PART = 1024  # what a killed process has to do again
IMAGES_PER_BATCH = 32
# numpy has no bfloat16: its bits are stored as uint16, which no encoder computes in.
_DTYPES = {name: np.dtype(code) for name, code in (("float32", "<f4"), ("float16", "<f2"), ("bfloat16", "<u2"))}
_KEY = np.dtype("S16")

Encode = Callable[[torch.Tensor], torch.Tensor]  # uint8 images (n, 3, S, S) -> features (n, N, Dv)


def open_cache(folder: Path, encoder: Mapping[str, Any]) -> None:
    """Make a folder the cache of an encoder, described by `encoder`. Raises `ConfigError`, with the difference, when it
    holds the features of another encoder.
    """
    description = json.loads(json.dumps(encoder))  # tuples become lists, as in the file
    path = folder / ENCODER
    if not path.is_file():
        if any((folder / PARTS).glob("*.json")):
            raise ConfigError(
                f"{folder} holds features, but no {ENCODER} that says of which encoder: choose another folder."
            )
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        write_json(path, description)
        return
    earlier = read_json(path)
    changed = "; ".join(
        f"{name} was {earlier.get(name)}, is now {description.get(name)}"
        for name in {**earlier, **description}
        if earlier.get(name) != description.get(name)
    )
    if changed:
        raise ConfigError(f"{folder} holds the features of another encoder: {changed}. Choose another folder.")


def build_cache(
    folder: Path,
    mixture: Mixture,
    preprocessing: Preprocessing,
    encode: Encode,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> None:
    """Compute the features of this process's share of the images of a mixture that the cache does not have.

    What a killed process did not write is done by the next one, and so is a shard that has grown, where its number of
    samples is known without reading it. An image that cannot be read is remembered with its reason. Raises
    `SourceError` when a whole shard cannot be opened.

    Args:
        folder: opened with `open_cache`.
        mixture: every shard of every source is read once, whatever the weights.
        encode: the encoder; an image's features must not depend on the other images of its batch.
        num_workers: threads that decode the share of process `rank` of `world_size`.
    """
    cache = FeatureCache(folder)
    new_keys: set[bytes] = set()

    def decode(located: Located) -> _Decoded:
        sample = located.item
        if isinstance(sample, Reject):  # training meets it too, and names it
            return _Decoded(located.number, b"", None)
        key = hash_bytes(sample.image)
        if key in cache or key in new_keys:
            return _Decoded(located.number, key, None)
        try:
            image = read_image(sample.image, name=f"{sample.shard}/{sample.key}")
            return _Decoded(located.number, key, preprocessing(image))
        except ImageError as error:
            return _Decoded(located.number, key, str(error))

    shards = [(source, shard) for source in mixture.sources for shard in source.shards()]
    num_pieces = -(-world_size // max(1, len(shards)))  # of a shard, where there are fewer than processes
    units = [(source, shard, (j, num_pieces)) for source, shard in shards for j in range(num_pieces)]
    written: dict[str, list[Path]] = {}  # by the beginning of their names, which tells shard and piece
    for path in sorted((folder / PARTS).glob("*-*.json")):
        written.setdefault(path.stem.rpartition("-")[0], []).append(path)
    with Progress("encoding", unit="samples", visible=rank == 0) as bar:
        for source, shard, pieces in units[rank::world_size]:
            name = hash_bytes(json.dumps([source.name, shard, *pieces])).hex()
            earlier = written.get(name, [])
            start = 0
            if earlier:
                last_part = read_json(earlier[-1])
                if last_part["end"] is not None:
                    start = int(last_part["end"])
                elif source.num_samples(shard) in (None, last_part["samples"]):
                    continue
            items = source.read(shard, start=start, pieces=pieces)
            images = read_ahead(items, decode, num_workers=max(1, num_workers), ahead=4 * IMAGES_PER_BATCH)
            part, image = len(earlier), next(images, None)
            while part == len(earlier) or image is not None:
                with PartWriter.open(folder, f"{name}-{part:05d}") as writer:
                    batch: list[_Decoded] = []
                    count, last = 0, -1
                    # Items with one number stay in one part, so that their number tells where to go on.
                    while image is not None and (count < SAMPLES_PER_PART or image.number == last):
                        count, last = count + 1, image.number
                        if image.pixels is not None and image.key not in new_keys:
                            new_keys.add(image.key)
                            batch.append(image)
                        if len(batch) == IMAGES_PER_BATCH:
                            _write_batch(writer, batch, encode)
                            batch = []
                        image = next(images, None)
                        bar.advance(1)
                    _write_batch(writer, batch, encode)
                    end = None if image is None else image.number
                    writer.progress = {"end": end, "samples": source.num_samples(shard)}
                part += 1


class _Decoded(NamedTuple):
    number: int  # the sample's number in its shard
    key: bytes
    pixels: np.ndarray | str | None  # uint8 (3, S, S), or why the image cannot be read; None where nothing is to do


def _write_batch(writer: "PartWriter", images: list[_Decoded], encode: Encode) -> None:
    """Write the features of a batch, and the reasons of the images that cannot be read."""
    readable = {image.key: image.pixels for image in images if isinstance(image.pixels, np.ndarray)}
    if readable:
        pixels = torch.from_numpy(np.stack(list(readable.values())))  # (n, 3, S, S)
        writer.add(list(readable), encode(pixels))
    writer.rejects |= {image.key.hex(): image.pixels for image in images if isinstance(image.pixels, str)}


@dataclass
class PartWriter:
    """Writes one part of a cache."""

    file: BinaryIO
    progress: dict[str, int | None] = field(default_factory=dict)  # how far it goes in its shard of how many samples
    rejects: dict[str, str] = field(default_factory=dict)  # why images cannot be read, by their hexadecimal hashes
    keys: list[bytes] = field(default_factory=list)
    layout: tuple[tuple[int, ...], str] = ((0, 0), "float32")  # shape (N, Dv) and dtype of the features of an image

    @classmethod
    @contextmanager
    def open(cls, folder: Path, name: str) -> "Iterator[PartWriter]":
        """A writer, whose part appears as a whole when the context ends, and not at all after an error."""
        path = folder / PARTS / name
        with atomic_file(path.with_suffix(".bin")) as partial, partial.open("wb") as file:
            writer = cls(file)
            yield writer
        write_bytes(path.with_suffix(".keys"), b"".join(writer.keys))
        (shape, dtype), content = writer.layout, {"rejects": writer.rejects, **writer.progress}
        write_json(path.with_suffix(".json"), {"pictures": len(writer.keys), "shape": shape, "dtype": dtype, **content})

    def add(self, keys: Sequence[bytes], features: torch.Tensor) -> None:
        """Write features (n, N, Dv) of n images, of float32, float16 or bfloat16."""
        layout = tuple(features.shape[1:]), str(features.dtype).removeprefix("torch.")
        assert not self.keys or layout == self.layout  # one encoder, images of one size
        self.layout = layout
        self.file.write(to_array(features).astype(_DTYPES[layout[1]], copy=False).tobytes())
        self.keys += keys


class _Part(NamedTuple):
    path: Path
    num_images: int
    shape: tuple[int, ...]
    dtype: str
    rejects: Mapping[str, str]


class FeatureCache:
    """The parts that a folder has when it is opened; without file handles when it is pickled. As a reader of pixels it
    gives the features of a sample's image in their place. Raises `ConfigError` for a damaged part.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        read = [_read_part(path) for path in sorted((self.folder / PARTS).glob("*.json"))]
        self.parts = [part for part, _ in read]
        layouts = {(part.shape, part.dtype) for part in self.parts if part.num_images}
        if len(layouts) > 1:
            raise ConfigError(f"{folder} holds features of several shapes, {layouts}: choose another folder.")
        keys = np.concatenate([np.empty(0, _KEY), *(keys for _, keys in read)])
        # Where an image is among those of all parts, counted through, in the ascending order of the keys.
        self._rows = keys.argsort(kind="stable")
        self.keys = keys[self._rows]  # an image of several parts is there as often
        self._first_rows = list(accumulate((part.num_images for part in self.parts), initial=0))  # of each part
        self._rejects = {bytes.fromhex(key): reason for part in self.parts for key, reason in part.rejects.items()}
        self._open: dict[int, np.ndarray] = {}

    def __call__(self, sample: Sample, view: object, rng: np.random.Generator) -> np.ndarray:
        """The features (N, Dv) of a sample's image, bfloat16 by its bits; there is one view alone. Raises `ImageError`
        for an image that could not be read, and `ConfigError` for one that was not there when the cache was built.
        """
        key = hash_bytes(sample.image)
        if key in self._rejects:
            raise ImageError(self._rejects[key])
        features = self.read(key)
        if features is None:
            raise ConfigError(
                f"{sample.shard}/{sample.key}: its image was another one when {self.folder} was built. "
                "Remove that folder, or choose another."
            )
        return features

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None or key in self._rejects

    def read(self, key: bytes) -> np.ndarray | None:
        """Features (N, Dv), bfloat16 by its bits; None for an image that is not there."""
        row = self._find(key)
        if row is None:
            return None
        number = bisect(self._first_rows, row, hi=len(self.parts)) - 1
        if number not in self._open:
            part = self.parts[number]
            shape = (part.num_images, *part.shape)
            self._open[number] = np.memmap(part.path, _DTYPES[part.dtype], mode="r", shape=shape)
        return np.array(self._open[number][row - self._first_rows[number]])

    def _find(self, key: bytes) -> int | None:
        index = int(np.searchsorted(self.keys, np.frombuffer(key, _KEY))[0])
        return int(self._rows[index]) if self.keys[index : index + 1].tobytes() == key else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def to_array(features: torch.Tensor) -> np.ndarray:
    """A tensor of any device as an array, bfloat16 by its bits."""
    features = features.detach().cpu().contiguous()
    return (features.view(torch.uint16) if features.dtype == torch.bfloat16 else features).numpy()


def _read_part(path: Path) -> tuple[_Part, np.ndarray]:
    """A part, and the hashes of its images."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        shape = tuple(written["shape"])
        part = _Part(path.with_suffix(".bin"), written["pictures"], shape, written["dtype"], written["rejects"])
        expected = part.num_images * int(np.prod(shape)) * _DTYPES[part.dtype].itemsize
        size = part.path.stat().st_size
        keys = np.fromfile(path.with_suffix(".keys"), _KEY)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: a damaged part of a feature cache ({error}); remove it.") from error
    if size != expected:
        raise ConfigError(f"{part.path} has {size} bytes and should have {expected}; remove {path}.")
    if len(keys) != part.num_images:
        raise ConfigError(f"{path.with_suffix('.keys')} has not {part.num_images} keys; remove {path}.")
    return part, keys
