"""BLIP pre-training: ITC, ITM and LM over one image encoding (BLIP section 3.2).

B examples, T text tokens, V vocabulary.
"""

import torch
from torch import Tensor

from openblip.data.batch import ImageTextBatch
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.models.blip import Blip
from openblip.models.config import PRETRAINING_HEADS, Head
from openblip.objectives.language_modeling import lm_loss, next_token_labels
from openblip.tasks.base import BlipTask, encode_media, replace_first
from openblip.tasks.config import PretrainingConfig
from openblip.tasks.contrastive_matching import ContrastiveMatching


class Pretraining(BlipTask):
    """A model with the heads itc, itm and lm, and the three objectives that train it."""

    config: PretrainingConfig

    @classmethod
    def heads(cls, config: PretrainingConfig) -> tuple[Head, ...]:
        return PRETRAINING_HEADS

    def __init__(
        self, config: PretrainingConfig, model: Blip, tokenizer: Tokenizer, preprocessing: Preprocessing
    ) -> None:
        super().__init__(config, model, tokenizer, preprocessing)
        self.contrastive_matching = ContrastiveMatching(model, config.contrastive, tokenizer.enc_id)

    def forward(self, batch: ImageTextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses itc, itm and lm."""
        pixels = self.preprocessing.normalize(batch.pixels)
        image_tokens = encode_media(self.model, pixels)  # once for all three
        image_kv = self.model.image_kv(image_tokens, "encode")
        losses = self.contrastive_matching.losses(
            self.model, pixels, image_tokens, batch.tokens, batch.image_ids, step, generator, image_kv
        )
        shared = self.model.shares_cross_attention
        decode_kv = image_kv if shared else self.model.image_kv(image_tokens, "decode")
        captions = replace_first(batch.tokens, self.dec_id)
        logits = self.model.decode(captions.ids[:, :-1], decode_kv)  # (B, T - 1, V)
        labels = next_token_labels(captions.ids, captions.mask)
        return {**losses, "lm": lm_loss(logits, labels, self.config.label_smoothing)}

    def after_step(self) -> None:
        """Move the momentum model and the queue."""
        self.contrastive_matching.after_step(self.model)
