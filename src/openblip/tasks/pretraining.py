"""BLIP pre-training: ITC, ITM and LM over one image encoding (BLIP section 3.2).

B examples, T text tokens, V vocabulary.
"""

import torch
from torch import Tensor

from openblip.data.batch import ImageTextBatch
from openblip.models.config import PRETRAINING_HEADS, Head
from openblip.objectives.language_modeling import lm_loss, next_token_labels
from openblip.tasks.base import encode_media, replace_first
from openblip.tasks.config import PretrainingConfig
from openblip.tasks.contrastive_matching import ContrastiveMatchingTask


class Pretraining(ContrastiveMatchingTask):
    """A model with the heads itc, itm and lm, and the three objectives that train it."""

    config: PretrainingConfig

    @classmethod
    def heads(cls, config: PretrainingConfig) -> tuple[Head, ...]:
        return PRETRAINING_HEADS

    def forward(self, batch: ImageTextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses itc, itm and lm."""
        pixels = self.preprocessing.normalize(batch.pixels)
        image_tokens = encode_media(self.model, pixels)  # once for all three
        image_kv = self.model.image_kv(image_tokens, "encode")
        losses = self.contrastive_matching_losses(batch, pixels, image_tokens, step, generator, image_kv)
        shared = self.model.shares_cross_attention
        decode_kv = image_kv if shared else self.model.image_kv(image_tokens, "decode")
        captions = replace_first(batch.tokens, self.tokenizer.dec_id)
        logits = self.model.decode(captions.ids[:, :-1], decode_kv)  # (B, T - 1, V)
        labels = next_token_labels(captions.ids, captions.mask)
        return {**losses, "lm": lm_loss(logits, labels, self.config.label_smoothing)}
