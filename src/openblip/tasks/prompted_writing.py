"""Fine-tuning BLIP-2 on questions and instructions (BLIP-2 section 4.3; InstructBLIP section 2.2).

The language model writes answers behind a prompt; where the model is instructed, the Q-Former reads the
question as well, so that its queries draw from the image what it asks about.

B images, R rows of text, Q queries, T text tokens, D width of the Q-Former, Dl of the language model,
V vocabulary.
"""

import torch
from torch import Tensor

from openblip.data.batch import PromptedBatch
from openblip.data.transforms import Preprocessing
from openblip.models.blip2 import Blip2
from openblip.models.language_model import Predicted
from openblip.objectives.language_modeling import answer_loss, lm_loss
from openblip.tasks.blip2_task import Blip2Task


class PromptedWriting(Blip2Task):
    """A model with the head llm, and what its language model says of texts behind prompts."""

    def __init__(self, model: Blip2, preprocessing: Preprocessing) -> None:
        super().__init__(model, preprocessing)
        if model.config.instructed and set(model.config.heads) == {"llm"}:
            # What becomes of the instruction behind the last layer is read by nobody, and gets no gradient.
            model.qformer.layers[-1].text_feed_forward.requires_grad_(False)

    def predicted(self, batch: PromptedBatch) -> Predicted:
        """Logits (R, T, V) and labels (R, T) of a batch's texts; each image is encoded once."""
        image_kv = self.model.image_kv(self.features(batch.pixels))
        if batch.instructions is None:
            read = self.model.visual_prompts(self.model.encode_queries(image_kv).queries)  # (B, Q, Dl)
            return self.model.predict_text(read[batch.owners], batch.prompts, batch.texts)
        ids, mask = batch.instructions.ids, batch.instructions.mask
        queries = self.model.encode_multimodal(ids, mask, image_kv.select(batch.owners))  # (R, Q, D)
        return self.model.predict_text(self.model.visual_prompts(queries), batch.prompts, batch.texts)


class PromptedAnswering(PromptedWriting):
    """Questions with all their answers, each of which counts by its weight."""

    def forward(self, batch: PromptedBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss vqa of a batch, a scalar, as BLIP's: the paper names none of its own."""
        logits, labels = self.predicted(batch)
        return {"vqa": answer_loss(logits, labels, batch.weights, len(batch), label_smoothing=0.0)}


class InstructionFollowing(PromptedWriting):
    """Conversations, in which every token of every answer counts alike."""

    def forward(self, batch: PromptedBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss lm of a batch, a scalar."""
        logits, labels = self.predicted(batch)
        return {"lm": lm_loss(logits, labels, label_smoothing=0.0)}
