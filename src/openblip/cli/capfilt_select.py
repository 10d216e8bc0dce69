"""`openblip capfilt-select`: another threshold for a CapFilt run."""

from pathlib import Path
from typing import Annotated

import tyro


def command(
    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help_behavior_hint="")],
    /,
    *,
    threshold: float,
) -> int:
    """Changes which texts of a CapFilt run are kept; reads the stored scores and runs no model.

    The data source capfilt:DIR follows at once. An export has to be written anew.

    Args:
        directory: the output folder of `openblip capfilt`.
        threshold: keep texts with an ITM probability above this, 0 to 1.
    """
    from openblip.capfilt.selection import select

    for name, counts in select(directory, threshold).sources.items():
        print(f"{name}: kept {counts.kept:,} of {counts.texts:,} texts")
    return 0
