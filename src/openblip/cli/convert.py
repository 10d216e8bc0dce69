"""`openblip convert`: a checkpoint in another format."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from openblip.cli.options import check_output
from openblip.errors import ConfigError


def command(
    source: Annotated[str, tyro.conf.arg(metavar="IN")],
    out: Annotated[Path, tyro.conf.arg(metavar="OUT")],
    /,
    *,
    format: Literal["openblip", "huggingface", "original"],
    tokenizer: str | None = None,
    vision: str | None = None,
    language_model: str | None = None,
) -> int:
    """Reads a checkpoint and writes it in another format, in float32.

    LAVIS' .pth files of BLIP-2 leave out what was frozen: say where it is.

    Args:
        source: a checkpoint folder, OpenBLIP's or transformers', an original .pth file, a folder of peft's adapters, a
            model on the Hugging Face hub (owner/model), or the name of a shipped model.
        out: the new folder; for the original format the new file, whose name ends with .pth.
        format: openblip, huggingface for what transformers reads too, or original for the released code.
        tokenizer: folder or hub name of the vocabulary, for a source that has none beside it.
        vision: image encoder of a LAVIS file that leaves it out: a .pth file (eva_vit_g.pth), a folder, or a hub name.
        language_model: language model of a LAVIS file of stage 2: a folder, or a hub name (facebook/opt-2.7b).
    """
    from openblip.checkpoints.loading import load_checkpoint, save_checkpoint

    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out} is there already and not empty; name a new one")
    if format == "original" and out.is_dir():
        raise ConfigError(f"{out} is a folder; name the new .pth file, in it or elsewhere")
    check_output("OUT", out, is_folder=format != "original")
    checkpoint = load_checkpoint(source, tokenizer=tokenizer, vision=vision, language_model=language_model)
    save_checkpoint(checkpoint, out, format)
    print(f"wrote {out}")
    return 0
