"""The report page of a CapFilt run of 10 million texts takes at most a minute, 1 GB and 10 MB.

Method: runs of random texts and scores are written to a folder, with a shard for every 5,000 images, a score that came
later, and shards of 1,000 images to draw the gallery from. The page is made by a process of its own, whose largest
resident memory, libraries included, is what the system says at its end. A run of a tenth of the size is beside it: what
is beyond its time is reading the scores, which every text has; page and memory stay.

    python -m benchmarks.report_time [--texts 10000000] [--folder DIR]
"""

import argparse
import io
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.harness import Report, parser, run_child

IMAGES_PER_SHARD, IMAGES_IN_TAR = 5000, 1000
WORDS = [
    f"{size} {thing}" for size in ("", "small", "red") for thing in ("dog", "cat", "stock photo", "house", "on grass")
]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--texts", type=int, default=10_000_000)
    options.add_argument(
        "--folder", type=Path, help="where the runs are written, and left; a temporary folder if not given"
    )
    options.set_defaults(repeats=1)
    run(options.parse_args())


def run(options: argparse.Namespace) -> None:
    report = Report("report_time", __doc__, options)
    with tempfile.TemporaryDirectory() as temporary:
        for share in (0.1, 1.0):
            num_texts = int(options.texts * share)
            folder = (options.folder or Path(temporary)) / f"{num_texts}"
            if not (folder / "run" / "manifest.json").is_file():
                write_run(folder, num_texts)
            child = run_child(make_page, str(folder / "run"))
            name, is_whole = f"{num_texts:,} texts", share == 1
            for what, value, unit, target in (
                ("time", child.value["seconds"], "s", 60 if is_whole else None),
                ("processor time, imports included", child.cpu_seconds, "s", 60 if is_whole else None),
                ("peak memory", child.peak_bytes / 1e9, "GB", 1 if is_whole else None),
                ("page", child.value["bytes"] / 1e6, "MB", 10),
            ):
                report.add(f"{what}, {name}", value, unit=unit, target=target, at_most=True)
    report.save()


def make_page(folder: str) -> dict[str, float]:
    """What a process that makes the page tells of it."""
    import time

    from openblip.capfilt.report import write_report

    started = time.perf_counter()
    scores = write_report(folder)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "texts": scores.texts, "bytes": (Path(folder) / "report.html").stat().st_size}


def write_run(folder: Path, num_texts: int) -> None:
    """A finished run with a web and a synthetic text for each image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from openblip.data.captions import CAPTION_SCHEMA, write_score
    from openblip.files import write_json

    num_shards = num_texts // (2 * IMAGES_PER_SHARD)
    (folder / "run" / "captions").mkdir(parents=True)
    write_images(folder / "web", num_shards)
    words = np.array([f"{word} " for word in WORDS], object)
    keys = np.repeat([f"{number:09d}" for number in range(IMAGES_PER_SHARD)], 2)
    for number in range(num_shards):
        rng, shard = np.random.default_rng(number), f"{number:05d}"
        captions = words[rng.zipf(1.3, (len(keys), 8)) % len(words)].sum(axis=1)
        synthetic = np.arange(len(keys)) % 2
        itm = rng.beta(0.4, 0.4, len(keys)).astype(np.float32)
        itc, logprob = itm - 0.5 + rng.normal(0, 0.1, len(keys)), rng.normal(-9, 3, len(keys))
        columns = [
            keys, [shard] * len(keys), np.zeros(len(keys), np.int32), np.where(synthetic, "synthetic", "web"), captions,
            itm, np.float32(itc), np.float32(logprob),
        ]  # fmt: skip
        arrays = [pa.array(column, field.type) for column, field in zip(columns, CAPTION_SCHEMA, strict=True)]
        arrays[-1] = pa.array(columns[-1], pa.float32(), mask=synthetic == 0)
        table = pa.Table.from_arrays(arrays, schema=CAPTION_SCHEMA)
        pq.write_table(table, folder / "run" / "captions" / f"{shard}.parquet", compression="zstd")
        write_score(folder / "run", shard, "clip", pa.array(np.float32(itm / 2 + rng.normal(0, 0.1, len(keys)))))
        write_json(folder / "run" / "scores" / "clip" / f"{shard}.report.json", {"rows": len(keys)})
        reasons = [f"{shard}/{key}: image of {key}x9 pixels is too large" for key in keys[:20]]
        report = {
            "shard": shard, "counts": {"images": IMAGES_PER_SHARD},
            "seconds": {"read": 1.0, "caption": 20.0, "filter": 15.0, "total": 37.0},
            "rejects": [{"key": str(key), "reason": reason} for key, reason in zip(keys[:20], reasons, strict=True)],
        }  # fmt: skip
        (folder / "run" / "captions" / f"{shard}.report.json").write_text(json.dumps(report))
    model = {"checkpoint": "none", "parameters": 1, "dtype": "float32", "sha256": "0" * 64}
    manifest = {
        "openblip": "0", "source": str((folder / "web").resolve()), "threshold": 0.5, "num_shards": num_shards,
        "models": {"captioner": model, "filter": model}, "config": {"seed": 0},
    }  # fmt: skip
    write_json(folder / "run" / "manifest.json", manifest)


def write_images(folder: Path, num_shards: int) -> None:
    """Shards of equal content: links to one tar file, whose images are of noise."""
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for number in range(IMAGES_IN_TAR):
            encoded = io.BytesIO()
            noise = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(encoded, "JPEG")
            for name, payload in ((f"{number:09d}.jpg", encoded.getvalue()), (f"{number:09d}.txt", b"a dog")):
                member = tarfile.TarInfo(name)
                member.size = len(payload)
                archive.addfile(member, io.BytesIO(payload))
    for number in range(1, num_shards):
        (folder / f"{number:05d}.tar").hardlink_to(folder / "00000.tar")


if __name__ == "__main__":
    main()
