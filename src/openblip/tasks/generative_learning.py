"""Stage 2 of BLIP-2: the queries learn to be read by a frozen language model (BLIP-2 section 3.3).

With a prompt before every caption, this is fine-tuning for captioning (section 4.2).

B images, Q queries, T text tokens, D width of the Q-Former, Dl of the language model, V vocabulary.
"""

import torch
from torch import Tensor

from openblip.data.batch import TextBatch
from openblip.objectives.language_modeling import lm_loss
from openblip.tasks.blip2_task import Blip2Task
from openblip.tasks.prefix_split import split_prefixes


class GenerativeLearning(Blip2Task):
    """A model with the head llm, and the loss of texts after its soft visual prompts."""

    def forward(self, batch: TextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss lm of a batch, a scalar: of its texts, token by token, after their prompts.

        What an encoder-decoder reads before a text without prompt is its own beginning, cut off at random.
        """
        prompts, texts = batch.prompts, batch.texts
        if self.model.require_language().is_encoder_decoder and not any(prompts):
            prompts, texts = split_prefixes(texts, generator)
        queries = self.model.encode_queries(
            self.model.image_kv(self.features(batch.pixels))
        ).queries  # (B, Q, D)
        predicted = self.model.predict_text(self.model.visual_prompts(queries), prompts, texts)
        return {"lm": lm_loss(predicted.logits, predicted.labels, label_smoothing=0.0)}
