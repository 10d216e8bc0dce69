"""Stage 2 of BLIP-2: the queries learn to be read by a frozen language model (BLIP-2 section 3.3).

R rows of text, Q queries, T text tokens, D width of the Q-Former, Dl of the language model, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openblip.data.batch import TextBatch
from openblip.data.transforms import Preprocessing
from openblip.models.blip2 import Blip2
from openblip.objectives.language_modeling import lm_loss
from openblip.tasks.image_features import image_features
from openblip.tasks.prefix_split import split_prefixes
from openblip.tasks.protocol import TrainingTask


class GenerativeLearning(TrainingTask):
    """A model with the head llm, and the loss of texts after its soft visual prompts."""

    def __init__(self, model: Blip2, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing

    def forward(self, batch: TextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss lm of a batch, a scalar: of whole texts, or of what follows a random prefix."""
        language = self.model.require_language()
        prompts, texts = batch.prompts, batch.texts
        if language.is_encoder_decoder:
            prompts, texts = split_prefixes(texts, generator)
        return {"lm": writing_loss(self.model, self.preprocessing, batch.pixels, prompts, texts)}

    def frozen_parts(self) -> Sequence[nn.Module]:
        """The image encoder and the language model, where they are frozen."""
        return self.model.frozen_parts()


def writing_loss(
    model: Blip2,
    preprocessing: Preprocessing,
    pixels: Tensor,
    prompts: Sequence[str],
    texts: Sequence[str],
) -> Tensor:
    """Cross-entropy of texts after the images' visual prompts and prompts in words, over their tokens."""
    image_kv = model.image_kv(image_features(model, preprocessing, pixels))
    queries = model.read_images(image_kv).queries  # (R, Q, D)
    predicted = model.predict_text(model.visual_prompts(queries), prompts, texts)
    return lm_loss(predicted.logits, predicted.labels, label_smoothing=0.0)
