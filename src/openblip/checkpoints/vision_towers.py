"""Vision models of transformers by name, to be frozen as they are."""

import os
from pathlib import Path

import torch

from openblip.errors import CheckpointError
from openblip.models.vision_tower import VisionTower

# Weights that say nothing about hidden states: files of classifiers and of training lack them.
_NEVER_READ = ("pooler.", "embeddings.mask_token")


def load_vision_tower(
    source: str | os.PathLike[str], *, layer: int = -2, dtype: torch.dtype = torch.float32
) -> VisionTower:
    """A vision model of transformers, or the image side of a model of images and texts, in eval mode.

    source: a folder, or a name on the Hugging Face hub. layer: whose output is taken, see `VisionTower`.

    Raises CheckpointError when there is no such model, it lacks weights, layer or image side.
    """
    import transformers  # takes seconds

    from openblip.checkpoints.from_transformers import read_config, read_model

    name = os.fspath(source)
    config = read_config(name)
    config = getattr(config, "vision_config", config)  # what else the file holds is not read
    loaded = read_model(transformers.AutoModel, name, config=config, dtype=dtype)
    if loaded.model.main_input_name != "pixel_values":
        raise CheckpointError(f"{name} is a {config.model_type}, which sees no pictures.")
    missing = sorted(weight for weight in loaded.missing if not weight.startswith(_NEVER_READ))
    if missing:
        raise CheckpointError(f"{name} lacks weights of its image encoder: {'; '.join(missing)}.")
    return VisionTower(loaded.model.eval(), layer)


def save_vision_tower(folder: Path, tower: VisionTower) -> None:
    """Write a folder that `load_vision_tower` reads, in the model's own precision."""
    from openblip.checkpoints.from_transformers import quietly

    with quietly():
        tower.model.save_pretrained(folder)
