"""BLIP pre-training: ITC, ITM and LM over one image encoding (BLIP section 3.2)."""

import torch
from torch import Tensor

from openblip.data.batch import Batch
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.models.blip import Blip
from openblip.objectives.language_modeling import lm_loss, next_token_labels
from openblip.tasks.config import PretrainingConfig
from openblip.tasks.contrastive_matching import ContrastiveMatching
from openblip.tasks.media import encode_media
from openblip.tasks.protocol import TrainingTask
from openblip.tasks.tokens import replace_first


class Pretraining(TrainingTask):
    """A model with the heads itc, itm and lm, and the three objectives that train it."""

    def __init__(
        self, model: Blip, tokenizer: Tokenizer, preprocessing: Preprocessing, config: PretrainingConfig
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.preprocessing = preprocessing
        self.dec_id = tokenizer.dec_id
        self.contrastive_matching = ContrastiveMatching(model, config.contrastive, tokenizer.enc_id)

    def forward(self, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses itc, itm and lm of a batch, scalars."""
        pixels = self.preprocessing.normalize(batch.pixels)
        image_tokens = encode_media(self.model, pixels)  # once for all three
        image_kv = self.model.image_kv(image_tokens, "encode")
        itc, *similarities = self.contrastive_matching.itc(
            self.model, pixels, image_tokens, batch.tokens, batch.image_ids, step
        )
        itm = self.contrastive_matching.itm(
            self.model,
            image_tokens,
            image_kv,
            batch.tokens,
            batch.image_ids,
            (similarities[0], similarities[1]),
            generator,
        )
        shared = self.model.shares_cross_attention
        decode_kv = image_kv if shared else self.model.image_kv(image_tokens, "decode")
        captions = replace_first(batch.tokens, self.dec_id)
        logits = self.model.decode(captions.ids[:, :-1], decode_kv)
        lm = lm_loss(logits, next_token_labels(captions.ids, captions.mask), self.config.label_smoothing)
        return {"itc": itc, "itm": itm, "lm": lm}

    def after_step(self) -> None:
        """Move the momentum twin and the queue."""
        self.contrastive_matching.after_step(self.model)
