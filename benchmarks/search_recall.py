"""Above 50,000 vectors an index is searched approximately, and finds at least 95 % of what an exact search finds.

Method: 100,000 images of emoji scenes, and the text of each, are embedded by the shipped filter: `openblip index`.
Recall@10 is the share of the ten nearest by exact search that the approximate search finds: for 1,000 texts as queries
over images, and for 200 images over images and over texts. Two rows with equal similarity count alike, because many
scenes have the same caption. `--folder` keeps scenes and index, and the same command goes on with them.

Retrieval quality: each of the 500 distinct scenes of split test is searched by its own caption, by ITC alone and with
the best 128 re-ranked by ITM. R@1 is the share that come first.

    python -m benchmarks.search_recall [--images 100000] [--folder DIR]
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.command_line import prepared
from benchmarks.harness import Report, alternate, parser, run_child, run_command

MODEL, TOP, RECALL = "openblip-mini-filter", 10, 0.95
CASES = {"texts over images": 1000, "images over images": 200, "images over texts": 200}
EXACT_SHARE = 5  # of so many queries one is searched exactly, too


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=100_000)
    options.add_argument("--scenes", type=int, default=500, help="of split test, for R@1")
    options.add_argument("--rounds", type=int, default=3, help="of indexing one shard and embedding it alone")
    options.add_argument("--folder", type=Path, help="where scenes and index are written, and left")
    options.set_defaults(repeats=1)
    run(options.parse_args())


def run(options: argparse.Namespace) -> None:
    report = Report("search_recall", __doc__, options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        built = index_scenes(folder, "human", options.images)
        report.facts["seconds of `openblip index` (0 images are left to embed where it ran before)"] = built
        found = run_child(search, str(folder), options.images)
        for case, value in found.value.items():
            report.add(f"recall@{TOP}, {case}", value["recall"], unit="", target=RECALL)
            report.timings(case, {"approximate": value["approximate"], "exact": value["exact"]})
        report.add("peak memory of a process that searches", found.peak_bytes / 1e9, unit="GB")
        seconds = run_child(rates, str(folder), options.rounds).value
        num_images = seconds.pop("images")
        report.timings(f"{num_images} images and their texts are indexed", seconds)
        report.ratio("`openblip index`, beside its model alone", seconds["model alone"], seconds["index"])
        report.add("images indexed per second", num_images / statistics.median(seconds["index"]), unit="1/s")
        index_scenes(folder, "test", options.scenes)
        for name, value in run_child(first_ranks, str(folder)).value.items():
            report.add(f"R@1 over {options.scenes} scenes, {name}", value, unit="")
    report.save()


def index_scenes(folder: Path, split: str, count: int) -> float:
    """Render and index scenes; the seconds that indexing took."""
    openblip = ["python", "-m", "openblip"]
    scenes = str(folder / f"{split}-{count}")
    run_command([*openblip, "data", "emoji-scenes", scenes, "--split", split, "--num-samples", str(count)])
    out = str(folder / f"{split}-index")
    return run_command([*openblip, "index", scenes, "--model", MODEL, "--out", out, "--batch-size", "64"]).seconds


def search(folder: str, count: int) -> dict[str, Any]:
    from openblip.data.sources import open_source
    from openblip.search.index import ImageIndex

    index = ImageIndex(Path(folder) / "human-index")
    source = open_source(f"{folder}/human-{count}")
    samples: list[Any] = []
    for shard in source.shards():
        items = (located.item for located in source.read(shard))
        samples += itertools.islice(items, -(-CASES["texts over images"] // len(source.shards())))
    answers: dict[str, Any] = {}
    for case, queries in CASES.items():
        asked = samples[:: max(1, len(samples) // queries)][:queries]
        seconds: dict[str, list[float]] = {"approximate": [], "exact": []}
        recalls = []
        for number, sample in enumerate(asked):
            query: dict[str, Any] = (
                {"image": sample.image} if case.startswith("images") else {"text": sample.captions[0]}
            )
            query |= {"find": "texts" if case.endswith("texts") else "images", "top": TOP}
            started = time.perf_counter()
            near = index.search(**query)
            seconds["approximate"].append(time.perf_counter() - started)
            if number % EXACT_SHARE and queries > len(samples) // EXACT_SHARE:
                continue
            started = time.perf_counter()
            exact = index.search(**query, exact=True)
            seconds["exact"].append(time.perf_counter() - started)
            worst = exact[-1].similarity - 1e-6
            recalls.append(sum(hit.similarity >= worst for hit in near) / len(exact))
        answers[case] = {**seconds, "recall": statistics.mean(recalls)}
    return answers


def rates(folder: str, rounds: int) -> dict[str, Any]:
    """Seconds of `build_index` for a shard, and of the model alone, which is given prepared images."""
    import openblip
    from openblip.data.config import DecodingAhead
    from openblip.data.sources import open_source
    from openblip.search.index import build_index

    model = openblip.load(MODEL)
    hashed = model.fingerprint()
    vars(model)["fingerprint"] = lambda: hashed
    shard = next(path for path in sorted(Path(folder).glob("human-*/*.tar")))
    source = open_source(str(shard))
    captions = [item.captions[0] for name in source.shards() for _, item in source.read(name)]
    pixels = prepared(model, shard)

    def index() -> None:
        with tempfile.TemporaryDirectory() as out:
            done = build_index(str(shard), model, out, checkpoint=MODEL, reading=DecodingAhead(), batch_size=64)
        assert done.added == len(pixels)

    def alone() -> None:
        model.embed_images(pixels, 64)
        model.embed_texts(captions, 64)

    return {"images": len(pixels), **alternate({"model alone": alone, "index": index}, rounds)}


def first_ranks(folder: str) -> dict[str, float]:
    from openblip.data.sources import open_source
    from openblip.search.index import ImageIndex

    index = ImageIndex(Path(folder) / "test-index")
    source = open_source(json.loads((Path(folder) / "test-index/index.json").read_text())["source"])
    samples: list[Any] = [item for shard in source.shards() for _, item in source.read(shard, images=False)]
    ranks: dict[str, list[bool]] = {"ITC alone": [], "the best 128 re-ranked": []}
    for sample in samples:
        for name, rerank in (("ITC alone", 0), ("the best 128 re-ranked", 128)):
            hit = index.search(sample.captions[0], top=1, rerank=rerank)[0]
            ranks[name].append((hit.shard, hit.key) == (sample.shard, sample.key))
    return {name: statistics.mean(hits) for name, hits in ranks.items()}


if __name__ == "__main__":
    main()
