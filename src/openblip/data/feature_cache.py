"""Features of a frozen image encoder on disk: computed once, read in every epoch.

Features are stored under a hash of the image's encoded file, so they are found wherever a source keeps the
image, and never used for another image. A folder holds

    encoder.json        which encoder the features are of
    parts/NAME.bin      the features of some images one after the other, raw and little-endian
    parts/NAME.keys     the images' hashes, 16 bytes each
    parts/NAME.json     their number, shape and dtype, which images cannot be read, and how far the part goes in
                        its shard; written last

n images of a part, S their side in pixels, N image tokens, Dv their width.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from openblip.data.images import read_image
from openblip.data.reader import read_ahead
from openblip.data.sample import Located, Reject, Sample, Source
from openblip.data.sources.opening import Mixture
from openblip.data.transforms import Preprocessing
from openblip.errors import ConfigError, ImageError
from openblip.files import atomic_file, hash_bytes, read_json, write_bytes, write_json
from openblip.progress import Progress

ENCODER, PARTS = "encoder.json", "parts"
SAMPLES_PER_PART = 1024  # what a killed process has to do again
IMAGES_PER_BATCH = 32
# numpy has no bfloat16: its bits are stored as uint16, which no encoder computes in.
_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}

Encode = Callable[[torch.Tensor], torch.Tensor]
"""uint8 images (n, 3, S, S) -> features (n, N, Dv)."""


def open_cache(folder: Path, encoder: Mapping[str, Any]) -> None:
    """Make a folder the cache of an encoder, described by `encoder`.

    Raises `ConfigError`, with the difference, when it holds the features of another encoder.
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
    changed = [
        f"{name} was {earlier.get(name)}, is now {description.get(name)}"
        for name in {**earlier, **description}
        if earlier.get(name) != description.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds the features of another encoder: {'; '.join(changed)}. Choose another folder."
        )


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

    What a killed process did not write is done by the next one, and so is a shard that has grown, where its
    number of samples is known without reading it. An image that cannot be read is remembered with its reason.

    Args:
        folder: opened with `open_cache`.
        mixture: every shard of every source is read once, whatever the weights.
        preprocessing: makes the encoder's input.
        encode: the encoder; an image's features must not depend on the other images of its batch.
        rank: this process, of `world_size`.
        num_workers: threads that decode.

    Raises:
        SourceError: a whole shard cannot be opened.
    """
    cache = FeatureCache.open(folder)
    new_keys: set[bytes] = set()

    def decode(located: Located) -> _Decoded:
        sample = located.item
        if isinstance(sample, Reject):  # training meets it too, and names it
            return _Decoded(located.number, b"", None)
        key = image_key(sample.image)
        if key in cache or key in new_keys:
            return _Decoded(located.number, key, None)
        try:
            image = read_image(sample.image, name=f"{sample.shard}/{sample.key}")
            return _Decoded(located.number, key, preprocessing(image))
        except ImageError as error:
            return _Decoded(located.number, key, str(error))

    written: dict[str, list[Path]] = {}
    for path in sorted((folder / PARTS).glob("*-*.json")):
        written.setdefault(path.stem.rpartition("-")[0], []).append(path)
    units = _units(mixture, world_size)[rank::world_size]
    with Progress("encoding", unit="samples", visible=rank == 0) as bar:
        for unit in units:
            part = len(written.get(unit.name, []))
            start = unit.next_number(written.get(unit.name, []))
            if start is None:
                continue
            items = unit.source.read(unit.shard, start=start, pieces=unit.pieces)
            images = read_ahead(items, decode, num_workers=max(1, num_workers), ahead=4 * IMAGES_PER_BATCH)
            first = next(images, None)
            while True:
                with PartWriter(folder, f"{unit.name}-{part:05d}") as writer:
                    first = _write_part(writer, first, images, new_keys, encode, bar)
                    end = None if first is None else first.number
                    writer.progress = {"end": end, "samples": unit.source.num_samples(unit.shard)}
                part += 1
                if first is None:
                    break


class _Decoded(NamedTuple):
    number: int
    """The sample's number in its shard."""
    key: bytes
    pixels: np.ndarray | str | None
    """uint8 (3, S, S), or why the image cannot be read; None where there is nothing to do."""


