"""How many bytes and requests the training loader needs from remote shards, over five epochs.

A file system of fsspec counts what is fetched. The claim: at most 1.2 times five times the shards, with a few
requests a shard, by one process and by four, from many shards; and less from few shards, which are copied once.

    python benchmarks/loader_bytes.py [--shards 64 4] [--ranks 1 4] [--megabytes 64] [--epochs 5]

The shards are sparse tar files in a temporary folder, so they need little of the disk. Images are not decoded.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from openblip.data.batch import Batch, Example, SampleProcessor, View, shared_fields
from openblip.data.config import Preprocessing
from openblip.data.loader import Loader
from openblip.data.sample import Sample
from openblip.data.sources import open_mixture
from openblip.data.tokenizer import Tokenizer

LOG = "FETCHED_LOG"
IMAGE_BYTES = 200_000


class CountedFile(AbstractBufferedFile):
    """A local file that logs every range that is fetched from it."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(start)
            data = file.read(end - start)
        self.fs.log(len(data))
        return data


class CountedFileSystem(AbstractFileSystem):
    """Local files as `counted://`. Listings are not counted."""

    protocol = "counted"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("counted://")

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        return LocalFileSystem().ls(self._strip_protocol(path), detail=detail)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return dict(LocalFileSystem().info(self._strip_protocol(path)))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> CountedFile:
        options = {k: v for k, v in options.items() if k in ("block_size", "cache_type", "cache_options")}
        return CountedFile(self, path, mode, size=os.stat(path).st_size, **options)

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        data = Path(self._strip_protocol(rpath)).read_bytes()
        self.log(len(data))
        Path(lpath).write_bytes(data)

    @staticmethod
    def log(num_bytes: int) -> None:
        """Append a request; lines of several processes do not mix."""
        with open(os.environ[LOG], "a") as file:
            file.write(f"{num_bytes}\n")


@dataclass(frozen=True, kw_only=True)
class Undecoded(SampleProcessor):
    """Takes only the key of a sample."""

    def __call__(self, sample: Sample, view: View, rng: np.random.Generator) -> Example:
        return Example(sample.key, sample.shard, np.zeros(1, np.uint8), None)

    def content(self, sample: Sample, rng: np.random.Generator) -> None:
        return None

    def collate(self, examples: Any, tokenizer: Tokenizer) -> Batch:
        return Batch(**shared_fields(examples))


def write_shard(path: Path, num_samples: int) -> None:
    """A tar whose images are holes of the file."""
    with path.open("wb") as file:
        for number in range(num_samples):
            for suffix, size in (("jpg", IMAGE_BYTES), ("txt", 6)):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = size
                file.write(member.tobuf())
                if suffix == "txt":
                    file.write(b"a text")
                file.seek(-(-(file.tell() + (size if suffix == "jpg" else 0)) // 512) * 512)
        file.truncate(file.tell() + 1024)


def read(folder: str, rank: int, world_size: int, steps: int) -> None:
    """One process of a job: the batches of some steps."""
    fsspec.register_implementation("counted", CountedFileSystem)
    loader = Loader(
        open_mixture(f"counted://{folder}"),
        processor=Undecoded(),
        tokenizer=None,
        preprocessing=Preprocessing(),
        batch_size=64 // world_size,
        seed=0,
        rank=rank,
        world_size=world_size,
    )
    for _ in itertools.islice(loader, steps):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--shards", type=int, nargs="+", default=[64, 4])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--megabytes", type=int, default=64, help="of a shard")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--read", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        folder, *numbers = options.read
        read(folder, *map(int, numbers))
        return
    num_samples = options.megabytes * 1_000_000 // IMAGE_BYTES
    for num_shards, num_ranks in itertools.product(options.shards, options.ranks):
        with tempfile.TemporaryDirectory() as root:
            folder, log, copies = Path(root) / "shards", Path(root) / "log", Path(root) / "copies"
            folder.mkdir()
            copies.mkdir()
            for shard in range(num_shards):
                write_shard(folder / f"{shard:05d}.tar", num_samples)
            size = sum(path.stat().st_size for path in folder.iterdir())
            steps = options.epochs * num_shards * num_samples // 64
            started = time.perf_counter()
            processes = [
                subprocess.Popen(
                    [sys.executable, __file__, "--read", str(folder), str(r), str(num_ranks), str(steps)],
                    env={**os.environ, LOG: str(log), "TMPDIR": str(copies)},
                )
                for r in range(num_ranks)
            ]
            if any(process.wait() for process in processes):
                raise SystemExit("a process failed")
            requests = [int(line) for line in log.read_text().split()]
            epochs = options.epochs
            print(
                f"{num_shards} shards of {size / num_shards / 1e6:.0f} MB, {num_ranks} processes, {epochs} epochs: "
                f"{sum(requests) / 1e9:.2f} GB = {sum(requests) / (epochs * size):.3f} x {epochs} x the shards, "
                f"{len(requests) / (epochs * num_shards):.1f} requests a shard and epoch of "
                f"{sum(requests) / len(requests) / 1e6:.1f} MB, {time.perf_counter() - started:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
