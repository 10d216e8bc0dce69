"""CapFilt on a Ray cluster beside the local engine, row by row.

The same web pairs of emoji scenes are cleaned by both, on the cluster with another batch size and by three workers on
two nodes of this machine, one of which is killed meanwhile. In float32 texts and decisions are to be the same, and
scores within 1e-5.
"""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, parser
from benchmarks.kill_matrix import kill_ray_process, when_done


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--num-samples", type=int, default=1000)
    report = Report("ray_rows", __doc__, options.parse_args())
    with tempfile.TemporaryDirectory() as name:
        rows = run(Path(name), report.options.num_samples)
    local, on_ray = rows["local"], rows["ray"]
    assert len(local) == len(on_ray), f"{len(local)} rows of the local engine, {len(on_ray)} of Ray"
    names = ("key", "shard", "index", "source", "caption")
    pairs = list(zip(local, on_ray, strict=True))
    report.add(
        "share of rows with the same key and text",
        share(all(a[n] == b[n] for n in names) for a, b in pairs),
        target=1.0,
    )
    report.add(
        "share of rows kept alike at 0.5", share((a["itm"] > 0.5) == (b["itm"] > 0.5) for a, b in pairs), target=1.0
    )
    for score in ("itm", "itc", "logprob"):
        difference = max(abs((a[score] or 0.0) - (b[score] or 0.0)) for a, b in pairs)
        report.facts[f"largest difference of {score}"] = difference
        print(f"largest difference of {score}: {difference:.1e}")
    report.facts["rows"] = len(local)
    print(f"{len(local):,} rows")
    report.save()


def share(found: Any) -> float:
    values = list(found)
    return sum(values) / len(values)


def run(folder: Path, num_samples: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of both engines."""
    from ray.cluster_utils import Cluster

    from openblip.capfilt.config import CapFiltConfig
    from openblip.capfilt.local import run_capfilt
    from openblip.capfilt.ray import RayEngine
    from openblip.cluster import EngineOptions
    from openblip.data.captions import finished_shards, read_captions
    from openblip.emoji_scenes.writer import write_emoji_scenes

    write_emoji_scenes(
        folder / "web", split="web", num_samples=num_samples, seed=5, noise=0.4, num_workers=2, samples_per_shard=50
    )
    config = CapFiltConfig(
        source=str(folder / "web"), captioner="openblip-mini-captioner", filter="openblip-mini-filter",
        dtype="float32", num_workers=1, batch_size=64, no_check=True,
    )  # fmt: skip
    run_capfilt(config, folder / "local", device="cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    memory = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    for _ in range(2):
        cluster.add_node(num_cpus=4, num_gpus=1, **memory)
    engine = RayEngine(EngineOptions(engine="ray", address=cluster.address, gpus_per_worker=0.5, max_workers=3))
    try:
        when_done(folder / "ray", 4, lambda: kill_ray_process("_ModelActor"))
        run_capfilt(replace(config, batch_size=24), folder / "ray", engine=engine)
    finally:
        cluster.shutdown()
    return {
        name: [
            row for shard in finished_shards(folder / name) for row in read_captions(folder / name, shard).to_pylist()
        ]
        for name in ("local", "ray")
    }


if __name__ == "__main__":
    main()
