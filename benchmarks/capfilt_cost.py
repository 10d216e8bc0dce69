"""Estimates of CapFilt hold: the formula of `openblip estimate` against a simulation, and both against real runs.

    python -m benchmarks.capfilt_cost simulation | rate | workers

Each part says its claim and method. docs/cost.md has the results.
"""

import io
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, parser

SHARDS, PAIRS_PER_SHARD, WORKERS, SECONDS_BETWEEN_FAILURES = 48, 100, 2, 6.0


def main() -> None:
    parts = {"simulation": compare_simulation, "rate": compare_rate, "workers": compare_workers}
    options_parser = parser(__doc__)
    options_parser.add_argument("part", choices=parts)
    options_parser.add_argument("--pairs", type=int, default=32, help="of part rate")
    options_parser.add_argument("--seed", type=int, default=0, help="of the failures")
    options = options_parser.parse_args()
    report = Report(f"capfilt-cost-{options.part}", parts[options.part].__doc__, options)
    parts[options.part](report)
    report.save()


def compare_simulation(report: Report) -> None:
    """Over 14M to 5B pairs on 1 to 512 machines of one GPU, which are taken away every ten hours, with a storage of 4
    GB/s, the formula is within 5 % of a simulated run, where every machine has at least four shards.
    """
    from openblip.cost.formula import CapFiltWork, Cluster, estimate_capfilt
    from openblip.cost.machines import load_machine
    from openblip.cost.simulation import simulate_capfilt
    from openblip.models.config import BlipConfig
    from openblip.nn.config import VisionConfig

    machine = replace(load_machine("h100x8"), accelerators=1, cores=12, hours_between_failures=10.0)
    config, ratios = BlipConfig(vision=VisionConfig(image_size=384)), []
    print("\n| pairs | machines | slowest | formula, hours | simulation | failures |\n|---|---|---|---|---|---|")
    for pairs in (14_000_000, 129_000_000, 1_000_000_000, 5_000_000_000):
        for count in (1, 8, 64, 512):
            work, cluster = (
                CapFiltWork(pairs=pairs, model=config),
                Cluster(machine=machine, num_machines=count, storage_bytes=4e9),
            )
            if work.num_shards < 4 * count:
                continue
            found, drawn = estimate_capfilt(work, cluster), simulate_capfilt(work, cluster, seed=report.options.seed)
            ratios.append(found.hours / drawn.hours)
            cells = [f"{pairs / 1e6:,.0f}M", count, found.bottleneck, f"{found.hours:.2f}", f"{drawn.hours:.2f}"]
            print("|", " | ".join(map(str, [*cells, drawn.num_failures])), "|")
    report.add("formula / simulation", statistics.median(ratios), min(ratios), max(ratios), target=1.05, at_most=True)
    report.facts["simulated_runs"] = len(ratios)


