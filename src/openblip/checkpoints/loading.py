"""One entry for every checkpoint: what a source is, and which format's reader and writer takes it."""

import os
from pathlib import Path
from typing import Literal, get_args

from openblip.checkpoints.blip2_native import Blip2Checkpoint, is_blip2, load_blip2, save_blip2
from openblip.checkpoints.blip2_original import load_blip2_original, save_blip2_original
from openblip.checkpoints.blip2_original_config import is_qformer
from openblip.checkpoints.hub import hub_folder, is_hub_name
from openblip.checkpoints.native import CONFIG, Checkpoint, is_checkpoint, load_checkpoint, save_checkpoint
from openblip.checkpoints.original import load_original, save_original
from openblip.checkpoints.pickled import read_original
from openblip.errors import CheckpointError, ConfigError

Format = Literal["openblip", "huggingface", "original"]
AnyCheckpoint = Checkpoint | Blip2Checkpoint
PRETRAINED = Path(__file__).parents[1] / "pretrained"


def load_any(
    source: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    vision: str | os.PathLike[str] | None = None,
    language_model: str | os.PathLike[str] | None = None,
) -> AnyCheckpoint:
    """Read a checkpoint, in float32 on the CPU, in eval mode.

    Args:
        source: a folder of OpenBLIP or of transformers' BLIP or BLIP-2, an original .pth file, the name of a
            shipped model, or owner/model on the Hugging Face hub.
        tokenizer: folder or hub name of a vocabulary, which goes before the checkpoint's own.
        vision: the image encoder of an original BLIP-2 file that leaves it out: a .pth file, a folder, or a
            name on the hub.
        language_model: the language model of an original BLIP-2 file: a folder, or a name on the hub.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not whole.
        ConfigError: a part is named that the checkpoint does not leave out.
    """
    folder = Path(source)
    if not folder.is_dir() and (PRETRAINED / str(source)).is_dir():
        folder = PRETRAINED / str(source)
    if not folder.exists() and is_hub_name(str(source)):
        folder = hub_folder(str(source))
    if folder.is_file():
        file = read_original(folder)
        if is_qformer(file.weights):
            return load_blip2_original(file, tokenizer, vision, language_model)
        _refuse_parts(source, vision, language_model)
        return load_original(file, tokenizer)
    _refuse_parts(source, vision, language_model)
    if is_blip2(folder):
        return load_blip2(folder, tokenizer)
    if is_checkpoint(folder):
        return load_checkpoint(folder, tokenizer)
    if (folder / CONFIG).is_file():
        # transformers takes seconds to import
        from openblip.checkpoints.blip2_huggingface import is_blip2_huggingface, load_blip2_huggingface
        from openblip.checkpoints.huggingface import load_huggingface

        if is_blip2_huggingface(folder):
            return load_blip2_huggingface(folder, tokenizer)
        return load_huggingface(folder, tokenizer)
    shipped = ", ".join(sorted(path.name for path in PRETRAINED.glob("*") if path.is_dir()))
    raise CheckpointError(
        f"{source} is no checkpoint: name a folder of OpenBLIP or of transformers' BLIP or BLIP-2, an "
        "original .pth file, a model on the hub (owner/model), or a shipped one "
        f"({shipped or 'none is installed'})."
    )


def _refuse_parts(source: str | os.PathLike[str], *parts: str | os.PathLike[str] | None) -> None:
    for part in parts:
        if part is not None:
            raise ConfigError(
                f"{source} is a whole model: leave {part} out. Only original BLIP-2 files lack parts."
            )


def save_as(checkpoint: AnyCheckpoint, path: str | os.PathLike[str], format: Format) -> None:
    """Write a checkpoint that `load_any` reads.

    path: a folder; for "original" a file whose name ends with .pth.

    Raises CheckpointError when the format has no place for the model's heads, ConfigError when there is no
    such format.
    """
    if format not in get_args(Format):
        raise ConfigError(
            f'Format "{format}" cannot be written; choose one of {", ".join(get_args(Format))}.'
        )
    if isinstance(checkpoint, Blip2Checkpoint):
        _save_blip2_as(checkpoint, Path(path), format)
    else:
        _save_blip_as(checkpoint, Path(path), format)


def _save_blip_as(checkpoint: Checkpoint, path: Path, format: Format) -> None:
    match format:
        case "openblip":
            save_checkpoint(path, checkpoint)
        case "huggingface":
            from openblip.checkpoints.huggingface import save_huggingface  # transformers takes seconds

            save_huggingface(path, checkpoint)
        case "original":
            save_original(path, checkpoint)


def _save_blip2_as(checkpoint: Blip2Checkpoint, path: Path, format: Format) -> None:
    match format:
        case "openblip":
            save_blip2(path, checkpoint)
        case "huggingface":
            from openblip.checkpoints.blip2_huggingface import save_blip2_huggingface

            save_blip2_huggingface(path, checkpoint)
        case "original":
            save_blip2_original(path, checkpoint)
