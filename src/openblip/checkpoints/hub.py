"""Checkpoints by their name on the Hugging Face hub."""

import re
from pathlib import Path

from openblip.errors import CheckpointError

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/model
_SMALL_FILES = ["*.json", "vocab.txt"]


def is_hub_name(source: str) -> bool:
    """Whether `source` reads like owner/model."""
    return _NAME.fullmatch(source) is not None


def hub_folder(name: str) -> Path:
    """The folder of the hub's local cache with a model's files, fetched where they are not there yet.

    Of the weights safetensors are taken, and pytorch_model.bin or its shards where there are none. Raises
    CheckpointError when the hub does not give them.
    """
    import huggingface_hub  # takes a while to import, and few checkpoints come from there

    try:
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            patterns = [*_SMALL_FILES, weights]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
            if any(folder.glob(weights)):
                break
    except (OSError, ValueError) as error:  # offline, no such model, or not a model's name
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{name} is no checkpoint: there is no such folder, and the Hugging Face hub has none; "
            f"offline, name a folder or a shipped model ({type(error).__name__}: {reason})."
        ) from error
    return folder
