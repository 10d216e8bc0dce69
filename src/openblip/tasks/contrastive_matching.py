"""ITC and ITM with momentum model and queue: what pre-training and retrieval share.

The part of ITM that draws hard negatives serves BLIP-2 as well.

B local batch, G joint batch of all processes, R texts, F frames, N image tokens, T text tokens, D width, E embedding
width.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.data.batch import ImageTextBatch
from openblip.data.tokenizer import Tokenizer, Tokens
from openblip.data.transforms import Preprocessing
from openblip.distributed import gather, gather_padded, gather_with_gradient, world_size
from openblip.models.blip import Blip, CrossKV
from openblip.objectives.contrastive import ContrastiveKeys, alpha_at, clamp_temperature, itc_loss
from openblip.objectives.matching import draw_negatives, itm_loss, negative_weights
from openblip.objectives.momentum import EmbeddingQueue, update_average
from openblip.tasks.base import BlipTask, encode_media, replace_first
from openblip.tasks.config import PretrainingConfig, RetrievalConfig


class ContrastiveMatchingTask(BlipTask):
    """A task with the objectives ITC and ITM; inference never sees its momentum model and queue."""

    config: PretrainingConfig | RetrievalConfig

    def __init__(
        self,
        config: PretrainingConfig | RetrievalConfig,
        model: Blip,
        tokenizer: Tokenizer,
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__(config, model, tokenizer, preprocessing)
        self.momentum_model = make_momentum_model(model)
        self.queue = EmbeddingQueue(config.contrastive.queue_size, model.config.embed_dim)
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    def contrastive_matching_losses(
        self,
        batch: ImageTextBatch,
        pixels: Tensor,
        image_tokens: Tensor,
        step: int,
        generator: torch.Generator,
        image_kv: CrossKV | None = None,
    ) -> dict[str, Tensor]:
        """The losses itc and itm.

        ITM is over every pair and hard negatives from the joint batch of all processes. The released
        pre-training code draws negatives from the process's own batch; with one process that is the same.

        Args:
            batch: B pairs.
            pixels: its pixels, normalised.
            image_tokens: (B, F*N, D), what the model's image encoder makes of them.
            step: number of finished steps, on which alpha depends.
            generator: draws the negatives.
            image_kv: `model.image_kv` of the image tokens for "encode", where the caller has it already.
        """
        itc, similarities = self._itc(batch, pixels, image_tokens, step)
        local_kv = self.model.image_kv(image_tokens, "encode") if image_kv is None else image_kv

        def negative_kv(index: Tensor) -> CrossKV:
            if world_size() == 1:
                return local_kv.select(index)
            return self.model.image_kv(gather_with_gradient(image_tokens)[index], "encode")

        texts = replace_first(batch.tokens, self.tokenizer.enc_id)
        itm = hard_negatives_loss(
            self.model.match_logits, texts, local_kv, negative_kv, batch.image_ids, similarities, generator
        )
        return {"itc": itc, "itm": itm}

    def _itc(
        self, batch: ImageTextBatch, pixels: Tensor, image_tokens: Tensor, step: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The ITC loss, and the similarities over temperature of images to texts and of texts to images of
        the joint batch, both (B, G), by which ITM chooses its negatives."""
        tokens, ids, temperature = batch.tokens, batch.image_ids, self.model.temperature
        settings = self.config.contrastive
        frames = pixels.shape[1] if pixels.dim() == 5 else 1
        image = self.model.embed_image(image_tokens, frames)  # (B, E)
        text = self.model.embed_text(tokens.ids, tokens.mask)  # (B, E)
        with torch.no_grad():
            momentum_tokens = encode_media(self.momentum_model, pixels)
            momentum_image = self.momentum_model.embed_image(momentum_tokens, frames)
            momentum_text = self.momentum_model.embed_text(tokens.ids, tokens.mask)
        joint = (gather(momentum_image), gather(momentum_text), gather(ids))
        self._pending.append(joint)
        keys = ContrastiveKeys(*(torch.cat(pair) for pair in zip(joint, self.queue.content(), strict=True)))
        alpha = alpha_at(step, settings.alpha, settings.alpha_ramp_steps)
        loss = itc_loss(image, text, momentum_image, momentum_text, ids, keys, temperature, alpha)
        with torch.no_grad():
            image_to_text = image @ joint[1].T / temperature
            text_to_image = text @ joint[0].T / temperature
        return loss, (image_to_text, text_to_image)

    def after_step(self) -> None:
        """Clamp the temperature, let the momentum model follow, and queue the embeddings of this step."""
        clamp_temperature(self.model.log_temperature)
        trained = dict(self.model.named_parameters())
        average = dict(self.momentum_model.named_parameters())
        momentum = self.config.contrastive.momentum
        update_average(average.values(), (trained[name] for name in average), momentum)
        for images, texts, ids in self._pending:
            self.queue.put(images, texts, ids)
        self._pending.clear()


