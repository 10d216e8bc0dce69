"""Captioning: LM fine-tuned on clean pairs, after a prompt, and how captions are measured (BLIP section 5.2).

So fine-tuned, a model is the captioner of CapFilt (section 3.3).
"""

import torch
from torch import Tensor

from openblip.data.batch import Batch
from openblip.data.tokenizer import Tokenizer
from openblip.data.transforms import Preprocessing
from openblip.models.blip import Blip
from openblip.objectives.language_modeling import lm_loss, next_token_labels
from openblip.tasks.config import CaptioningConfig
from openblip.tasks.media import encode_media
from openblip.tasks.protocol import TrainingTask


class Captioning(TrainingTask):
    """A model with the head lm, and the loss that trains it."""

    prompt_ids: Tensor

    def __init__(
        self, model: Blip, tokenizer: Tokenizer, preprocessing: Preprocessing, config: CaptioningConfig
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        self.label_smoothing = config.label_smoothing
        self.register_buffer("prompt_ids", tokenizer.prompt(config.prompt), persistent=False)

    def forward(self, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss lm of a batch, a scalar; [DEC] and the prompt are not predicted."""
        image_tokens = encode_media(self.model, self.preprocessing.normalize(batch.pixels))
        image_kv = self.model.image_kv(image_tokens, "decode")
        prompt = self.prompt_ids.expand(len(batch.captions), -1)  # (B, P), from [DEC]
        ids = torch.cat([prompt, batch.tokens.ids[:, 1:]], dim=1)
        mask = torch.cat([torch.ones_like(prompt, dtype=torch.bool), batch.tokens.mask[:, 1:]], dim=1)
        labels = next_token_labels(ids, mask, prompt_length=prompt.shape[1])
        lm = lm_loss(self.model.decode(ids[:, :-1], image_kv), labels, self.label_smoothing)
        return {"lm": lm}
