"""Captioning: fine-tuning with LM on clean pairs, after a prompt (BLIP section 5.2), as CapFilt's captioner (3.3).

B examples, P tokens of the prompt, T text tokens.
"""

from typing import Any

import torch
from torch import Tensor

from openblip.data.batch import ImageTextBatch
from openblip.data.config import DataConfig
from openblip.data.tokenizer import Tokenizer
from openblip.objectives import lm_loss, next_token_labels
from openblip.tasks.base import BlipTask
from openblip.tasks.config import CaptioningConfig


class Captioning(BlipTask):
    """LM over a BLIP."""

    config: CaptioningConfig
    trained_heads = ("lm",)
    prompt_ids: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("prompt_ids", self.tokenizer.prompt(self.config.prompt), persistent=False)

    @classmethod
    def longest_text(cls, config: CaptioningConfig, data: DataConfig, tokenizer: Tokenizer) -> int:
        # The prompt takes the place of [CLS], and [SEP] is only predicted.
        return data.max_text_length + len(tokenizer.prompt(config.prompt)) - 2

    def forward(self, batch: ImageTextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss lm; [DEC] and the prompt are not predicted."""
        image_kv = self.model.image_kv(self.encode(batch.pixels), "decode")
        prompt = self.prompt_ids.expand(len(batch), -1)  # (B, P), from [DEC]
        ids = torch.cat([prompt, batch.tokens.ids[:, 1:]], dim=1)  # (B, P + T - 1)
        mask = torch.cat([torch.ones_like(prompt, dtype=torch.bool), batch.tokens.mask[:, 1:]], dim=1)
        labels = next_token_labels(ids, mask, prompt_length=prompt.shape[1])
        logits = self.model.decode(ids[:, :-1], image_kv)
        return {"lm": lm_loss(logits, labels, self.config.label_smoothing)}