def make_momentum_model(model: Blip) -> Blip:
    """A frozen copy of what ITC needs: vision, text encoder and the two projections.

    It has no dropout, also while the task trains: the released code leaves it on, which only adds noise to
    the targets.
    """
    vision = replace(model.config.vision, drop_path=0.0)
    text = replace(model.config.text, dropout=0.0)
    momentum_model = Blip(replace(model.config, vision=vision, text=text, heads=("itc",)))
    weights = model.state_dict()
    momentum_model.load_state_dict({name: weights[name] for name in momentum_model.state_dict()})
    return momentum_model.requires_grad_(False).eval()


def hard_negatives_loss(
    match_logits: Callable[[Tensor, Tensor, Any], Tensor],
    texts: Tokens,
    image_kv: Any,
    negative_kv: Callable[[Tensor], Any],
    ids: Tensor,
    similarities: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> Tensor:
    """ITM over every pair as positive, one hard negative text per image and one hard negative image per text.

    Args:
        match_logits: ids (R, T), mask (R, T) and cross-attention K/V of B images -> (R, 2).
        texts: (B, T), beginning as `match_logits` needs them.
        image_kv: cross-attention K/V of the B images.
        negative_kv: the same of the images that an index (B,) names in the joint batch, with gradients to
            the processes that hold them.
        ids: (B,) image ids.
        similarities: over temperature, of images to texts and of texts to images of the joint batch, (B, G).
        generator: in the same state on every process.
    """
    image_to_text, text_to_image = similarities
    joint_ids = gather(ids)
    text_index, has_text = draw_negatives(negative_weights(image_to_text, ids, joint_ids), generator)
    image_index, has_image = draw_negatives(negative_weights(text_to_image, ids, joint_ids), generator)

    joint_texts = Tokens(gather_padded(texts.ids, 0), gather_padded(texts.mask, False))
    negative_texts = Tokens(joint_texts.ids[text_index], joint_texts.mask[text_index])
    of_image = interleave(texts, negative_texts)
    text_logits = match_logits(of_image.ids, of_image.mask, image_kv)  # (2B, 2)
    image_logits = match_logits(texts.ids, texts.mask, negative_kv(image_index))  # (B, 2)

    labels = torch.tensor([1, 0], device=ids.device).repeat(len(ids))
    counted = torch.stack([torch.ones_like(has_text), has_text], dim=1).flatten()
    return itm_loss(
        torch.cat([text_logits, image_logits]),
        torch.cat([labels, torch.zeros_like(ids)]),
        torch.cat([counted, has_image]),
    )


def interleave(first: Tokens, second: Tokens) -> Tokens:
    """Two sets of B texts -> (2B, T): first[0], second[0], first[1], ..., padded to the longer."""
    length = max(first.ids.shape[1], second.ids.shape[1])
    ids = [F.pad(t.ids, (0, length - t.ids.shape[1])) for t in (first, second)]
    mask = [F.pad(t.mask, (0, length - t.mask.shape[1])) for t in (first, second)]
    return Tokens(torch.stack(ids, dim=1).flatten(0, 1), torch.stack(mask, dim=1).flatten(0, 1))
