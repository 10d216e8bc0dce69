"""How long the training loader takes from 100,000 shard names to its first batch, and how much memory.

The claim: within 10 seconds, imports included, and under 1 GB for the process and its workers together. No shard is
counted or indexed before the first batch.

    python benchmarks/loader_first_batch.py [--shards 100000] [--num-workers 2]

The shards are hard links to a few tar files in a temporary folder. The names are given as a folder, and as
dir/{000000..099999}.tar.
"""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

SAMPLES, FILES, BATCH_SIZE = 500, 50, 64


def write_shard(path: Path, seed: int) -> None:
    """A shard of small random images with captions."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as archive:
        for number in range(SAMPLES):
            image = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(image, "JPEG")
            for suffix, payload in (("jpg", image.getvalue()), ("txt", b"a text")):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(payload)
                archive.addfile(member, io.BytesIO(payload))


def load(spec: str, num_workers: int) -> None:
    """Print the seconds to the first batch, and the peak memory of this process and its workers in MB."""
    started = time.perf_counter()
    import resource

    from openblip.data.batch import ImageTextProcessor
    from openblip.data.config import Preprocessing
    from openblip.data.loader import Loader
    from openblip.data.sources import open_mixture
    from openblip.data.tokenizer import Tokenizer

    imported = time.perf_counter()
    loader = Loader(
        open_mixture(spec),
        processor=ImageTextProcessor(),
        tokenizer=Tokenizer.train(["a text"], 150),
        preprocessing=Preprocessing(image_size=224),
        batch_size=BATCH_SIZE,
        seed=0,
        num_workers=num_workers,
    )
    batches = iter(loader)
    next(batches)
    first = time.perf_counter()
    del batches  # ends the workers, whose memory is known then
    own, workers = (
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(
        f"first batch after {first - started:.2f} s ({imported - started:.2f} s of them imports); "
        f"peak memory {own:.0f} MB, and {workers:.0f} MB of the largest of {num_workers} workers",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load, options.num_workers)
        return
    with tempfile.TemporaryDirectory() as root:
        for number in range(FILES):
            write_shard(Path(root) / f"{number:06d}.tar", number)
        for number in range(FILES, options.shards):
            os.link(Path(root) / f"{number % FILES:06d}.tar", Path(root) / f"{number:06d}.tar")
        for spec in (root, f"{root}/{{000000..{options.shards - 1:06d}}}.tar"):
            print(f"{options.shards} shards, {spec.replace(root, 'DIR')}: ", end="", flush=True)
            command = [sys.executable, __file__, "--load", spec, "--num-workers", str(options.num_workers)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
