"""Frozen image encoders by name, with the preprocessing that they were trained with."""

import os

import torch

from openblip.errors import CheckpointError
from openblip.models.vision_tower import VisionTower


def load_vision_tower(
    source: str | os.PathLike[str], *, layer: int = -2, dtype: torch.dtype = torch.float32
) -> VisionTower:
    """The image side of a model of transformers, read at `layer`, in eval mode.

    Raises CheckpointError when there is no such model.
    """
    import transformers

    name = os.fspath(source)
    try:
        model = transformers.AutoModel.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{name} cannot be loaded as image encoder: {error}") from error
    return VisionTower(model.eval(), layer)
