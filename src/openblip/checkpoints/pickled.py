"""What torch.save wrote, read as weights only: a file that wants to run code is refused."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openblip.errors import CheckpointError

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
