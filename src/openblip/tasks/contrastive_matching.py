"""ITC and ITM over one batch, with their momentum twin and queue: what pre-training and retrieval share.

B local batch, G joint batch of all processes, N image tokens, T text tokens, D width, E embedding width.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from openblip.data.tokenizer import Tokens
from openblip.distributed import gather, gather_with_gradient, world_size
from openblip.models.blip import Blip, CrossKV
from openblip.objectives.contrastive import ContrastiveKeys, alpha_at, clamp_temperature, itc_loss
from openblip.objectives.momentum import EmbeddingQueue, update_average
from openblip.tasks.config import ContrastiveConfig
from openblip.tasks.hard_negatives import hard_negatives_loss
from openblip.tasks.media import encode_media, num_frames
from openblip.tasks.tokens import replace_first


class ContrastiveMatching(nn.Module):
    """The objectives ITC and ITM around a model; inference never sees the twin and the queue."""

    def __init__(self, model: Blip, config: ContrastiveConfig, enc_id: int) -> None:
        super().__init__()
        self.config = config
        self.enc_id = enc_id
        self.twin = make_twin(model)
        self.queue = EmbeddingQueue(config.queue_size, model.config.embed_dim)
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    def itc(
        self, model: Blip, pixels: Tensor, image_tokens: Tensor, tokens: Tokens, ids: Tensor, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The ITC loss, and the similarities over temperature of images to texts and of texts to images of
        the joint batch, both (B, G), by which ITM mines its negatives."""
        frames = num_frames(pixels)
        image = model.embed_image(image_tokens, frames)
        text = model.embed_text(tokens.ids, tokens.mask)
        with torch.no_grad():
            momentum_image = self.twin.embed_image(encode_media(self.twin, pixels), frames)
            momentum_text = self.twin.embed_text(tokens.ids, tokens.mask)
        batch = (gather(momentum_image), gather(momentum_text), gather(ids))
        self._pending.append(batch)
        keys = ContrastiveKeys(*(torch.cat(pair) for pair in zip(batch, self.queue.content(), strict=True)))
        alpha = alpha_at(step, self.config.alpha, self.config.alpha_ramp_steps)
        loss = itc_loss(image, text, momentum_image, momentum_text, ids, keys, model.temperature, alpha)
        with torch.no_grad():
            image_to_text = image @ batch[1].T / model.temperature
            text_to_image = text @ batch[0].T / model.temperature
        return loss, image_to_text, text_to_image

    def itm(
        self,
        model: Blip,
        image_tokens: Tensor,
        image_kv: CrossKV,
        tokens: Tokens,
        ids: Tensor,
        similarities: tuple[Tensor, Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """The ITM loss, over every pair and hard negatives from the joint batch of all processes.

        The released pre-training code draws negatives from the process's own batch; with one process that
        is the same.
        """
        return hard_negatives_loss(
            model.match_logits,
            replace_first(tokens, self.enc_id),
            image_kv,
            lambda index: negative_images(model, image_tokens, image_kv, index),
            ids,
            similarities,
            generator,
        )

    def after_step(self, model: Blip) -> None:
        """Clamp the temperature, let the twin follow, and queue what this step's batches embedded."""
        clamp_temperature(model.log_temperature)
        own = dict(model.named_parameters())
        twin = dict(self.twin.named_parameters())
        update_average(twin.values(), (own[name] for name in twin), self.config.momentum)
        for images, texts, ids in self._pending:
            self.queue.put(images, texts, ids)
        self._pending.clear()


def make_twin(model: Blip) -> Blip:
    """A frozen copy of what ITC needs: vision, text encoder and the two projections.

    It has no dropout, also while the task trains: the released code leaves it on, which only adds noise to
    the targets.
    """
    vision = replace(model.config.vision, drop_path=0.0)
    text = replace(model.config.text, dropout=0.0)
    twin = Blip(replace(model.config, vision=vision, text=text, heads=("itc",)))
    own = model.state_dict()
    twin.load_state_dict({name: own[name] for name in twin.state_dict()})
    return twin.requires_grad_(False).eval()


def negative_images(model: Blip, image_tokens: Tensor, image_kv: CrossKV, index: Tensor) -> CrossKV:
    """Cross-attention K/V of the images `index` (B,) names in the joint batch, gradients to their makers."""
    if world_size() == 1:
        return image_kv.select(index)
    return model.image_kv(gather_with_gradient(image_tokens)[index], "encode")
