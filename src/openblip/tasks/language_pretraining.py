"""Training a language model on text alone, before BLIP-2 freezes it.

R texts, Dl width of the language model.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openblip.data.batch import PixelReader, SampleProcessor, View
from openblip.data.config import DataConfig
from openblip.data.sample import Sample
from openblip.data.texts import text_field
from openblip.models.language_model import LanguageModel
from openblip.objectives.language_modeling import lm_loss
from openblip.tasks.base import Task, TextBatch, TextBatchProcessor
from openblip.tasks.config import LanguagePretrainingConfig
from openblip.tasks.prefix_split import split_documents


def no_pixels(sample: Sample, view: View, rng: np.random.Generator) -> np.ndarray:
    """The empty array that stands for the image of a text; no image is decoded."""
    return np.empty(0, np.uint8)


@dataclass(frozen=True, kw_only=True)
class TextProcessor(TextBatchProcessor):
    """The field `text`, unchanged and with its line breaks, without the sample's image."""

    read_pixels: PixelReader = no_pixels

    def content(self, sample: Sample, rng: np.random.Generator) -> str:
        return text_field(sample, "text")


class LanguagePretraining(Task):
    """A language model and its loss: over all tokens, or with an encoder over those that follow a prefix."""

    config: LanguagePretrainingConfig
    model: LanguageModel

    @classmethod
    def sample_processor(cls, config: Any, data: DataConfig, question_prompt: str) -> SampleProcessor:
        return TextProcessor()

    def forward(self, batch: TextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss lm: cross-entropy, the mean over tokens."""
        pairs = list(zip(batch.prompts, batch.texts, strict=True))
        if self.model.is_encoder_decoder:
            pairs = split_documents(batch.texts, generator)
        prompts, texts = zip(*pairs, strict=True)
        visual = no_visual(self.model, len(texts))
        logits, labels = self.model.predict(visual, prompts, texts, self.config.max_text_tokens)
        return {"lm": lm_loss(logits, labels, label_smoothing=0.0)}


def no_visual(language: LanguageModel, num_rows: int) -> Tensor:
    """The visual prompts (R, 0, Dl) of texts without images."""
    return torch.zeros(num_rows, 0, language.hidden_dim, dtype=language.dtype, device=language.device)