def compare_rate(report: Report) -> None:
    """A real CapFilt run takes at most 15 % longer than the measured speeds of the machine predict.

    This machine is measured as `--measure` does it. Then CapFilt runs in the same process over a tar shard of 640 x 480
    JPEG files with BLIP-base at 384 pixels and random weights, whose captions have full length.
    """
    import pyarrow.parquet as pq

    from benchmarks import blip_base
    from openblip.capfilt.config import CapFiltConfig
    from openblip.capfilt.local import run_capfilt
    from openblip.checkpoints.loading import load_checkpoint
    from openblip.cost.formula import CapFiltWork, PairsOptions, working_seconds
    from openblip.cost.measure import BASE, measure_machine
    from openblip.files import read_json
    from openblip.generation.decoding import Nucleus

    pairs, tokens = report.options.pairs, blip_base.NUM_TOKENS
    machine = measure_machine(device="cpu")
    captioner, filter_ = blip_base.captioner_folder(), blip_base.filter_folder()
    with tempfile.TemporaryDirectory() as folder:
        shard, out = Path(folder) / "0000.tar", Path(folder) / "out"
        num_bytes = write_shard(shard, pairs)
        config = CapFiltConfig(
            source=str(shard), captioner=str(captioner), filter=str(filter_), batch_size=8, num_workers=machine.cores,
            decoding=Nucleus(max_new_tokens=tokens, min_new_tokens=tokens),
        )  # fmt: skip
        run_capfilt(config, out, device="cpu")
        seconds = read_json(out / "captions" / "0000.report.json")["seconds"]
        rows = pq.read_table(out / "captions" / "0000.parquet").to_pylist()
        size = (out / "captions" / "0000.parquet").stat().st_size
    tokenizer = load_checkpoint(filter_).tokenizer

    def length(source: str) -> int:
        texts = [row["caption"] for row in rows if row["source"] == source]
        return round(int(tokenizer.encode(texts, max_length=512).mask.sum()) / len(texts))

    # A synthetic text has other tokens when it is read than when random weights write it.
    data = PairsOptions(
        image_bytes=num_bytes // pairs, megapixels=0.307, text_tokens=length("web") + length("synthetic") - tokens
    )
    work = CapFiltWork(pairs=pairs, model=BASE, data=data, caption_tokens=tokens)
    predicted = pairs * working_seconds(work.pair_seconds(machine), machine)
    report.facts["rate"] = {"predicted_seconds": predicted, "seconds": seconds, "bytes_per_row": size / len(rows)}
    report.facts["machine"] = vars(machine)
    print(f"\n{pairs} pairs: {predicted:.2f} s predicted, {seconds}; {work.pair_seconds(machine)}; {machine}")
    report.add("CapFilt, real seconds / predicted", seconds["total"] / predicted, target=1.15, at_most=True)