def _write_part(
    writer: "PartWriter",
    image: _Decoded | None,
    images: Iterator[_Decoded],
    new_keys: set[bytes],
    encode: Encode,
    bar: Progress,
) -> _Decoded | None:
    """Write a part that begins with `image`, and return the first image after it."""
    batch: list[_Decoded] = []
    count, last = 0, -1
    while image is not None and (count < SAMPLES_PER_PART or image.number == last):
        count, last = count + 1, image.number
        if image.pixels is not None and image.key not in new_keys:
            new_keys.add(image.key)
            if isinstance(image.pixels, str):
                writer.reject(image.key, image.pixels)
            else:
                batch.append(image)
        image = next(images, None)
        bar.advance(1)
        if batch and (len(batch) == IMAGES_PER_BATCH or image is None or count >= SAMPLES_PER_PART):
            pixels = torch.from_numpy(np.stack([np.asarray(one.pixels) for one in batch]))  # (n, 3, S, S)
            writer.add([one.key for one in batch], encode(pixels))
            batch = []
    return image


class _Unit(NamedTuple):
    """What one process does of a shard: all of it where there are enough shards, else a piece."""

    source: Source
    shard: str
    pieces: tuple[int, int]

    @property
    def name(self) -> str:
        """What the names of its parts begin with."""
        return hash_bytes(json.dumps([self.source.name, self.shard, *self.pieces])).hex()

    def next_number(self, written: Sequence[Path]) -> int | None:
        """The number of the sample to go on at after the parts that are written; None when all are."""
        if not written:
            return 0
        last = read_json(written[-1])
        if last["end"] is None:
            count = self.source.num_samples(self.shard)
            return None if count is None or count == last["samples"] else 0
        return int(last["end"])


