"""`openblip demo`, `capfilt`, `capfilt-select` and `capfilt-export`: clean pairs, change what is kept, write it out."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from openblip.capfilt.config import CapFiltConfig
from openblip.cli.options import DecodingOptions, DeviceOptions, check_output
from openblip.cluster import EngineOptions
from openblip.data.config import DecodingAhead
from openblip.data.decision import Rule
from openblip.errors import ConfigError
from openblip.files import write_json

Directory = Annotated[
    str, tyro.conf.arg(metavar="DIR", help="the folder of a CapFilt run, or its URL.", help_behavior_hint="")
]
SEED = 777_001  # of the demo: trainings use small seeds, so no training ever sees these scenes
DEMO_CAPTIONER, DEMO_FILTER = "openblip-mini-captioner", "openblip-mini-filter"


def clean_pairs(
    *,
    capfilt: CapFiltConfig,
    out: str,
    decoding: DecodingOptions = DecodingOptions(decoding="nucleus"),  # noqa: B008
    engine: EngineOptions,
    device: str | None = None,
) -> int:
    """Writes a caption for every image, scores it and the web text, and keeps what matches.

    The same command again resumes. Every text and its scores stay in the output; read what is kept as the data source
    capfilt:OUT, or write it out with `openblip capfilt-export`.

    Args:
        capfilt: what is cleaned, and how.
        out: the folder of the output, or a URL of fsspec such as s3://bucket/run.
        engine: who works on the shards.
        device: "cpu", "cuda", "cuda:1" …; the best there is when not given.
    """
    check_output("--out", out, is_folder=True)
    config = replace(capfilt, decoding=decoding.build())
    from openblip.capfilt.local import Engine, LocalEngine, run_capfilt
    from openblip.data.sample import unused_line

    where: Engine = LocalEngine()
    if engine.engine == "ray":
        from openblip.capfilt.ray import RayEngine

        where = RayEngine(engine)
    summary = run_capfilt(config, out, device=device, engine=where)
    for name, counts in summary.scores.sources.items():
        print(f"{name}: kept {counts.kept:,} of {counts.texts:,} texts")
    print(f"report: {summary.report}")
    if summary.repeats:
        print(f"{summary.repeats}; see the report before you train on them", file=sys.stderr)
    if unused := unused_line([summary.unused]):
        print(unused, file=sys.stderr)
    if first := summary.first_reject:
        count = f"{summary.num_rejects:,} reject{'s' if summary.num_rejects > 1 else ''}"
        print(f"{count}, named in {out}/captions/*.rejects.jsonl; the first is {first}", file=sys.stderr)
    if not summary.scores.images:
        print(f"{config.source}: 0 images in it that can be used", file=sys.stderr)
    for shard, error in summary.failed:
        print(f"failed: {shard}: {error}", file=sys.stderr)
    if summary.failed:
        print(f"{len(summary.failed)} shards could not be finished; the same command again tries them", file=sys.stderr)
    return 1 if summary.failed or not summary.scores.images else 0


def select_texts(directory: Directory, /, *, threshold: float | None = None, rule: Rule) -> int:
    """Changes which texts of a CapFilt run are kept; reads the stored scores and runs no model.

    A text is kept when all that is given here holds for it; an empty one never is. Expressions are SQL over the columns
    of the caption files and of `openblip capfilt-score`: "itm > 0.6 and source = 'synthetic' or clip > 0.3". The data
    source capfilt:DIR follows at once. An export has to be written anew.

    Args:
        threshold: the ITM probability must be above this, 0 to 1; the run's own when not given, and none where --where
            or --weight is given in its place.
        rule: what else decides.
    """
    from openblip.capfilt.selection import select

    scores = select(directory, threshold, rule)
    for name, counts in scores.sources.items():
        print(f"{name}: kept {counts.kept:,} of {counts.texts:,} texts")
    return 0


def export_pairs(
    directory: Directory,
    /,
    *,
    out: str,
    format: Literal["tar", "parquet", "huggingface", "uids"] = "tar",
    shard_size: int | None = None,
) -> int:
    """Writes the kept pairs of a CapFilt run, images included, for use by any trainer.

    In tar shards each pair is an image file and a .json with its caption, scores and origin. The same command again,
    after `openblip capfilt-select` or a stop, brings the files up to date.

    Args:
        out: the folder for the files, or a URL of fsspec; empty, or an earlier export of the same run.
        format: tar, shards of webdataset; parquet, a file for each shard; huggingface, a data set that
            datasets.load_dataset reads; uids, lists of kept uids as DataComp uses them, without images.
        shard_size: megabytes of images in a file at most; a shard of the run is one file when not given.
    """
    check_output("--out", out, is_folder=True)
    from openblip.capfilt.export import export

    summary = export(directory, out, format, shard_size=shard_size)
    if format == "uids":
        print(f"wrote the uids of {summary.pairs:,} samples to {out}")
    else:
        print(f"wrote {summary.pairs:,} pairs in {summary.shards:,} shards to {out}")
    for reject in summary.rejects:
        print(f"skipped {reject}", file=sys.stderr)
    return 1 if summary.rejects else 0


def run_demo(
    *,
    out: Path = Path("runs/demo"),
    num_samples: int = 1000,
    num_workers: int = 2,
    page: bool = False,
    device: DeviceOptions,
) -> int:
    """Cleans a small noisy set of emoji scenes with the shipped models; holds the result against the truth.

    Writes OUT/web (the noisy pairs), OUT/capfilt (captions and scores), OUT/report.html and OUT/results.json.
    Needs no network and opens nothing; the same command again goes on where it was stopped.

    Args:
        out: folder of everything that is written.
        num_samples: noisy pairs to make and clean.
        num_workers: processes that draw, threads that decode.
        page: then open the page of `openblip serve` on this run, with its models and an index of its images, until
            Ctrl-C.
    """
    if num_samples < 10:
        raise ConfigError("--num-samples must be at least 10")
    check_output("--out", out, is_folder=True)
    if page:
        from openblip.cli.serve import require_server_packages
        from openblip.search.index import load_lancedb

        require_server_packages()
        load_lancedb()
    from openblip.capfilt.local import run_capfilt
    from openblip.capfilt.report import ReportTable, write_report
    from openblip.emoji_scenes.writer import write_emoji_scenes
    from openblip.evaluation.filtering import measure_capfilt

    started = time.monotonic()
    web, cleaned = out / "web", out / "capfilt"
    write_emoji_scenes(
        web, split="web", num_samples=num_samples, seed=SEED, noise=0.4, num_workers=num_workers, samples_per_shard=250
    )
    config = CapFiltConfig(
        source=str(web), captioner=DEMO_CAPTIONER, filter=DEMO_FILTER, num_workers=num_workers, dtype=device.dtype
    )
    summary = run_capfilt(config, cleaned, device=device.device)
    if summary.failed:
        raise ConfigError(f"{len(summary.failed)} shards could not be finished: {summary.failed[0][1]}")
    measured = measure_capfilt(cleaned)
    of_web, synthetic = measured["web"], measured["synthetic"]

    def percent(value: float | None) -> str:
        return "nothing to count" if value is None else f"{value:.1%}"

    rows = [
        ("Noise before: web texts that are not true", percent(measured["noise_before"])),
        ("Noise after: kept texts, web and synthetic, that are not true", percent(measured["noise_after"])),
        ("Filter AUC on web texts", f"{of_web['auc']:.3f}"),
        ("Filter precision: kept web texts that are true", percent(of_web["precision"])),
        ("Filter recall: true web texts that are kept", percent(of_web["recall"])),
        ("Synthetic captions that are true", percent(synthetic["correct"])),
        ("Synthetic captions that are true, of those kept", percent(synthetic["correct_kept"])),
        ("Texts kept", f"{measured['num_kept']:,} of {measured['num_texts']:,}"),
    ]
    kinds = [(kind.replace("_", " "), f"{auc:.3f}") for kind, auc in of_web["auc_by_kind"].items()]
    truth = ReportTable(("", ""), rows, numbers=(1,))
    by_kind = ReportTable(("Kind of noise", "Filter AUC"), kinds, numbers=(1,))
    write_report(cleaned, extra_tables={"Against the ground truth": [truth, by_kind]})
    (cleaned / "report.html").replace(out / "report.html")
    seconds = round(time.monotonic() - started, 1)
    facts = {"seed": SEED, "captioner": DEMO_CAPTIONER, "filter": DEMO_FILTER, "seconds": seconds}
    write_json(out / "results.json", {**measured, **facts})
    width = max(len(name) for name, _ in rows) + 2
    print(f"\nCapFilt on {measured['num_images']:,} noisy pairs that no training has seen:\n")
    for name, value in rows:
        print(f"  {name:<{width}}{value:>16}")
    print(f"\nreport: {out / 'report.html'}\nnumbers: {out / 'results.json'}\n{seconds:.0f} seconds")
    if page:
        _serve_demo(out, num_workers, device)
    return 0


def _serve_demo(out: Path, num_workers: int, device: DeviceOptions) -> None:
    """Serve the page on the demo's run, at any free port of this machine."""
    import openblip
    from openblip.cli.serve import serve_models
    from openblip.search.index import build_index
    from openblip.serve.cluster import ServedModels, read_keys

    index = out / "index"
    reading = DecodingAhead(num_workers=num_workers)
    model = openblip.load(DEMO_FILTER, device=device.device, dtype=device.dtype)
    print("\nembedding the images for search", file=sys.stderr, flush=True)
    build_index(str(out / "web"), model, index, checkpoint=DEMO_FILTER, reading=reading)
    del model
    served = ServedModels(
        models={name: name for name in (DEMO_CAPTIONER, DEMO_FILTER)}, load=vars(device), index=str(index),
        capfilt=str(out / "capfilt"), keys=read_keys(None),
    )  # fmt: skip
    serve_models(served, host="127.0.0.1", port=0, opens_page=True)
