"""`openblip capfilt`, `capfilt-select` and `capfilt-export`: clean pairs, change what is kept, write it out."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from openblip.capfilt.config import CapFiltConfig
from openblip.cli.options import DecodingOptions

Directory = Annotated[
    Path, tyro.conf.arg(metavar="DIR", help="the output folder of `openblip capfilt`.", help_behavior_hint="")
]


def clean_pairs(
    *,
    capfilt: CapFiltConfig,
    out: Path,
    decoding: DecodingOptions = DecodingOptions(decoding="nucleus"),  # noqa: B008
    engine: Literal["local"] = "local",
    device: str | None = None,
) -> int:
    """Writes a caption for every image, scores it and the web text, and keeps what matches.

    The same command again resumes. Every text and its scores stay in the output; read what is kept as the data source
    capfilt:OUT, or write it out with `openblip capfilt-export`.

    Args:
        capfilt: what is cleaned, and how.
        out: the folder of the output.
        engine: where shards are worked on: local, on this machine, one after another.
        device: "cpu", "cuda", "cuda:1" …; the best there is when not given.
    """
    config = replace(capfilt, decoding=decoding.build())
    from openblip.capfilt.local import run_capfilt

    summary = run_capfilt(config, out, device=device)
    for name, counts in summary.scores.sources.items():
        print(f"{name}: kept {counts.kept:,} of {counts.texts:,} texts")
    print(f"report: {summary.report}")
    for shard, error in summary.failed:
        print(f"failed: {shard}: {error}", file=sys.stderr)
    if summary.failed:
        print(f"{len(summary.failed)} shards could not be finished; the same command again tries them", file=sys.stderr)
    return 1 if summary.failed else 0


def select_texts(directory: Directory, /, *, threshold: float) -> int:
    """Changes which texts of a CapFilt run are kept; reads the stored scores and runs no model.

    The data source capfilt:DIR follows at once. An export has to be written anew.

    Args:
        threshold: keep texts with an ITM probability above this, 0 to 1.
    """
    from openblip.capfilt.selection import select

    for name, counts in select(directory, threshold).sources.items():
        print(f"{name}: kept {counts.kept:,} of {counts.texts:,} texts")
    return 0


def export_pairs(directory: Directory, /, *, out: Path) -> int:
    """Writes the kept pairs of a CapFilt run as tar shards, images included, for use by any trainer.

    Each pair is an image file and a .json with its caption, scores and origin. The same command again, after
    `openblip capfilt-select` or a stop, brings the shards up to date.

    Args:
        out: the folder for the shards; empty, or an earlier export of the same run.
    """
    from openblip.capfilt.selection import export

    summary = export(directory, out)
    print(f"wrote {summary.pairs:,} pairs in {summary.shards:,} shards to {out}")
    for reject in summary.rejects:
        print(f"skipped {reject.shard}/{reject.key}: {reject.reason}", file=sys.stderr)
    return 1 if summary.rejects else 0
