"""Stage 1 of BLIP-2: ITC, ITM and ITG teach the queries to extract what texts say about an image (BLIP-2 section 3.2).

With the image encoder trained as well, this is fine-tuning for retrieval (section 4.4).

B local batch, G joint batch of all processes, Q queries, D their width, T text tokens, E embedding width.
"""

import torch
from torch import Tensor

from openblip.data.batch import ImageTextBatch
from openblip.data.tokenizer import Tokenizer, Tokens
from openblip.distributed import gather, gather_with_gradient
from openblip.models.blip import similarity_matrix
from openblip.models.config import Blip2Head
from openblip.objectives import in_batch_itc_loss, lm_loss, next_token_labels
from openblip.tasks.base import Blip2Task, hard_negatives_loss, replace_first
from openblip.tasks.config import Blip2Stage1Config


class Blip2Stage1(Blip2Task):
    """ITC, ITM and, where the settings say so, ITG over a BLIP-2."""

    config: Blip2Stage1Config
    tokenizer: Tokenizer

    @classmethod
    def heads(cls, config: Blip2Stage1Config) -> tuple[Blip2Head, ...]:
        return ("itc", "itm", "itg") if config.itg else ("itc", "itm")

    def forward(self, batch: ImageTextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses itc, itm and, with its head, itg."""
        features, tokens = self.encode(batch.pixels), batch.tokens  # encoded once for all three
        image_kv = self.model.image_kv(features)
        output = self.model.encode_queries(image_kv)
        itc, similarities = self._itc(output.queries, tokens, batch.image_ids)
        itm = hard_negatives_loss(self.model, tokens, features, image_kv, batch.image_ids, similarities, generator)
        if not self.config.itg:
            return {"itc": itc, "itm": itm}
        captions = replace_first(tokens, self.tokenizer.dec_id)
        logits = self.model.caption_logits(captions.ids[:, :-1], output)
        itg = lm_loss(logits, next_token_labels(captions.ids, captions.mask), self.config.label_smoothing)
        return {"itc": itc, "itm": itm, "itg": itg}

    def _itc(self, queries: Tensor, tokens: Tokens, ids: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of queries (B, Q, D) and texts (B, T), and the similarities over temperature by which ITM chooses
        its negatives.

        Gradients reach the rows of every process. The released code cuts them off at gathered keys, but only when there
        are several processes.
        """
        image = self.model.embed_image(queries)  # (B, Q, E)
        text = self.model.embed_text(tokens.ids, tokens.mask)  # (B, E)
        with torch.autocast(image.device.type, enabled=False):  # bf16 similarities over 0.07 are too coarse
            temperature = self.model.temperature
            image_to_text = similarity_matrix(image, gather_with_gradient(text)) / temperature  # (B, G)
            text_to_image = similarity_matrix(gather_with_gradient(image), text).T / temperature  # (B, G)
            loss = in_batch_itc_loss(image_to_text, text_to_image, ids, gather(ids), self.config.label_smoothing)
        return loss, (image_to_text, text_to_image)