def _units(mixture: Mixture, world_size: int) -> list[_Unit]:
    shards = [(source, shard) for source in mixture.sources for shard in source.shards()]
    num_pieces = -(-world_size // max(1, len(shards)))
    return [_Unit(source, shard, (j, num_pieces)) for source, shard in shards for j in range(num_pieces)]


class PartWriter:
    """Writes one part, which appears as a whole or not at all; a context manager around `add` and `reject`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / PARTS / name
        self.progress: dict[str, int | None] = {}
        self._rejects: dict[str, str] = {}
        self._keys: list[bytes] = []
        self._layout: tuple[tuple[int, ...], str] | None = None

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._file = self._stack.enter_context(atomic_file(self.path.with_suffix(".bin"))).open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._stack.__exit__(kind, error, trace)
        if kind is not None:
            return
        write_bytes(self.path.with_suffix(".keys"), b"".join(self._keys))
        shape, dtype = self._layout or ((0, 0), "float32")
        layout = {"pictures": len(self._keys), "shape": shape, "dtype": dtype, "rejects": self._rejects}
        write_json(self.path.with_suffix(".json"), layout | self.progress)

    def add(self, keys: Sequence[bytes], features: torch.Tensor) -> None:
        """Features (n, N, Dv) of n images, float of any precision."""
        layout = tuple(features.shape[1:]), str(features.dtype).removeprefix("torch.")
        assert self._layout in (None, layout)  # one encoder, images of one size
        self._layout = layout
        self._file.write(to_array(features).astype(_DTYPES[layout[1]], copy=False).tobytes())
        self._keys += keys

    def reject(self, key: bytes, reason: str) -> None:
        """Remember that an image cannot be read."""
        self._rejects[key.hex()] = reason


class _Part(NamedTuple):
    path: Path
    num_images: int
    shape: tuple[int, ...]
    dtype: str
    rejects: Mapping[str, str]


@dataclass
class FeatureCache:
    """The parts that a folder had when it was opened; without file handles when it is pickled.

    As a reader of pixels it gives the features of a sample's image in their place.
    """

    folder: Path
    parts: list[_Part]
    hashes: np.ndarray
    """(images, 2) uint64, ascending by the first column."""
    rows: np.ndarray
    """(images, 2) int64: part, and row in it."""
    rejects: dict[bytes, str]
    _open: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "FeatureCache":
        """Every part of a folder. Raises `ConfigError` for one that is damaged."""
        folder = Path(folder)
        parts = [_read_part(path) for path in sorted((folder / PARTS).glob("*.json"))]
        hashes = [_read_hashes(part) for part in parts]
        layouts = {(part.shape, part.dtype) for part in parts if part.num_images}
        if len(layouts) > 1:
            raise ConfigError(f"{folder} holds features of several shapes, {layouts}: choose another folder.")
        rows = [np.stack([np.full(len(h), i), np.arange(len(h))], axis=1) for i, h in enumerate(hashes)]
        joined = np.concatenate([*hashes, np.empty((0, 2), np.uint64)])
        order = joined[:, 0].argsort(kind="stable")
        rejects = {bytes.fromhex(key): reason for part in parts for key, reason in part.rejects.items()}
        return cls(folder, parts, joined[order], np.concatenate([*rows, np.empty((0, 2), np.int64)])[order], rejects)

    def __call__(self, sample: Sample, view: object, rng: np.random.Generator) -> np.ndarray:
        """The features (N, Dv) of a sample's image, bfloat16 by its bits; there is one view alone.

        Raises `ImageError` for an image that could not be read, and `ConfigError` for one that was not there
        when the cache was built.
        """
        key = image_key(sample.image)
        if key in self.rejects:
            raise ImageError(self.rejects[key])
        features = self.read(key)
        if features is None:
            raise ConfigError(
                f"{sample.shard}/{sample.key}: its image was another one when {self.folder} was built. "
                "Remove that folder, or choose another."
            )
        return features

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None or key in self.rejects

    def __len__(self) -> int:
        """The number of images; an image of several parts counts as often."""
        return len(self.hashes)

    def read(self, key: bytes) -> np.ndarray | None:
        """Features (N, Dv), bfloat16 by its bits; None for an image that is not there."""
        row = self._find(key)
        if row is None:
            return None
        number, place = (int(value) for value in self.rows[row])
        if number not in self._open:
            part = self.parts[number]
            shape = (part.num_images, *part.shape)
            self._open[number] = np.memmap(part.path, _DTYPES[part.dtype], mode="r", shape=shape)
        return np.array(self._open[number][place])

    def _find(self, key: bytes) -> int | None:
        first, second = np.frombuffer(key, "<u8")
        row = int(np.searchsorted(self.hashes[:, 0], first))
        while row < len(self.hashes) and self.hashes[row, 0] == first:
            if self.hashes[row, 1] == second:
                return row
            row += 1
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def image_key(image: bytes) -> bytes:
    """The name of an image: 16 bytes that no two encoded files share."""
    return hash_bytes(image)


def to_array(features: torch.Tensor) -> np.ndarray:
    """A tensor of any device as an array, bfloat16 by its bits."""
    features = features.detach().cpu().contiguous()
    return (features.view(torch.uint16) if features.dtype == torch.bfloat16 else features).numpy()


def _read_part(path: Path) -> _Part:
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        shape = tuple(written["shape"])
        part = _Part(path.with_suffix(".bin"), written["pictures"], shape, written["dtype"], written["rejects"])
        expected = part.num_images * int(np.prod(shape)) * _DTYPES[part.dtype].itemsize
        size = part.path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: a damaged part of a feature cache ({error}); remove it.") from error
    if size != expected:
        raise ConfigError(f"{part.path} has {size} bytes and should have {expected}; remove {path}.")
    return part


def _read_hashes(part: _Part) -> np.ndarray:
    path = part.path.with_suffix(".keys")
    hashes = np.fromfile(path, "<u8").reshape(-1, 2)
    if len(hashes) != part.num_images:
        raise ConfigError(f"{path} has not {part.num_images} keys; remove {path.with_suffix('.json')}.")
    return hashes
