"""The feature cache of a BLIP-2 run: built before training, then read in place of images."""

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

# Our settings that matter only while an encoder is trained.
TRAINING_SETTINGS = ("drop_path", "activation_checkpointing")
# Settings of transformers about a model's files: where they lie, and who wrote them.
FILE_SETTINGS = ("_name_or_path", "architectures", "transformers_version", "dtype")


def cached_features(folder: str, checkpoint: Blip2Checkpoint, data: DataConfig, mixture: Mixture) -> FeatureCache:
    """The features of all images of a mixture; all processes together compute those that are missing.

    To the last bit they are what the run would compute from the images at every step on this kind of device.
    Raises ConfigError where the images of a run or its encoder change from step to step, and for a folder
    that belongs to another encoder.
    """
    model, preprocessing = checkpoint.model, checkpoint.preprocessing
    if data.augmentation is not None:
        raise ConfigError(
            "A feature cache holds one view of each image, and augmentation makes a new one at every step: "
            "leave out --data.augmentation or --feature-cache."
        )
    if data.num_frames is not None:
        raise ConfigError("A feature cache is for images, not for videos: leave out --feature-cache.")
    if "vision" not in model.frozen:
        raise ConfigError(
            "The image encoder is trained, so its features change: leave out --train-vision or --feature-cache."
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
    gather_objects([rank()])  # waits until every process has computed its share
    return FeatureCache.open(root)


def describe_encoder(checkpoint: Blip2Checkpoint) -> dict[str, Any]:
    """All that decides an encoder's features: its shape, its preprocessing, and a hash of its weights."""
    model, config = checkpoint.model.vision, checkpoint.model.config.vision
    if isinstance(model, VisionTower):
        settings = {**model.model.config.to_dict(), "layer": model.layer}
    else:
        settings = dataclasses.asdict(config)
    ignored = (*TRAINING_SETTINGS, *FILE_SETTINGS)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        **{f"encoder.{name}": value for name, value in settings.items() if name not in ignored},
        **{f"pixels.{n}": value for n, value in dataclasses.asdict(checkpoint.preprocessing).items()},
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weights": digest.hexdigest(),
    }
