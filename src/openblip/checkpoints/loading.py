"""One entry for every checkpoint: what a source is, and which format's reader and writer takes it."""

import os
from pathlib import Path
from typing import Literal

from openblip.checkpoints.hub import hub_folder, is_hub_name
from openblip.checkpoints.native import CONFIG, Checkpoint, is_checkpoint, load_checkpoint, save_checkpoint
from openblip.errors import CheckpointError, ConfigError

Format = Literal["openblip", "huggingface", "original"]
PRETRAINED = Path(__file__).parents[1] / "pretrained"


def load_any(
    source: str | os.PathLike[str], *, tokenizer: str | os.PathLike[str] | None = None
) -> Checkpoint:
    """Read a checkpoint, in float32 on the CPU, in eval mode.

    Args:
        source: a folder of OpenBLIP or of transformers' BLIP, the name of a shipped model, or owner/model on
            the Hugging Face hub.
        tokenizer: folder or hub name of the vocabulary, for a checkpoint that has none.

    Raises:
        CheckpointError: there is no such checkpoint or it is not whole.
    """
    folder = Path(source)
    if not folder.is_dir() and (PRETRAINED / str(source)).is_dir():
        folder = PRETRAINED / str(source)
    if not folder.exists() and is_hub_name(str(source)):
        folder = hub_folder(str(source))
    if is_checkpoint(folder):
        return load_checkpoint(folder)
    if (folder / CONFIG).is_file():
        from openblip.checkpoints.huggingface import load_huggingface  # transformers takes seconds

        return load_huggingface(folder)
    shipped = ", ".join(sorted(path.name for path in PRETRAINED.glob("*") if path.is_dir()))
    raise CheckpointError(
        f"{source} is no checkpoint: name a folder of OpenBLIP or of transformers' BLIP, a model on the hub "
        f"(owner/model), or a shipped one ({shipped or 'none is installed'})."
    )


def save_as(checkpoint: Checkpoint, path: str | os.PathLike[str], format: Format) -> None:
    """Write a checkpoint that `load_any` reads.

    path: a folder; for "original" a file.

    Raises CheckpointError when the format has no place for the model's heads.
    """
    match format:
        case "openblip":
            save_checkpoint(Path(path), checkpoint)
        case "huggingface":
            from openblip.checkpoints.huggingface import save_huggingface  # transformers takes seconds

            save_huggingface(Path(path), checkpoint)
        case _:
            raise ConfigError(f'Format "{format}" cannot be written; choose "openblip" or "huggingface".')
