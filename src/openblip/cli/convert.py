"""`openblip convert`: a checkpoint in another format."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from openblip.errors import ConfigError


def command(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IN")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    *,
    format: Literal["openblip", "huggingface"],
) -> int:
    """Reads a checkpoint and writes it as another format's folder, in float32.

    Args:
        source: a checkpoint folder, OpenBLIP's or transformers', or the name of a shipped model.
        out: the new folder.
        format: openblip, or huggingface for what transformers reads too.
    """
    import openblip

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and not empty; name a new folder")
    openblip.load(source, device="cpu").save(out, format=format)
    print(f"wrote {out}")
    return 0
