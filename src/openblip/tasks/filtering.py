"""The filter of CapFilt: ITC and ITM fine-tuned on clean pairs (BLIP section 3.3)."""

import torch
from torch import Tensor, nn

from openblip.data.batch import Batch
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.models.blip import Blip
from openblip.tasks.config import FilterConfig
from openblip.tasks.contrastive_matching import ContrastiveMatching


class Filtering(nn.Module):
    """A model with the heads itc and itm, and the two objectives that train it."""

    def __init__(
        self, model: Blip, tokenizer: Tokenizer, preprocessing: Preprocessing, config: FilterConfig
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        self.contrastive_matching = ContrastiveMatching(model, config.contrastive, tokenizer.enc_id)

    def forward(self, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses itc and itm of a batch, scalars."""
        pixels = self.preprocessing.normalize(batch.pixels)
        image_tokens = self.model.encode_image(pixels)
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
