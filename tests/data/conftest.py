"""Small real files of every format that a source can be."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Members = Iterable[tuple[str, bytes]]


def jpeg(value: int = 0, size: tuple[int, int] = (24, 16)) -> bytes:
    """A JPEG whose grey level tells images apart."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value % 256, 255 - value % 256, 128)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def as_json(**fields: object) -> bytes:
    return json.dumps(fields).encode()


@pytest.fixture
def write_tar() -> Callable[[Path, Members], Path]:
    def write(path: Path, members: Members) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, payload in members:
                info = tarfile.TarInfo(name)
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
        return path

    return write


@pytest.fixture
def make_image() -> Callable[..., bytes]:
    return jpeg


@pytest.fixture
def write_shards(write_tar: Callable[[Path, Members], Path]) -> Callable[..., Path]:
    """`write_shards(folder, samples_per_shard, corrupt)`: tar shards of numbered samples; `corrupt` maps a
    key to the bytes that stand in for its image."""

    def write(folder: Path, sizes: Iterable[int], *, corrupt: Mapping[str, bytes] = {}, num_captions: int = 1) -> Path:
        number = 0
        for shard, size in enumerate(sizes):
            members = []
            for _ in range(size):
                key = f"{number:05d}"
                texts = [f"sample {number} text {i}" for i in range(num_captions)]
                members.append((f"{key}.jpg", corrupt.get(key, jpeg(number))))
                members.append((f"{key}.json", as_json(captions=texts)))
                number += 1
            write_tar(folder / f"{shard:04d}.tar", members)
        return folder

    return write


@pytest.fixture
def random_image() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (37, 61, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Where an annotation file's images lie."""
    return tmp_path / "images"


@pytest.fixture
def write_images(images: Path) -> Callable[..., None]:
    """Writes images of different greys below `images`, by name."""

    def write(*names: str) -> None:
        for number, name in enumerate(names):
            path = images / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(number))

    return write