def write_shard(path: Path, count: int) -> int:
    """Pairs as img2dataset writes them; the bytes of all images."""
    from benchmarks import blip_base

    total = 0
    with tarfile.open(path, "w") as tar:
        for number, (image, text) in enumerate(zip(blip_base.images(count), blip_base.texts(count), strict=True)):
            file = io.BytesIO()
            image.save(file, "JPEG", quality=85)
            total += file.tell()
            for suffix, content in (("jpg", file.getvalue()), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return total


# Real workers, which are killed.


def work_on_shards(source: str, out: str) -> None:
    """A worker process: names of shards come on standard input, and a line is written when one is done."""
    from openblip.capfilt.config import CapFiltConfig
    from openblip.capfilt.folder import build_manifest
    from openblip.capfilt.process import ShardWorker
    from openblip.files import write_json

    config = CapFiltConfig(
        source=source,
        captioner="openblip-mini-captioner",
        filter="openblip-mini-filter",
        num_workers=1,
        dtype="float32",
    )
    worker = ShardWorker.load(config, out)
    if not worker.folder.manifest.exists():
        write_json(worker.folder.manifest, build_manifest(*worker.facts[:2], SHARDS))
    print("ready", flush=True)
    for line in sys.stdin:
        worker.work(line.strip())
        print("done", flush=True)


class RealRun:
    """Workers that take shards from one queue; `mean_life` is the mean time in seconds until one is killed."""

    def __init__(self, source: Path, out: Path, shards: list[str], mean_life: float | None, seed: int) -> None:
        self.source, self.out, self.queue = source, out, deque(shards)
        self.mean_life, self.draw, self.lock = mean_life, random.Random(seed), threading.Lock()
        self.left, self.kills = len(shards), 0
        self.starts: list[float] = []
        self.shard_times: list[float] = []

    def run(self) -> float:
        """The seconds until all shards are done."""
        started = time.perf_counter()
        threads = [threading.Thread(target=self._keep_working) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - started

    def _keep_working(self) -> None:
        """One worker after the other in the same place."""
        while self.left:
            began = time.perf_counter()
            command = [sys.executable, "-m", "benchmarks.capfilt_cost", "--worker", str(self.source), str(self.out)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdout.readline()
            self.starts.append(time.perf_counter() - began)
            killer = None
            if self.mean_life is not None:
                with self.lock:
                    life = self.draw.expovariate(1 / self.mean_life)
                killer = threading.Timer(life, process.kill)
                killer.start()
            while self.left:
                with self.lock:
                    shard = self.queue.popleft() if self.queue else None
                if shard is None:  # another worker may yet be killed
                    if process.poll() is not None:
                        self.kills += 1
                        break
                    time.sleep(0.01)
                    continue
                began = time.perf_counter()
                try:
                    print(shard, file=process.stdin, flush=True)
                    is_done = process.stdout.readline() == "done\n"
                except BrokenPipeError:
                    is_done = False
                with self.lock:
                    if is_done:
                        self.left -= 1
                        self.shard_times.append(time.perf_counter() - began)
                    else:
                        self.queue.appendleft(shard)
                        self.kills += 1
                if not is_done:
                    break
            if killer is not None:
                killer.cancel()
            process.kill()
            process.wait()


def compare_workers(report: Report) -> None:
    """Real workers that share a queue of shards, and are killed at random moments, take as long as the simulation says.

    Two processes of one thread run CapFilt with the shipped models over emoji scenes, first without failures, which
    gives the time of a shard and of a start, and then with kills, after which a new process takes the place. With few
    kills in a run its time varies by a fifth, as that of simulated runs does.
    """
    from openblip.cost.formula import HOUR, shards_seconds
    from openblip.cost.simulation import simulate_shards
    from openblip.emoji_scenes.writer import write_emoji_scenes

    with tempfile.TemporaryDirectory() as folder:
        drawn, source = Path(folder) / "drawn", Path(folder) / "source"
        write_emoji_scenes(
            drawn, split="web", num_samples=PAIRS_PER_SHARD, samples_per_shard=PAIRS_PER_SHARD, progress=False
        )
        source.mkdir()
        for number in range(SHARDS):
            (source / f"{number:04d}.tar").hardlink_to(next(iter(drawn.glob("*.tar"))))
        shards = [f"{number:04d}" for number in range(SHARDS)]
        whole = RealRun(source, Path(folder) / "whole", shards, None, 0)
        whole_seconds = whole.run()
        failing = RealRun(source, Path(folder) / "failing", shards, SECONDS_BETWEEN_FAILURES, report.options.seed)
        failing_seconds = failing.run()
        outputs = [len(list((Path(folder) / name / "captions").glob("*.report.json"))) for name in ("whole", "failing")]
    assert outputs == [SHARDS, SHARDS], outputs
    shard, start = statistics.mean(whole.shard_times), statistics.mean(whole.starts + failing.starts)
    spread = statistics.stdev(whole.shard_times) / shard
    settings: dict[str, Any] = {
        "shard_seconds": shard, "shard_bytes": 1.0, "network_bytes": 1e9, "storage_bytes": 1e9, "start_seconds": start
    }  # fmt: skip
    for name, seconds, hours, kills in (
        ("without failures", whole_seconds, 1e6, 0),
        ("with kills", failing_seconds, SECONDS_BETWEEN_FAILURES / HOUR, failing.kills),
    ):
        formula = shards_seconds(
            SHARDS, WORKERS, shard_seconds=shard, start_seconds=start, hours_between_failures=hours
        )
        runs = sorted(
            HOUR
            * simulate_shards(SHARDS, WORKERS, **settings, hours_between_failures=hours, seed=seed, spread=spread).hours
            for seed in range(200)
        )
        report.facts[name] = {
            "seconds": seconds, "formula": formula, "simulated_mean": statistics.mean(runs),
            "simulated_5_to_95": [runs[10], runs[189]], "shard_seconds": shard, "start_seconds": start,
            "kills": kills,
        }  # fmt: skip
        print(f"\n{name}: {report.facts[name]}")
        report.add(f"two workers {name}, real / simulated mean", seconds / statistics.mean(runs), note=f"{kills} kills")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work_on_shards(*sys.argv[2:])
    else:
        main()
