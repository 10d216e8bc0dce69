"""Features of a frozen image encoder on disk: computed once, read at every epoch.

A picture is known by a hash of its encoded file, so features are found wherever a source keeps it, and are
never another picture's. A folder holds

    encoder.json        whose features these are
    parts/NAME.bin      those of some pictures one after the other, raw and little-endian
    parts/NAME.keys     their hashes, 16 bytes each
    parts/NAME.json     their number, shape and dtype, and which pictures cannot be read; written last

n pictures of a part, N image tokens, Dv their width.
"""

import hashlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from openblip.data.batch import View
from openblip.data.sample import Sample
from openblip.errors import ConfigError, ImageError

ENCODER, PARTS = "encoder.json", "parts"
_KEY_BYTES = 16
# numpy has no bfloat16: its bits travel as uint16, which no encoder computes in.
_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}


def picture_key(image: bytes) -> bytes:
    """The name of a picture: 16 bytes that no two encoded files share."""
    return hashlib.blake2b(image, digest_size=_KEY_BYTES).digest()


def to_array(features: torch.Tensor) -> np.ndarray:
    """A tensor of any device as an array, bfloat16 by its bits; `batch.to_tensor` is the inverse."""
    features = features.detach().cpu().contiguous()
    return (features.view(torch.uint16) if features.dtype == torch.bfloat16 else features).numpy()


def claim(folder: Path, encoder: Mapping[str, Any]) -> None:
    """Make the folder one of this encoder's features; ConfigError, with the difference, when it is not."""
    described = json.loads(json.dumps(encoder))  # tuples become lists, as in the file
    path = folder / ENCODER
    if not path.is_file():
        if any((folder / PARTS).glob("*.json")):
            raise ConfigError(f"{folder} holds features and no {ENCODER} that says whose: choose another.")
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        _write_json(path, described)
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Choose another folder.") from error
    names = {**earlier, **described}
    changed = [
        f"{name} was {earlier.get(name)}, is now {described.get(name)}"
        for name in names
        if earlier.get(name) != described.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds the features of another encoder: {'; '.join(changed)}. Choose another folder."
        )


