"""BLIP's tasks with ITC: retrieval of texts, images and videos, and pre-training (BLIP sections 3.2, 5.1 and 5.6).

Fine-tuned for retrieval on clean pairs, a model is the filter of CapFilt (section 3.3).

B local batch, G joint batch of all processes, F frames, N image tokens, T text tokens, D width, E embedding width, V
vocabulary.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from openblip.data.batch import ImageTextBatch
from openblip.distributed import gather
from openblip.models.blip import Blip, encode_media
from openblip.models.config import PRETRAINING_HEADS, Head
from openblip.objectives import (
    ContrastiveKeys,
    EmbeddingQueue,
    alpha_at,
    clamp_temperature,
    itc_loss,
    lm_loss,
    next_token_labels,
    update_average,
)
from openblip.tasks.base import BlipTask, hard_negatives_loss, replace_first
from openblip.tasks.config import PretrainingConfig, RetrievalConfig


class Retrieval(BlipTask):
    """ITC and ITM over a BLIP; inference never sees their momentum model and queue."""

    config: RetrievalConfig | PretrainingConfig
    trained_heads: ClassVar[tuple[Head, ...]] = ("itc", "itm")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.momentum_model = _make_momentum_model(self.model)
        self.queue = EmbeddingQueue(self.config.contrastive.queue_size, self.model.config.embed_dim)
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, batch: ImageTextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses itc and itm."""
        pixels = self.preprocessing.normalize(batch.pixels)
        image_tokens = encode_media(self.model.encode_image, pixels)
        itc, similarities = self.contrastive_loss(batch, pixels, image_tokens, step)
        image_kv = self.model.image_kv(image_tokens)
        texts = replace_first(batch.tokens, self.tokenizer.enc_id)
        pairs = (texts, image_tokens, image_kv, batch.image_ids)
        return {"itc": itc, "itm": hard_negatives_loss(self.model, *pairs, similarities, generator)}

    def contrastive_loss(
        self, batch: ImageTextBatch, pixels: Tensor, image_tokens: Tensor, step: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """ITC, and the similarities over temperature of images to texts and of texts to images of the joint batch,
        both (B, G), by which ITM chooses its negatives.

        pixels: the batch's, normalised. image_tokens: (B, F*N, D), what the model's image encoder makes of them.
        """
        tokens, ids, temperature = batch.tokens, batch.image_ids, self.model.temperature
        settings = self.config.contrastive
        frames = pixels.shape[1] if pixels.dim() == 5 else 1
        image = self.model.embed_image(image_tokens, frames)  # (B, E)
        text = self.model.embed_text(tokens.ids, tokens.mask)  # (B, E)
        with torch.no_grad():
            momentum_tokens = encode_media(self.momentum_model.encode_image, pixels)
            momentum_image = self.momentum_model.embed_image(momentum_tokens, frames)
            momentum_text = self.momentum_model.embed_text(tokens.ids, tokens.mask)
        joint = (gather(momentum_image), gather(momentum_text), gather(ids))
        self._pending.append(joint)
        keys = ContrastiveKeys(*(torch.cat(pair) for pair in zip(joint, self.queue.content(), strict=True)))
        alpha = alpha_at(step, settings.alpha, settings.alpha_ramp_steps)
        loss = itc_loss(image, text, momentum_image, momentum_text, ids, keys, temperature, alpha)
        with torch.no_grad():
            return loss, (image @ joint[1].T / temperature, text @ joint[0].T / temperature)

    def after_step(self) -> None:
        """Clamp the temperature, let the momentum model follow, and queue the embeddings of this step."""
        clamp_temperature(self.model.log_temperature)
        trained, average = (dict(model.named_parameters()) for model in (self.model, self.momentum_model))
        momentum = self.config.contrastive.momentum
        update_average(average.values(), (trained[name] for name in average), momentum)
        for images, texts, ids in self._pending:
            self.queue.put(images, texts, ids)
        self._pending.clear()


def _make_momentum_model(model: Blip) -> Blip:
    """A frozen copy of what ITC needs: vision, text encoder and the two projections.

    It has no dropout, also while the task trains: the released code leaves it on, which only adds noise to the targets.
    """
    vision = replace(model.config.vision, drop_path=0.0)
    text = replace(model.config.text, dropout=0.0)
    momentum_model = Blip(replace(model.config, vision=vision, text=text, heads=("itc",)))
    weights = model.state_dict()
    momentum_model.load_state_dict({name: weights[name] for name in momentum_model.state_dict()})
    return momentum_model.requires_grad_(False).eval()


class Pretraining(Retrieval):
    """What retrieval trains, and LM over the same images."""

    config: PretrainingConfig
    trained_heads = PRETRAINING_HEADS

    def forward(self, batch: ImageTextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses itc, itm and lm."""
        pixels = self.preprocessing.normalize(batch.pixels)
        image_tokens = encode_media(self.model.encode_image, pixels)  # once for all three
        image_kv = self.model.image_kv(image_tokens)
        itc, similarities = self.contrastive_loss(batch, pixels, image_tokens, step)
        texts = replace_first(batch.tokens, self.tokenizer.enc_id)
        pairs = (texts, image_tokens, image_kv, batch.image_ids)
        itm = hard_negatives_loss(self.model, *pairs, similarities, generator)
        if not self.model.shares_cross_attention:
            image_kv = self.model.image_kv(image_tokens, "decode")
        captions = replace_first(batch.tokens, self.tokenizer.dec_id)
        logits = self.model.decode(captions.ids[:, :-1], image_kv)  # (B, T - 1, V)
        labels = next_token_labels(captions.ids, captions.mask)
        return {"itc": itc, "itm": itm, "lm": lm_loss(logits, labels, self.config.label_smoothing)}
