"""Retrieval of texts, images and videos: fine-tuning with ITC and ITM (BLIP sections 5.1 and 5.6).

Fine-tuned on clean pairs, the model is the filter of CapFilt (section 3.3).
"""

import torch
from torch import Tensor

from openblip.data.batch import ImageTextBatch
from openblip.models.config import Head
from openblip.tasks.base import encode_media
from openblip.tasks.config import RetrievalConfig
from openblip.tasks.contrastive_matching import ContrastiveMatchingTask


class Retrieval(ContrastiveMatchingTask):
    """A model with the heads itc and itm, and the two objectives that train it."""

    @classmethod
    def heads(cls, config: RetrievalConfig) -> tuple[Head, ...]:
        return ("itc", "itm")

    def forward(self, batch: ImageTextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses itc and itm."""
        pixels = self.preprocessing.normalize(batch.pixels)
        image_tokens = encode_media(self.model, pixels)
        return self.contrastive_matching_losses(batch, pixels, image_tokens, step, generator)
