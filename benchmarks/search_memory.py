"""An index of 10 million images takes at most 4 GB of memory, to build and to search, at a recall@10 of 0.95.

Method: vectors of 256 numbers stand in clusters: around each of 20,000 random directions, with noise of 0.6 of their
length. They are written into the tables of an index as `openblip index` writes them, and its approximate index is made
by the same function, in a process of its own. Another process searches by `ImageIndex`, with vectors of the same
clusters as queries. Peak memory is what the system says at the end of each process. Recall@10 is the share of the ten
nearest by exact search that the approximate search finds.

    python -m benchmarks.search_memory [--vectors 10000000] [--folder DIR]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, parser, run_child

WIDTH, CLUSTERS, NOISE = 256, 20_000, 0.6
ROWS_AT_ONCE = 50_000
PEAK_GB, RECALL = 4.0, 0.95


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--vectors", type=int, default=10_000_000)
    options.add_argument("--queries", type=int, default=200)
    options.add_argument("--exact-queries", type=int, default=20, help="of these, searched exactly too")
    options.add_argument("--folder", type=Path, help="where the index is written, and left; temporary if not given")
    options.set_defaults(repeats=1)
    run(options.parse_args())


def run(options: argparse.Namespace) -> None:
    report = Report("search_memory", __doc__, options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / f"{options.vectors}"
        if not (folder / "built").exists():
            built = run_child(build, str(folder), options.vectors)
            limit = {"unit": "GB", "target": PEAK_GB, "at_most": True}
            report.add(f"peak memory, {options.vectors:,} vectors are indexed", built.peak_bytes / 1e9, **limit)
            report.add("seconds to write them", built.value["write"], unit="s")
            report.add("seconds to make the approximate index", built.value["index"], unit="s")
            report.add("CPU seconds of it", built.value["index_cpu"], unit="s")
            (folder / "built").touch()
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        report.add("size on disk", size / 1e9, unit="GB")
        found = run_child(search, str(folder), options.vectors, options.queries, options.exact_queries)
        limit = {"unit": "GB", "target": PEAK_GB, "at_most": True}
        report.add("peak memory of a process that searches", found.peak_bytes / 1e9, **limit)
        report.add("recall@10", found.value["recall"], unit="", target=RECALL)
        report.timings("a search", {"approximate": found.value["approximate"], "exact": found.value["exact"]})
    report.save()


def build(folder: str, count: int) -> dict[str, float]:
    from openblip.search.index import make_tables, optimize

    started = time.perf_counter()
    images, _ = make_tables(Path(folder), WIDTH)
    for start in range(0, count, 20 * ROWS_AT_ONCE):
        images.add(rows(images.schema, start, min(count, start + 20 * ROWS_AT_ONCE)))
    written, cpu_started = time.perf_counter(), time.process_time()
    optimize(images)
    ended = time.perf_counter()
    return {"write": written - started, "index": ended - written, "index_cpu": time.process_time() - cpu_started}


def rows(schema: Any, start: int, stop: int) -> Any:
    """A stream of rows of the table of images."""
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        for first in range(start, stop, ROWS_AT_ONCE):
            numbers = range(first, min(stop, first + ROWS_AT_ONCE))
            vectors = clustered(len(numbers), seed=first + 1)
            shards, keys = [f"{n // 1000:05}" for n in numbers], [f"{n:09}" for n in numbers]
            columns = {
                "id": [f"{shard}/{key}" for shard, key in zip(shards, keys, strict=True)],
                "shard": shards,
                "key": keys,
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), WIDTH),
            }
            absent = {field.name: pa.nulls(len(numbers), field.type) for field in schema}
            yield from pa.table({**absent, **columns}, schema=schema).to_batches()

    return pa.RecordBatchReader.from_batches(schema, batches())


def clustered(count: int, seed: int) -> Any:
    """Unit vectors, float32 (count, WIDTH)."""
    import numpy as np

    centres = np.random.default_rng(0).standard_normal((CLUSTERS, WIDTH), dtype=np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((count, WIDTH), dtype=np.float32) * (NOISE / WIDTH**0.5)
    vectors = centres[rng.integers(0, CLUSTERS, count)] + noise
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def search(folder: str, count: int, num_queries: int, num_exact: int) -> dict[str, Any]:
    from openblip.files import write_json
    from openblip.search.index import ImageIndex

    model: Any = QueryModel(num_queries)
    write_json(Path(folder) / "index.json", {"model": model.fingerprint()})
    index = ImageIndex(folder, model)
    assert len(index) == count
    seconds: dict[str, list[float]] = {"approximate": [], "exact": []}
    found: dict[str, list[set[str]]] = {"approximate": [], "exact": []}
    for side, queries in (("approximate", num_queries), ("exact", num_exact)):
        for number in range(queries):
            started = time.perf_counter()
            hits = index.search(str(number), top=10, exact=side == "exact")
            seconds[side].append(time.perf_counter() - started)
            found[side].append({hit.key for hit in hits})
    pairs = zip(found["approximate"], found["exact"], strict=False)
    return {**seconds, "recall": statistics.mean(len(near & exact) / 10 for near, exact in pairs)}


class QueryModel:
    """In place of a model: the embedding of the text "7" is the seventh of some vectors."""

    tasks = frozenset({"embed_texts", "embed_images"})

    def __init__(self, count: int) -> None:
        self.vectors = clustered(count, seed=10**9)

    def fingerprint(self) -> str:
        return "vectors"

    def embed_texts(self, texts: list[str], *rest: Any) -> Any:
        import torch

        return torch.from_numpy(self.vectors[[int(text) for text in texts]])


if __name__ == "__main__":
    main()
