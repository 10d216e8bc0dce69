"""`openblip capfilt-export`: the bootstrapped pairs as tar shards."""

import sys
from pathlib import Path
from typing import Annotated

import tyro


def command(
    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help_behavior_hint="")],
    /,
    *,
    out: Path,
) -> int:
    """Writes the kept pairs of a CapFilt run as tar shards, images included, for use by any trainer.

    Each pair is an image file and a .json with its caption, scores and origin. The same command again, after
    `openblip capfilt-select` or a stop, brings the shards up to date.

    Args:
        directory: the output folder of `openblip capfilt`.
        out: the folder for the shards; empty, or an earlier export of the same run.
    """
    from openblip.capfilt.selection import export

    summary = export(directory, out)
    print(f"wrote {summary.pairs:,} pairs in {summary.shards:,} shards to {out}")
    for reject in summary.rejects:
        print(f"skipped {reject.shard}/{reject.key}: {reject.reason}", file=sys.stderr)
    return 1 if summary.rejects else 0