class PartWriter:
    """Writes one part, which is there as a whole or not at all; a context manager around `add`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder / PARTS, name
        self.rejects: dict[str, str] = {}
        self._keys: list[bytes] = []
        self._layout: tuple[tuple[int, ...], str] | None = None
        # Of its own: another process may be at the same part, and what it writes is the same.
        self._partial = self.folder / f"{name}.{socket.gethostname()}.{os.getpid()}.partial"

    def __enter__(self) -> Self:
        self._file = open(self._partial, "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is not None:
            self._partial.unlink()
            return
        os.replace(self._partial, self.folder / f"{self.name}.bin")
        self._partial.write_bytes(b"".join(self._keys))
        os.replace(self._partial, self.folder / f"{self.name}.keys")
        shape, dtype = self._layout or ((0, 0), "float32")
        written = {"pictures": len(self._keys), "shape": shape, "dtype": dtype, "rejects": self.rejects}
        _write_json(self.folder / f"{self.name}.json", written)

    def add(self, keys: Sequence[bytes], features: torch.Tensor) -> None:
        """Features (n, N, Dv) of n pictures, float of any precision."""
        layout = tuple(features.shape[1:]), str(features.dtype).removeprefix("torch.")
        assert self._layout in (None, layout)  # one encoder, pictures of one size
        self._layout = layout
        self._file.write(to_array(features).astype(_DTYPES[layout[1]], copy=False).tobytes())
        self._keys += keys

    def reject(self, key: bytes, reason: str) -> None:
        """Remember that a picture cannot be read."""
        self.rejects[key.hex()] = reason


def is_written(folder: Path, name: str) -> bool:
    """Whether a part is there."""
    return (folder / PARTS / f"{name}.json").is_file()


class _Part(NamedTuple):
    path: Path
    pictures: int
    shape: tuple[int, ...]
    dtype: str
    rejects: Mapping[str, str]


@dataclass
class FeatureStore:
    """The parts that were there when it was opened; small, and without file handles when it is pickled."""

    folder: Path
    parts: list[_Part]
    hashes: np.ndarray
    """(pictures, 2) uint64, ascending by the first column."""
    places: np.ndarray
    """(pictures, 2) int64: part, and row in it."""
    rejects: dict[bytes, str]
    _open: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "FeatureStore":
        """Every part of a folder. ConfigError for one that is damaged."""
        folder = Path(folder)
        parts = [_read_part(path) for path in sorted((folder / PARTS).glob("*.json"))]
        hashes = [_read_hashes(part) for part in parts]
        layouts = {(part.shape, part.dtype) for part in parts if part.pictures}
        if len(layouts) > 1:
            raise ConfigError(f"{folder} holds features of several shapes, {layouts}: choose another.")
        rows = [np.stack([np.full(len(h), i), np.arange(len(h))], axis=1) for i, h in enumerate(hashes)]
        joined = np.concatenate([*hashes, np.empty((0, 2), np.uint64)])
        order = joined[:, 0].argsort(kind="stable")
        places = np.concatenate([*rows, np.empty((0, 2), np.int64)])[order]
        rejects = {bytes.fromhex(key): reason for part in parts for key, reason in part.rejects.items()}
        return cls(folder, parts, joined[order], places, rejects)

    def __contains__(self, key: bytes) -> bool:
        return self._place(key) is not None or key in self.rejects

    def __len__(self) -> int:
        """Pictures, a picture of several parts as often."""
        return len(self.hashes)

    def read(self, key: bytes) -> np.ndarray | None:
        """Features (N, Dv), bfloat16 by its bits; None of a picture that is not there."""
        place = self._place(key)
        if place is None:
            return None
        number, row = place
        if number not in self._open:
            part = self.parts[number]
            shape = (part.pictures, *part.shape)
            self._open[number] = np.memmap(part.path, _DTYPES[part.dtype], mode="r", shape=shape)
        return np.array(self._open[number][row])

    def _place(self, key: bytes) -> tuple[int, int] | None:
        first, second = np.frombuffer(key, "<u8")
        row = int(np.searchsorted(self.hashes[:, 0], first))
        while row < len(self.hashes) and self.hashes[row, 0] == first:
            if self.hashes[row, 1] == second:
                return int(self.places[row, 0]), int(self.places[row, 1])
            row += 1
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


@dataclass(frozen=True)
class CachedFeatures:
    """The features of a sample's picture, (N, Dv), in place of its pixels: a `PixelReader` without views."""

    store: FeatureStore

    def __call__(self, sample: Sample, view: View, rng: np.random.Generator) -> np.ndarray:
        key = picture_key(sample.image)
        if key in self.store.rejects:
            raise ImageError(self.store.rejects[key])
        features = self.store.read(key)
        if features is None:
            raise ConfigError(
                f"{sample.shard}/{sample.key}: its picture was another one when {self.store.folder} was "
                "filled. Choose another folder."
            )
        return features


def _read_part(path: Path) -> _Part:
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        shape = tuple(written["shape"])
        part = _Part(
            path.with_suffix(".bin"), written["pictures"], shape, written["dtype"], written["rejects"]
        )
        expected = part.pictures * int(np.prod(shape)) * _DTYPES[part.dtype].itemsize
        size = part.path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: a damaged part of a feature cache ({error}); remove it.") from error
    if size != expected:
        raise ConfigError(f"{part.path} has {size} bytes and should have {expected}; remove {path}.")
    return part


def _read_hashes(part: _Part) -> np.ndarray:
    path = part.path.with_suffix(".keys")
    hashes = np.fromfile(path, "<u8").reshape(-1, 2)
    if len(hashes) != part.pictures:
        raise ConfigError(f"{path} has not {part.pictures} keys; remove {path.with_suffix('.json')}.")
    return hashes


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
