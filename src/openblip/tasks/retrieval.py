"""Retrieval of texts, images and clips: ITC and ITM (BLIP sections 5.1 and 5.6), and how it is measured.

Fine-tuned on clean pairs, this is the filter of CapFilt (section 3.3).

I images or clips, T texts.
"""

import torch
from torch import Tensor

from openblip.data.batch import Batch
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.models.blip import Blip
from openblip.tasks.config import RetrievalConfig
from openblip.tasks.contrastive_matching import ContrastiveMatching
from openblip.tasks.media import encode_media
from openblip.tasks.protocol import TrainingTask


class Retrieval(TrainingTask):
    """A model with the heads itc and itm, and the two objectives that train it."""

    def __init__(
        self, model: Blip, tokenizer: Tokenizer, preprocessing: Preprocessing, config: RetrievalConfig
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        self.contrastive_matching = ContrastiveMatching(model, config.contrastive, tokenizer.enc_id)

    def forward(self, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses itc and itm of a batch, scalars."""
        pixels = self.preprocessing.normalize(batch.pixels)
        image_tokens = encode_media(self.model, pixels)
        itc, image_to_text, text_to_image = self.contrastive_matching.itc(
            self.model, pixels, image_tokens, batch.tokens, batch.image_ids, step
        )
        itm = self.contrastive_matching.itm(
            self.model,
            image_tokens,
            self.model.image_kv(image_tokens, "encode"),
            batch.tokens,
            batch.image_ids,
            (image_to_text, text_to_image),
            generator,
        )
        return {"itc": itc, "itm": itm}

    def after_step(self) -> None:
        """Move the momentum twin and the queue."""
        self.contrastive_matching.after_step(self.model)
