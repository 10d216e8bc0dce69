"""Training a language model on text alone, before BLIP-2 freezes it, and examining what it has learned.

R texts, Dl width of the language model.
"""

import torch
from torch import Tensor

from openblip.data.batch import TextBatch
from openblip.models.language_model import LanguageModel
from openblip.objectives.language_modeling import lm_loss
from openblip.tasks.config import LanguagePretrainingConfig
from openblip.tasks.prefix_split import split_documents
from openblip.tasks.protocol import TrainingTask


class LanguagePretraining(TrainingTask):
    """A language model and its loss: of all words, or of an encoder-decoder of what follows a prefix."""

    def __init__(self, language: LanguageModel, config: LanguagePretrainingConfig) -> None:
        super().__init__()
        self.language = language
        self.max_text_tokens = config.max_text_tokens

    def forward(self, batch: TextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss lm of a batch, a scalar."""
        pairs = list(zip(batch.prompts, batch.texts, strict=True))
        if self.language.is_encoder_decoder:
            pairs = split_documents(batch.texts, generator)
        prompts, texts = zip(*pairs, strict=True)
        nothing_seen = no_visual(self.language, len(texts))
        logits, labels = self.language.predict(nothing_seen, prompts, texts, self.max_text_tokens)
        return {"lm": lm_loss(logits, labels, label_smoothing=0.0)}


def no_visual(language: LanguageModel, num_rows: int) -> Tensor:
    """The visual prompts (R, 0, Dl) of texts without pictures."""
    return torch.zeros(num_rows, 0, language.hidden_dim, dtype=language.dtype, device=language.device)
