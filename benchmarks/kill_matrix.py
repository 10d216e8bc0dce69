"""A CapFilt run whose process is killed at any moment: the same command finishes it, and the rows are the same.

For each moment a run is begun anew and SIGKILL hits the driver, one of two worker processes, or a process or node of a
Ray cluster: before and after the rename that shows a file, with a file half written, while the models load, and within
batches. What the kill left is checked (whatever has its final name is whole), the same call is made again, and the run
is compared with one that nobody touched: rows, kept files of finished shards, leftovers. With `--engine ray` the
cluster has two nodes with logical GPUs on this machine.
"""

import contextlib
import os
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import Report, parser

SHARDS, IMAGES, BATCH = 6, 6, 3
RENAMED = (
    "manifest.json", "00000.parquet", "00003.parquet", "00005.parquet", "00003.rejects.jsonl", "00000.report.json",
    "00003.report.json", "00005.report.json", "report.html",
)  # fmt: skip
HALVED = ("manifest.json", "00003.parquet", "00003.report.json")
BATCHES = (0, 5, 11)
PATIENCE = 300  # seconds after which a killed run counts as one that hangs


class Kill(NamedTuple):
    """One row of the matrix: who dies, when, and what arranges it in the process of the driver."""

    process: str
    moment: str
    arrange: Callable[[], contextlib.AbstractContextManager[Any]]
    device: str = "cpu"
    survives: bool = False
    """Whether the run itself goes on to its end."""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--engine", choices=("local", "ray"), default="local")
    options.add_argument("--after", type=int, nargs="+", default=[0, 1, 3, SHARDS - 1], help="shards; of Ray")
    report = Report("kill_matrix", __doc__, options.parse_args())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder / "web")
        run = Runs(folder)
        print("| process | moment | shards done then | rows afterwards | finished shards redone | left over |")
        print("|---|---|---|---|---|---|")
        results = []
        for row in run.local() if report.options.engine == "local" else run.ray(report.options.after):
            results.append(row)
            print("|", " | ".join(str(value) for value in row.values()), "|", flush=True)
    report.facts[f"matrix of {report.options.engine}"] = results
    good = sum(row["rows"] == "identical" and not row["redone"] and not row["left over"] for row in results)
    report.add(
        f"{report.options.engine}: kills after which all is as if nothing had been", good / len(results), target=1.0
    )
    report.facts["kills"] = len(results)
    report.save()
    sys.exit(0 if good == len(results) else 1)


def write_shards(folder: Path) -> None:
    """Images of random blocks with words; one of each shard cannot be read."""
    from PIL import Image

    folder.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(IMAGES):
                draw = np.random.default_rng([shard, number])
                file = BytesIO()
                Image.fromarray(draw.integers(0, 256, (6, 8, 3), np.uint8)).resize((80, 60)).save(file, "JPEG")
                text = " ".join(draw.choice(["red", "dog", "small", "green", "cat", "and", "a"], 4))
                image = b"broken" if number == 4 else file.getvalue()
                for suffix, content in (("jpg", image), ("txt", text.encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))


