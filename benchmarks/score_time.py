"""Scores across shards of a CapFilt run: how many texts a second, in how much memory, and how many copies are found.

Method: runs of random texts are written to a folder, with a shard for every 5,000 images, two texts for each image, the
perceptual hash of each image as a column, and embeddings. A tenth of the texts and of the images are nearly equal to
one of another shard: a text with a word more, a hash with three other bits. Each command is a process of its own, whose
largest resident memory, libraries included, is what the system says at its end. A run of a tenth of the size is beside
it: the memory of a larger run must not be larger by its size. That the copies are in the groups of their originals is
counted.

    python -m benchmarks.score_time [--texts 1000000] [--folder DIR]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import Report, parser, run_child

IMAGES_PER_SHARD = 5000
WIDTH = 64  # of the embeddings
COMMANDS = {
    "MinHash of texts": "text_minhash",
    "groups of equal texts": "exact_text_group",
    "groups of nearly equal texts": "text_group,text_repeat",
    "groups of nearly equal images": "image_group,image_repeat",
    "neighbours": "lemon",
}
MEMORY = 6.0  # GB; what duckdb may take before it works on disk is 4 of them


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--texts", type=int, default=1_000_000)
    options.add_argument("--folder", type=Path, help="where runs are written, and left; temporary if not given")
    options.set_defaults(repeats=1)
    run(options.parse_args())


def run(options: argparse.Namespace) -> None:
    report = Report("score_time", __doc__, options)
    with tempfile.TemporaryDirectory() as temporary:
        for num_texts in (options.texts // 10, options.texts):
            folder = (options.folder or Path(temporary)) / f"{num_texts}"
            if not (folder / "manifest.json").is_file():
                write_run(folder, num_texts)
            for label, names in COMMANDS.items():
                child = run_child(compute, str(folder), names)
                name = f"{label}, {num_texts:,} texts"
                report.add(name, num_texts / child.value, unit="texts/s")
                report.add(f"peak memory, {name}", child.peak_bytes / 1e9, unit="GB", target=MEMORY, at_most=True)
            for column, share in copies_found(folder).items():
                report.add(f"copies found by {column}, {num_texts:,} texts", share, target=0.95)
    report.save()


def compute(folder: str, names: str) -> float:
    """The seconds that a command takes."""
    from openblip.capfilt.config import ScoreConfig
    from openblip.capfilt.scores import score_run

    started = time.perf_counter()
    summary = score_run(folder, ScoreConfig(scores=(names,)), device="cpu")
    assert not summary.failed
    return time.perf_counter() - started


def copies_found(folder: Path) -> dict[str, float]:
    """Of the copies, the share that is in the group of its original."""
    import pyarrow as pa

    from openblip.data.captions import finished_shards, read_texts

    shards = finished_shards(folder)
    table = pa.concat_tables([read_texts(folder, shard, ["text_group", "image_group"]) for shard in shards])
    originals = json.loads((folder / "copies.json").read_text())
    found = {}
    for column, rows in originals.items():
        group = table[column].to_numpy()
        found[column] = float(np.mean([group[copy] == group[original] for copy, original in rows]))
    return found


def write_run(folder: Path, num_texts: int) -> None:
    """A run of which no model is ever loaded; which row is a copy of which stands in copies.json."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from openblip.data.captions import CAPTION_SCHEMA, embedding_file, embedding_writer, score_file, write_score
    from openblip.files import write_json

    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdefghijklmnoprstuvw"), rng.integers(2, 9))) for _ in range(4000)])
    copies: dict[str, list[tuple[int, int]]] = {"text_group": [], "image_group": []}
    texts: list[str] = []  # of the first shard, which the others copy
    hashes = np.zeros(0, np.uint64)
    num_shards = -(-num_texts // (2 * IMAGES_PER_SHARD))
    for number in range(num_shards):
        shard, first = f"{number:05d}", 2 * IMAGES_PER_SHARD * number
        lengths = rng.integers(9, 15, 2 * IMAGES_PER_SHARD)
        of_shard = [" ".join(part) for part in np.split(rng.choice(words, lengths.sum()), lengths.cumsum()[:-1])]
        of_images = rng.integers(0, 2**63, IMAGES_PER_SHARD, dtype=np.uint64)
        if number == 0:
            texts, hashes = of_shard, of_images
        else:
            for row in range(0, 2 * IMAGES_PER_SHARD, 10):
                original = int(rng.integers(len(texts)))
                of_shard[row] = f"{texts[original]} {rng.choice(words)[:3]}"
                copies["text_group"].append((first + row, original))
            for image in range(0, IMAGES_PER_SHARD, 10):
                original = int(rng.integers(len(hashes)))
                flipped = sum(1 << int(bit) for bit in rng.choice(64, 3, replace=False))
                of_images[image] = hashes[original] ^ np.uint64(flipped)
                copies["image_group"].append((first + 2 * image, 2 * original))
        keys = np.repeat([f"{image:06d}" for image in range(IMAGES_PER_SHARD)], 2)
        sources = np.tile(["web", "synthetic"], IMAGES_PER_SHARD)
        itm, itc = rng.random((2, len(keys)), np.float32)
        columns = [keys, [shard] * len(keys), np.zeros(len(keys), np.int32), sources, of_shard, itm, itc, itm]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, CAPTION_SCHEMA, strict=True)]
        path = folder / "captions" / f"{shard}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_arrays(arrays, schema=CAPTION_SCHEMA), path, compression="zstd")
        vectors = rng.normal(size=(IMAGES_PER_SHARD, 3, WIDTH)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
        of_rows = np.repeat([f"{image:06d}" for image in range(IMAGES_PER_SHARD)], 3)
        kinds = np.tile(["image", "web", "synthetic"], IMAGES_PER_SHARD)
        with embedding_writer(embedding_file(folder, shard), WIDTH) as write:
            write(of_rows, kinds, np.zeros(len(of_rows), np.int32), vectors.reshape(-1, WIDTH))
        write_json(folder / "captions" / f"{shard}.report.json", {"counts": {"images": IMAGES_PER_SHARD}})
        write_score(folder, shard, "image_hash", pa.array(np.repeat([f"{h:016x}" for h in of_images.tolist()], 2)))
        settings = {"settings": {"score": "image_hash"}}
        write_json(score_file(folder, "image_hash", shard, "report.json"), settings)
    write_json(folder / "copies.json", copies)
    models = {role: {"checkpoint": "none", "sha256": "none"} for role in ("captioner", "filter")}
    write_json(folder / "manifest.json", {"source": "none", "threshold": 0.5, "models": models, "config": {}})


if __name__ == "__main__":
    main()
