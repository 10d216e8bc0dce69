"""Whether the training loader resumes exactly: killed at random moments, and divided among 1, 2 and 4 processes.

The claims: a process that is killed 20 times, each time at a random moment, and resumed from its last cursor, sees
the sequence of samples of one that was never stopped; and processes together see, step by step, what one sees.

    python benchmarks/loader_resume.py [--kills 20] [--num-workers 2] [--batch-size 32]
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loader_first_batch import write_shard

from openblip.data.batch import ImageTextProcessor
from openblip.data.config import Preprocessing
from openblip.data.loader import LoadedBatch, Loader
from openblip.data.sources import open_mixture
from openblip.data.tokenizer import Tokenizer

NUM_SHARDS = 10


def make_loader(spec: str, batch_size: int, **options: Any) -> Loader:
    """A loader of small images."""
    return Loader(
        open_mixture(spec),
        processor=ImageTextProcessor(),
        tokenizer=Tokenizer.train(["a text"], 150),
        preprocessing=Preprocessing(image_size=32),
        batch_size=batch_size,
        seed=0,
        **options,
    )


def names(loaded: LoadedBatch) -> list[list[str]]:
    """Shard and key of every sample."""
    return [list(pair) for pair in zip(loaded.batch.shards, loaded.batch.keys, strict=True)]


def read_log(log: Path) -> list[dict[str, Any]]:
    """The whole lines; one that was being written when its process was killed is removed from the file."""
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    log.write_bytes(b"".join(whole))
    return [json.loads(line) for line in whole]


def go_on(spec: str, log: Path, batch_size: int, num_workers: int) -> None:
    """Append the samples and the cursor of every batch to the log, from its last cursor on, for ever."""
    lines = read_log(log)
    cursor = lines[-1]["cursor"] if lines else None
    loader = make_loader(spec, batch_size, num_workers=num_workers, cursor=cursor)
    with log.open("ab") as file:
        for loaded in loader:
            line = json.dumps({"names": names(loaded), "cursor": loaded.cursor}).encode() + b"\n"
            os.write(file.fileno(), line)


def count_kills(spec: str, log: Path, options: argparse.Namespace) -> int:
    """Kill and restart the reading process."""
    moments = random.Random(0)
    for _ in range(options.kills):
        size = log.stat().st_size if log.exists() else 0
        numbers = [str(options.batch_size), str(options.num_workers)]
        process = subprocess.Popen(
            [sys.executable, __file__, "--go-on", spec, str(log), *numbers], start_new_session=True
        )
        while not log.exists() or log.stat().st_size <= size:
            if process.poll() is not None:
                raise SystemExit("the reading process failed")
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 1))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return int(options.kills)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--go-on", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.go_on:
        spec, log_path, *numbers = options.go_on
        go_on(spec, Path(log_path), *map(int, numbers))
        return
    with tempfile.TemporaryDirectory() as root:
        spec, log = f"{root}/{{0..{NUM_SHARDS - 1}}}.tar", Path(root) / "log.jsonl"
        for number in range(NUM_SHARDS):
            write_shard(Path(root) / f"{number}.tar", number)
        kills = count_kills(spec, log, options)
        lines = read_log(log)
        whole = list(itertools.islice(make_loader(spec, options.batch_size), len(lines)))
        same = sum(line["names"] == names(loaded) for line, loaded in zip(lines, whole, strict=True))
        print(f"killed {kills} times: {same} of {len(lines)} batches are those of an uninterrupted run")
        one = list(itertools.islice(make_loader(spec, 4 * options.batch_size), 100))
        for world_size in (2, 4):
            size = 4 * options.batch_size // world_size
            ranks = [
                list(itertools.islice(make_loader(spec, size, rank=r, world_size=world_size), 100))
                for r in range(world_size)
            ]
            same = sum(
                sorted(names(joint)) == sorted(name for rank in ranks for name in names(rank[step]))
                for step, joint in enumerate(one)
            )
            print(f"{world_size} processes: {same} of {len(one)} steps have the samples that one process has")


if __name__ == "__main__":
    main()