class Runs:
    """Runs over the same shards, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        import torch

        from openblip.capfilt.config import CapFiltConfig

        torch.set_num_threads(1)  # this process is forked
        self.folder = folder
        self.config = CapFiltConfig(
            source=str(folder / "web"),
            captioner="openblip-mini-captioner",
            filter="openblip-mini-filter",
            batch_size=BATCH,
            num_workers=1,
            dtype="float32",
            no_check=True,
        )
        self.call(folder / "whole")
        self.whole = self.rows(folder / "whole")

    def call(self, out: Path, device: str = "cpu", engine: Any = None) -> None:
        from openblip.capfilt.local import run_capfilt

        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
            summary = run_capfilt(self.config, out, device=device, engine=engine)
        if summary.failed:
            raise AssertionError(f"shards failed: {summary.failed}")

    def rows(self, out: Path) -> list[Any]:
        from openblip.data.captions import finished_shards, read_captions

        return [row for shard in finished_shards(out) for row in read_captions(out, shard).to_pylist()]

    def local(self) -> Iterator[dict[str, Any]]:
        for kill in local_kills():
            out = self.folder / "killed"
            child = os.fork()
            if child == 0:
                signal.alarm(PATIENCE)
                with kill.arrange():
                    self.call(out, kill.device)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            ended = os.waitstatus_to_exitcode(status)
            if ended != (0 if kill.survives else -signal.SIGKILL):
                raise AssertionError(f"{kill.moment}: the run ended with {ended}")
            yield self.finish(kill.process, kill.moment, out)

    def finish(self, process: str, moment: str, out: Path, engine: Any = None) -> dict[str, Any]:
        """Check what a kill has left, make the same call again, compare, and remove the run."""
        import shutil

        import pyarrow.parquet as pq

        finished = {path: path.stat().st_mtime_ns for path in out.glob("captions/*.report.json")}
        for path in out.glob("captions/*.parquet"):
            pq.read_table(path)  # whole, whether its report is written or not
        assert all(path.with_name(path.name.replace("report.json", "parquet")).exists() for path in finished)
        self.call(out, engine=engine)
        again = sum(path.stat().st_mtime_ns != time_ns for path, time_ns in finished.items())
        left = [path.name for path in out.rglob("*") if path.name.endswith(".partial")]
        left += [path.name for path in out.rglob("*.failure.json")]
        same = "identical" if self.rows(out) == self.whole else "DIFFERENT"
        shutil.rmtree(out)
        return {
            "process": process,
            "moment": moment,
            "done": f"{len(finished)} of {SHARDS}",
            "rows": same,
            "redone": again,
            "left over": ", ".join(left),
        }

    def ray(self, moments: list[int]) -> Iterator[dict[str, Any]]:
        """Runs on a cluster of two nodes, of which one is added anew for each; something dies once so many shards are
        done.
        """
        from ray.cluster_utils import Cluster

        from openblip.capfilt.ray import RayEngine
        from openblip.cluster import EngineOptions

        memory = {"object_store_memory": 80 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
        cluster.add_node(num_cpus=4, num_gpus=1, **memory)
        options = EngineOptions(engine="ray", address=cluster.address, gpus_per_worker=0.5)
        try:
            for victim in ("_ModelActor", "_Decoder", "node", "driver"):
                for after in moments:
                    node = cluster.add_node(num_cpus=4, num_gpus=1, **memory)
                    out = self.folder / "killed"
                    child = os.fork() if victim == "driver" else 0
                    if victim == "driver" and child == 0:
                        os.setpgrp()
                        os.execv(sys.executable, ray_command(self.config, cluster.address, out))
                    deed = {
                        "node": lambda node=node: cluster.remove_node(node, allow_graceful=False),
                        "driver": lambda child=child: os.kill(child, signal.SIGKILL),
                    }.get(victim, lambda victim=victim: kill_ray_process(victim))
                    watcher = when_done(out, after, deed)
                    if victim == "driver":
                        watcher.join(PATIENCE)
                        os.waitpid(child, 0)
                    else:
                        self.call(out, engine=RayEngine(options))
                        watcher.join(PATIENCE)
                    if victim != "node":
                        cluster.remove_node(node)
                    kind = {"_ModelActor": "worker", "_Decoder": "decoder"}.get(victim, victim)
                    yield self.finish(f"Ray: {kind}", f"when {after} shards were done", out)
        finally:
            cluster.shutdown()


def ray_command(config: Any, address: str, out: Path) -> list[str]:
    program = "import sys; from openblip.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = ["capfilt", config.source, "--captioner", config.captioner, "--filter", config.filter]
    words += ["--batch-size", str(BATCH), "--num-workers", "1", "--dtype", "float32", "--no-check"]
    return [sys.executable, "-c", program, *words, "--engine", "ray", "--address", address, "--out", str(out)]


def when_done(out: Path, count: int, act: Callable[[], object]) -> Any:
    """A thread that does something once so many shards are done and the manifest is written."""
    import threading

    def wait() -> None:
        while not (out / "manifest.json").exists() or len(list(out.glob("captions/*.report.json"))) < count:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def kill_ray_process(name: str) -> None:
    """SIGKILL the first process of Ray of this name that is not gone yet."""
    for entry in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):
            if (entry / "cmdline").read_bytes().startswith(f"ray::{name}".encode()):
                os.kill(int(entry.name), signal.SIGKILL)
                return


# Kills of the local engine, arranged within the process of the driver.


def local_kills() -> Iterator[Kill]:
    yield Kill("driver", "when the models are loaded", at_load)
    for name in RENAMED:
        yield Kill("driver", f"before the rename of {name}", lambda name=name: at_rename(name, before=True))
        yield Kill("driver", f"after the rename of {name}", lambda name=name: at_rename(name, before=False))
    for name in HALVED:
        yield Kill("driver", f"{name} half written", lambda name=name: at_rename(name, before=True, halved=True))
    for number in BATCHES:
        yield Kill("driver", f"within batch {number}", lambda number=number: at_batch(number))
    for number in (1, 4):
        moment = f"after batch {number} of two processes"
        yield Kill("worker", moment, lambda number=number: at_progress(number, worker=True), "cpu,cpu", True)
        yield Kill("driver", moment, lambda number=number: at_progress(number, worker=False), "cpu,cpu")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def at_load() -> contextlib.AbstractContextManager[None]:
    from openblip.capfilt.process import ShardWorker

    load = ShardWorker.load

    def loaded(*arguments: Any, **named: Any) -> None:
        load(*arguments, **named)
        die()

    return replaced(ShardWorker, "load", loaded)


def at_rename(name: str, *, before: bool, halved: bool = False) -> contextlib.AbstractContextManager[None]:
    rename = os.replace

    def renamed(partial: Path, path: Path) -> None:
        is_it = Path(path).name == name
        if is_it and halved:
            os.truncate(partial, os.path.getsize(partial) // 2)
        if is_it and before:
            die()
        rename(partial, path)
        if is_it:
            die()

    return replaced(os, "replace", renamed)


def at_batch(number: int) -> contextlib.AbstractContextManager[None]:
    from openblip.capfilt.process import ShardWorker

    work, count = ShardWorker._caption_and_filter, iter(range(10**6))

    def counted(self: Any, *arguments: Any) -> Any:
        if next(count) == number:
            die()
        return work(self, *arguments)

    return replaced(ShardWorker, "_caption_and_filter", counted)


def at_progress(number: int, *, worker: bool) -> contextlib.AbstractContextManager[None]:
    """The driver hears of batches from its processes, and kills one of them, or itself."""
    from openblip.capfilt.local import LocalEngine

    work = LocalEngine.work

    def watched(self: Any, shards: Any, on_images: Callable[[int], None]) -> Any:
        count = iter(range(10**6))

        def told(images: int) -> None:
            on_images(images)
            if next(count) == number:
                os.kill(self.processes[0].process.pid if worker else os.getpid(), signal.SIGKILL)

        return work(self, shards, told)

    return replaced(LocalEngine, "work", watched)


if __name__ == "__main__":
    main()
