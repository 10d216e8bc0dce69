"""Stage 2 of BLIP-2: a frozen language model learns to be prompted by the queries (BLIP-2 section 3.3).

With a prompt before every caption, this is fine-tuning for captioning (section 4.2).

B examples, Q queries, D width of the Q-Former.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openblip.data.batch import SampleProcessor, pixel_reader
from openblip.data.config import DataConfig
from openblip.data.sample import Sample
from openblip.data.texts import draw_caption
from openblip.objectives.language_modeling import lm_loss
from openblip.tasks.base import Blip2Task, TextBatch, TextBatchProcessor
from openblip.tasks.config import Blip2Stage2Config
from openblip.tasks.prefix_split import split_prefixes


@dataclass(frozen=True, kw_only=True)
class PromptedCaptionProcessor(TextBatchProcessor):
    """An image or video with one of its captions, drawn at random, after a prompt that all have in common."""

    def content(self, sample: Sample, rng: np.random.Generator) -> str:
        return draw_caption(sample, rng)


class Blip2Stage2(Blip2Task):
    """The loss of texts that the language model of a BLIP-2 writes after visual prompts."""

    trained_heads = ("llm",)

    @classmethod
    def sample_processor(cls, config: Blip2Stage2Config, data: DataConfig, question_prompt: str) -> SampleProcessor:
        return PromptedCaptionProcessor(read_pixels=pixel_reader(data.num_frames), prompt=config.prompt)

    def forward(self, batch: TextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss lm: cross-entropy of the texts after their prompts, the mean over tokens.

        Without a prompt, the encoder of an encoder-decoder reads the beginning of each text, cut off at random, and the
        decoder writes the rest.
        """
        prompts, texts = batch.prompts, batch.texts
        if self.model.require_language().is_encoder_decoder and not any(prompts):
            prompts, texts = split_prefixes(texts, generator)
        image_kv = self.model.image_kv(self.encode(batch.pixels))
        queries = self.model.encode_queries(image_kv).queries  # (B, Q, D)
        predicted = self.model.predict_text(self.model.visual_prompts(queries), prompts, texts)
        return {"lm": lm_loss(predicted.logits, predicted.labels, label_smoothing=0.0)}
