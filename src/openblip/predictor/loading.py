"""`openblip.load`: from the name of a checkpoint to a predictor."""

import os

import torch

from openblip.checkpoints.loading import load_any
from openblip.predictor.predictor import Predictor


def load(
    source: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Predictor:
    """A predictor from a checkpoint folder, OpenBLIP's or transformers', or the name of a shipped model.

    A folder is named by its path, or as owner/model on the Hugging Face hub.

    device: where it runs; by default the GPU if there is one. dtype: of the weights, float32 by default.
    Raises CheckpointError when there is no such checkpoint or it is not whole.
    """
    return Predictor(load_any(source), device, dtype)
