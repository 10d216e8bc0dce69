"""What torch.save wrote, read as weights only: a file that wants to run code is refused."""

import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openblip.errors import CheckpointError, ConfigError

SUFFIX = ".pth"
OURS = "openblip"

# How torch says that a file is torn, no pickle, or one that asks for more than tensors.
_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
)


def read_pickled(path: Path) -> Any:
    """The content of a .pth, .pt or .bin file on the CPU; CheckpointError when it cannot be read so."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _ERRORS as error:
        lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
        # torch begins with how to read the file all the same, and says what it refused further down.
        reason = next((line for line in lines if "Unsupported" in line), lines[0]).partition(" Please ")[0]
        raise CheckpointError(
            f"{path} cannot be read as weights, and nothing else is read from a pickle "
            f"({type(error).__name__}: {reason}). Is the file whole, and from where you think?"
        ) from error


def state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """`content` as a state dict; CheckpointError names what is no tensor."""
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds no weights: a {type(content).__name__}, not names and tensors.")
    strange = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strange or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path} holds what is no weight: {', '.join(sorted(strange)[:10])}.")
    return content


class OriginalFile(NamedTuple):
    """What of a .pth file belongs to a model; the state of a training is left out."""

    path: Path
    weights: dict[str, Tensor]
    entry: Any
    """What OpenBLIP wrote beside "model", None in a file of others."""


def read_original(path: Path) -> OriginalFile:
    """A .pth file of {"model": state dict, ...}, or of the state dict alone.

    Raises CheckpointError when it is no such file or wants to run code.
    """
    content = read_pickled(path)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        return OriginalFile(path, state_dict(content["model"], path), content.get(OURS))
    return OriginalFile(path, state_dict(content, path), None)


def write_original(path: Path, weights: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
    """Write such a file at once or not at all. ConfigError unless its name ends with .pth."""
    if path.suffix != SUFFIX:
        raise ConfigError(f"{path}: an original checkpoint is one file; let its name end with {SUFFIX}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    torch.save({"model": dict(weights), OURS: dict(entry)}, partial)
    os.replace(partial, path)
