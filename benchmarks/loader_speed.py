"""Samples per second of the training loader from local tar shards, beside those of an earlier version.

The claim: at least as many as the loader that indexed every shard, on the same machine, in alternating runs.

    python benchmarks/loader_speed.py --earlier PATH/TO/EARLIER/src [--num-workers 0 1 2] [--repeats 3]

Without --earlier only this version is measured. Both decode the same shards to the same random views.
"""

import argparse
import io
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NUM_SHARDS, SAMPLES, BATCH_SIZE, WARM_UP = 16, 1000, 64, 20


def write_shard(path: Path, seed: int) -> None:
    """Images as img2dataset stores them: 256 pixels wide, about 20 kB."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(50):
        values = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        encoded = io.BytesIO()
        smooth = Image.fromarray(values).resize((256, 256), Image.Resampling.BICUBIC)
        noise = rng.integers(-12, 13, (256, 256, 3))
        noisy = (np.asarray(smooth).astype(int) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(encoded, "JPEG", quality=85)
        images.append(encoded.getvalue())
    with tarfile.open(path, "w") as archive:
        for number in range(SAMPLES):
            for suffix, payload in (("jpg", images[number % 50]), ("txt", f"image number {number}".encode())):
                member = tarfile.TarInfo(f"{seed:05d}{number:04d}.{suffix}")
                member.size = len(payload)
                archive.addfile(member, io.BytesIO(payload))


def measure(folder: str, num_workers: int, batches: int) -> None:
    """Print samples per second after some batches, the seconds until the first, and CPU milliseconds a sample."""
    import torch

    from openblip.data.loader import Loader
    from openblip.data.sources import open_mixture
    from openblip.data.tokenizer import Tokenizer

    try:
        from openblip.data.config import Augmentation, Preprocessing
    except ImportError:  # the earlier version has them elsewhere
        from openblip.data.transforms import Augmentation, Preprocessing

    torch.set_num_threads(1)
    settings: dict[str, Any] = {}
    try:
        from openblip.data.batch import ImageTextProcessor

        settings["processor"] = ImageTextProcessor()
    except ImportError:  # the earlier version has another name for it, and a default
        pass
    started = time.perf_counter()
    loader = Loader(
        open_mixture(folder),
        tokenizer=Tokenizer.train(["image number 0123456789"], 150),
        preprocessing=Preprocessing(image_size=224),
        augmentation=Augmentation(),
        batch_size=BATCH_SIZE,
        seed=0,
        num_workers=num_workers,
        **settings,
    )
    iterator = iter(loader)
    next(iterator)
    first = time.perf_counter()
    for _ in itertools.islice(iterator, WARM_UP):
        pass
    warm = time.perf_counter()
    for _ in itertools.islice(iterator, batches):
        pass
    seconds = time.perf_counter() - warm
    del iterator  # ends the workers, whose time is known then
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_seconds = sum(part.ru_utime + part.ru_stime for part in usage)
    print(batches * BATCH_SIZE / seconds, first - started, 1000 * cpu_seconds / ((WARM_UP + batches) * BATCH_SIZE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--earlier", help="the folder that holds the earlier version's package")
    parser.add_argument("--num-workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, default=250)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, *numbers = options.measure
        measure(folder, *map(int, numbers))
        return
    versions = {"this version": str(Path(__file__).parents[1] / "src")}
    if options.earlier:
        versions["earlier version"] = options.earlier
    with tempfile.TemporaryDirectory() as root:
        for number in range(NUM_SHARDS):
            write_shard(Path(root) / f"{number:05d}.tar", number)
        for num_workers in options.num_workers:
            results: dict[str, list[list[float]]] = {name: [] for name in versions}
            for name in list(versions) * options.repeats:
                done = subprocess.run(
                    [sys.executable, __file__, "--measure", root, str(num_workers), str(options.batches)],
                    env={**os.environ, "PYTHONPATH": versions[name], "OMP_NUM_THREADS": "1"},
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                results[name].append([float(number) for number in done.stdout.split()])
            for name, runs in results.items():
                speeds, firsts, cpu = zip(*runs, strict=True)
                print(
                    f"{num_workers} workers, {name}: {statistics.median(speeds):.0f} samples/s (median of "
                    f"{', '.join(f'{speed:.0f}' for speed in speeds)}), first batch after "
                    f"{statistics.median(firsts):.2f} s, {statistics.median(cpu):.2f} ms of CPU a sample",
                    flush=True,
                )


if __name__ == "__main__":
    main()
