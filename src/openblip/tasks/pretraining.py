"""BLIP pre-training: ITC, ITM and LM over one image encoding (BLIP section 3.2).

B examples, T text tokens, V vocabulary.
"""

import torch
from torch import Tensor

from openblip.data.batch import ImageTextBatch
from openblip.models.blip import encode_media
from openblip.models.config import PRETRAINING_HEADS
from openblip.objectives.language_modeling import lm_loss, next_token_labels
from openblip.tasks.base import replace_first
from openblip.tasks.config import PretrainingConfig
from openblip.tasks.retrieval import Retrieval


class Pretraining(Retrieval):
    """What retrieval trains, and LM over the same images."""

    config: PretrainingConfig
    trained_heads = PRETRAINING_HEADS

    def forward(self, batch: ImageTextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses itc, itm and lm."""
        pixels = self.preprocessing.normalize(batch.pixels)
        image_tokens = encode_media(self.model.encode_image, pixels)  # once for all three
        image_kv = self.model.image_kv(image_tokens, "encode")
        itc, similarities = self.contrastive_loss(batch, pixels, image_tokens, step)
        itm = self.matching_loss(batch, image_tokens, image_kv, similarities, generator)
        shared = self.model.shares_cross_attention
        decode_kv = image_kv if shared else self.model.image_kv(image_tokens, "decode")
        captions = replace_first(batch.tokens, self.tokenizer.dec_id)
        logits = self.model.decode(captions.ids[:, :-1], decode_kv)  # (B, T - 1, V)
        labels = next_token_labels(captions.ids, captions.mask)
        return {"itc": itc, "itm": itm, "lm": lm_loss(logits, labels, self.config.label_smoothing)}
