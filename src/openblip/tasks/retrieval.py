"""Retrieval of texts, images and videos: fine-tuning with ITC and ITM (BLIP sections 5.1 and 5.6).

Fine-tuned on clean pairs, the model is the filter of CapFilt (section 3.3).
"""

import torch
from torch import Tensor

from openblip.data.batch import ImageTextBatch
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.models.blip import Blip
from openblip.models.config import Head
from openblip.tasks.base import BlipTask, encode_media
from openblip.tasks.config import RetrievalConfig
from openblip.tasks.contrastive_matching import ContrastiveMatching


class Retrieval(BlipTask):
    """A model with the heads itc and itm, and the two objectives that train it."""

    @classmethod
    def heads(cls, config: RetrievalConfig) -> tuple[Head, ...]:
        return ("itc", "itm")

    def __init__(
        self, config: RetrievalConfig, model: Blip, tokenizer: Tokenizer, preprocessing: Preprocessing
    ) -> None:
        super().__init__(config, model, tokenizer, preprocessing)
        self.contrastive_matching = ContrastiveMatching(model, config.contrastive, tokenizer.enc_id)

    def forward(self, batch: ImageTextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses itc and itm."""
        pixels = self.preprocessing.normalize(batch.pixels)
        image_tokens = encode_media(self.model, pixels)
        return self.contrastive_matching.losses(
            self.model, pixels, image_tokens, batch.tokens, batch.image_ids, step, generator
        )

    def after_step(self) -> None:
        """Move the momentum model and the queue."""
        self.contrastive_matching.after_step(self.model)
