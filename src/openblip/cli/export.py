"""`openblip export`: a model as graphs for ONNX Runtime or OpenVINO."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from openblip.cli.options import check_output
from openblip.errors import ConfigError

if TYPE_CHECKING:
    from openblip.checkpoints.onnx import GraphFormat


def command(
    source: Annotated[str, tyro.conf.arg(metavar="IN")],
    out: Annotated[Path, tyro.conf.arg(metavar="OUT")],
    /,
    *,
    format: Literal["onnx", "openvino"],
    tokenizer: str | None = None,
) -> int:
    """Writes a model as graphs that run without torch: image encoder, embeddings, matching, and the steps of captions.

    Every graph is run on random inputs and compared with torch. The vocabulary and the preprocessing stand beside it.

    Args:
        source: whatever `openblip convert` reads.
        out: the new folder.
        format: onnx, for ONNX Runtime and others; or openvino, for processors and GPUs of Intel.
        tokenizer: folder or hub name of the vocabulary, for a source that has none beside it.
    """
    from openblip.checkpoints.loading import load_checkpoint
    from openblip.checkpoints.onnx import export_checkpoint, left_out, require_export_packages

    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out} is there already and not empty; name a new one")
    check_output("OUT", out, is_folder=True)
    wanted: GraphFormat = format
    require_export_packages(wanted)
    checkpoint = load_checkpoint(source, tokenizer=tokenizer)
    for name, difference in export_checkpoint(checkpoint, out, wanted).items():
        print(f"{name:<16} differs from torch by {difference:.0e}")
    if missing := left_out(checkpoint):
        print(f"not exported: {', '.join(missing)}")
    print(f"wrote {out}")
    return 0
