"""The feature cache of a run of BLIP-2: filled before training, then read in place of pictures."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch

from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.data.config import DataConfig
from openblip.data.feature_cache import FeatureCache, build_cache, open_cache
from openblip.data.sources import Mixture
from openblip.distributed import gather_objects, rank, world_size
from openblip.errors import ConfigError
from openblip.models.vision_tower import VisionTower
from openblip.tasks.base import image_features

# Settings of ours that only matter while an encoder is trained.
_OF_TRAINING = ("drop_path", "activation_checkpointing")
# Of transformers' configs: where a model lies, and who wrote it.
_OF_FILES = ("_name_or_path", "architectures", "transformers_version", "dtype")


def cached_features(
    folder: str, checkpoint: Blip2Checkpoint, data: DataConfig, mixture: Mixture
) -> FeatureCache:
    """The features of a mixture's pictures, those that are not there yet encoded by all processes together.

    They are to the last bit what the run would compute from its pictures at every step, on this kind of
    device. Raises ConfigError where a run's pictures change from step to step, or its encoder does, and for a
    folder of another encoder.
    """
    model, preprocessing = checkpoint.model, checkpoint.preprocessing
    if data.augmentation is not None:
        raise ConfigError(
            "A feature cache holds one view of each picture, and augmentation makes a new one at every step: "
            "leave out --data.augmentation or --feature-cache."
        )
    if data.num_frames is not None:
        raise ConfigError("A feature cache is for pictures, not for clips: leave out --feature-cache.")
    if "vision" not in model.frozen:
        raise ConfigError(
            "The image encoder is trained, so its features change: leave out --train-vision or "
            "--feature-cache."
        )
    root = Path(folder)
    open_cache(root, describe_encoder(checkpoint))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    model.vision.to(device)
    build_cache(
        root,
        mixture,
        preprocessing,
        lambda pixels: image_features(model, preprocessing, pixels.to(device)),
        rank=rank(),
        world_size=world_size(),
        num_workers=data.num_workers,
    )
    gather_objects([rank()])  # every process has filled its share
    return FeatureCache.open(root)


def describe_encoder(checkpoint: Blip2Checkpoint) -> dict[str, Any]:
    """All that decides an encoder's features: its shape, the pixels it sees, and a hash of its weights."""
    model, config = checkpoint.model.vision, checkpoint.model.config.vision
    if isinstance(model, VisionTower):
        settings = {**model.model.config.to_dict(), "layer": model.layer}
    else:
        settings = dataclasses.asdict(config)
    shape = {name: value for name, value in settings.items() if name not in (*_OF_TRAINING, *_OF_FILES)}
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        **{f"encoder.{name}": value for name, value in shape.items()},
        **{f"pixels.{n}": value for n, value in dataclasses.asdict(checkpoint.preprocessing).items()},
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weights": digest.hexdigest(),
    }
