"""Prefix language modelling (SimVLM section 3.2): an encoder reads an image and the beginning of its caption, a decoder
writes the rest.

The encoder is BLIP's image-grounded encoder, and its decoder attends to the image's tokens and to the encoder's states
of the text. SimVLM's encoder has one stack for image and text, so that its image tokens see the text too.

B examples, T text tokens.
"""

import torch
from torch import Tensor

from openblip.data.batch import ImageTextBatch
from openblip.data.tokenizer import Tokens
from openblip.distributed import local_rows, world_size
from openblip.objectives import lm_loss, next_token_labels
from openblip.tasks.base import BlipTask
from openblip.tasks.config import PrefixConfig


class PrefixModeling(BlipTask):
    """LM over what follows a random beginning of each caption."""

    config: PrefixConfig
    trained_heads = ("prefix",)

    def forward(self, batch: ImageTextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss lm. Processes cut texts as one process would."""
        image_tokens, size = self.encode(batch.pixels), len(batch)
        shares = local_rows(torch.rand(size * world_size(), generator=generator), size)
        begin, rest = self.split(batch.tokens, shares.to(image_tokens.device, non_blocking=True))
        context_kv = self.model.prefix_kv(image_tokens, begin.ids, begin.mask)
        logits = self.model.decode(rest.ids[:, :-1], context_kv)
        labels = next_token_labels(rest.ids, rest.mask)
        return {"lm": lm_loss(logits, labels, self.config.label_smoothing)}

    def split(self, tokens: Tokens, shares: Tensor) -> tuple[Tokens, Tokens]:
        """The beginnings of texts (B, T), from [ENC] to [SEP], and the rests, from [DEC] to [SEP].

        shares: float32 (B,), from 0 to below 1. A text of n words begins with the first of them, from none to all but
        the last, each number as likely.
        """
        ids, place = tokens.ids, torch.arange(tokens.ids.shape[1], device=tokens.ids.device)  # (T,)
        lengths = tokens.mask.sum(dim=1, keepdim=True)  # (B, 1), with [CLS] and [SEP]
        cuts = (shares[:, None] * (lengths - 2)).long()  # (B, 1)
        begin = torch.where(place <= cuts, ids, self.tokenizer.sep_id)
        begin_mask = place <= cuts + 1
        rest = ids.gather(1, (place + cuts).clamp(max=len(place) - 1))
        rest_mask = place + cuts < lengths
        begin[:, 0], rest[:, 0] = self.tokenizer.enc_id, self.tokenizer.dec_id
        padding = self.tokenizer.pad_id
        return (
            Tokens(begin.masked_fill(~begin_mask, padding), begin_mask),
            Tokens(rest.masked_fill(~rest_mask, padding), rest_mask),
        )
