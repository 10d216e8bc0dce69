"""Stage 1 of BLIP-2: ITC, ITM and ITG teach the queries what of an image texts speak of (BLIP-2 section 3.2).

With the image encoder trained as well, this is fine-tuning for retrieval (section 4.4).

B local batch, G joint batch of all processes, N image tokens, Q queries, T text tokens, E embedding width.
"""

import torch
from torch import Tensor

from openblip.data.batch import Batch
from openblip.data.tokenizer import Tokenizer, Tokens
from openblip.data.transforms import Preprocessing
from openblip.distributed import gather, gather_with_gradient, world_size
from openblip.models.blip import similarity_matrix
from openblip.models.blip2 import Blip2, ImageKV, QueryOutput
from openblip.objectives.contrastive import in_batch_itc_loss
from openblip.objectives.language_modeling import lm_loss, next_token_labels
from openblip.tasks.blip2_task import Blip2Task
from openblip.tasks.config import RepresentationConfig
from openblip.tasks.hard_negatives import hard_negatives_loss
from openblip.tasks.tokens import replace_first


class RepresentationLearning(Blip2Task):
    """A model with the heads itc and itm, and itg where its config says so, and what trains them."""

    def __init__(
        self, model: Blip2, tokenizer: Tokenizer, preprocessing: Preprocessing, config: RepresentationConfig
    ) -> None:
        super().__init__(model, preprocessing)
        self.config = config
        self.dec_id = tokenizer.dec_id

    def forward(self, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses itc, itm and, with its head, itg of a batch, scalars."""
        features = self.features(batch.pixels)  # once for all three
        image_kv = self.model.image_kv(features)
        read = self.model.encode_queries(image_kv)
        itc, similarities = self._itc(read.queries, batch.tokens, batch.image_ids)
        itm = hard_negatives_loss(
            self.model.match_logits,
            batch.tokens,
            image_kv,
            lambda index: self._negative_images(features, image_kv, index),
            batch.image_ids,
            similarities,
            generator,
        )
        losses = {"itc": itc, "itm": itm}
        return losses | {"itg": self._itg(read, batch.tokens)} if self.config.itg else losses

    def _itc(self, queries: Tensor, tokens: Tokens, ids: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss, and the similarities over temperature by which ITM mines its negatives.

        Gradients reach every process's rows. The released code cuts them off at gathered keys, but only when
        there are several processes.
        """
        image = self.model.embed_image(queries)  # (B, Q, E)
        text = self.model.embed_text(tokens.ids, tokens.mask)  # (B, E)
        with torch.autocast(image.device.type, enabled=False):  # bf16 similarities over 0.07 are too coarse
            temperature = self.model.temperature
            image_to_text = similarity_matrix(image, gather_with_gradient(text)) / temperature  # (B, G)
            text_to_image = similarity_matrix(gather_with_gradient(image), text).T / temperature  # (B, G)
            loss = in_batch_itc_loss(
                image_to_text, text_to_image, ids, gather(ids), self.config.label_smoothing
            )
        return loss, (image_to_text, text_to_image)

    def _negative_images(self, features: Tensor, image_kv: ImageKV, index: Tensor) -> ImageKV:
        """Cross-attention K/V of the images `index` (B,) names in the joint batch."""
        if world_size() == 1:
            return image_kv.select(index)
        joint = gather_with_gradient(features) if features.requires_grad else gather(features)
        return self.model.image_kv(joint[index])

    def _itg(self, read: QueryOutput, tokens: Tokens) -> Tensor:
        captions = replace_first(tokens, self.dec_id)
        logits = self.model.caption_logits(captions.ids[:, :-1], read)
        return lm_loss(logits, next_token_labels(captions.ids, captions.mask), self.config.label_smoothing)
