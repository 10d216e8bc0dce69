"""Tasks with ITC and ITM: retrieval and pre-training of BLIP, stage 1 of BLIP-2.

BLIP sections 3.2, 5.1 and 5.6; fine-tuned for retrieval on clean pairs, a model is the filter of CapFilt (section 3.3).
BLIP-2 section 3.2; with the image encoder trained as well, stage 1 is fine-tuning for retrieval (section 4.4).

B local batch, G joint batch of all processes, F frames, Q queries, N image tokens, T text tokens, D width, E embedding
width, V vocabulary.
"""

from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip import objectives
from openblip.data.batch import ImageTextBatch
from openblip.data.config import DataConfig, Preprocessing
from openblip.data.tokenizer import Tokenizer, Tokens
from openblip.distributed import gather, gather_padded, gather_with_gradient, local_rows, world_size
from openblip.errors import ConfigError
from openblip.models.blip import Blip, CrossKV, encode_media, similarity_matrix
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Head, Head
from openblip.tasks.base import Blip2Task, BlipTask, replace_first
from openblip.tasks.config import (
    Blip2Stage1Config,
    ContrastiveConfig,
    InBatchConfig,
    PretrainingConfig,
    RetrievalConfig,
)

Similarities = tuple[Tensor, Tensor]
"""Over temperature, of images to texts and of texts to images of the joint batch, both (B, G)."""


class Pretraining(BlipTask):
    """ITC, ITM, LM and MLM, or some of them, over a BLIP; inference never sees their momentum model and queue."""

    config: PretrainingConfig | RetrievalConfig
    momentum_model: Blip | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings, self.momentum_model = self.config.contrastive, None
        taught: tuple[Head, ...] = tuple(head for head in self.config.objectives if head in ("itc", "mlm"))
        if isinstance(settings, ContrastiveConfig) and taught:
            self.momentum_model = _make_momentum_model(self.model, taught)
            queue_size = settings.queue_size if "itc" in taught else 0
            self.queue = objectives.EmbeddingQueue(queue_size, self.model.config.embed_dim)
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    @classmethod
    def heads(cls, config: PretrainingConfig | RetrievalConfig) -> tuple[Head, ...]:
        return config.objectives

    @classmethod
    def build(cls, config: Any, data: DataConfig, model: Any, tokenizer: Any, preprocessing: Preprocessing) -> Self:
        if "mlm" in config.objectives and tokenizer.mask_id is None:
            raise ConfigError(
                "The vocabulary has no [MASK], which stands for the words that mlm hides: choose another."
            )
        return super().build(config, data, model, tokenizer, preprocessing)

    def forward(self, batch: ImageTextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A loss for each of the objectives, by its name."""
        pixels = self.preprocessing.normalize(batch.pixels)
        image_tokens = encode_media(self.model.encode_image, pixels)  # once for all
        momentum_tokens = None
        if self.momentum_model is not None:
            with torch.no_grad():
                momentum_tokens = encode_media(self.momentum_model.encode_image, pixels)
        losses: dict[str, Tensor] = {}
        similarities = image_kv = None
        texts = replace_first(batch.tokens, self.tokenizer.enc_id)
        if "itc" in self.config.objectives:
            num_frames = pixels.shape[1] if pixels.dim() == 5 else 1
            losses["itc"], similarities = self.contrastive_loss(batch, image_tokens, momentum_tokens, num_frames, step)
        if {"itm", "mlm"} & set(self.config.objectives):
            image_kv = self.model.image_kv(image_tokens)
        if "itm" in self.config.objectives:
            assert image_kv is not None
            pairs = (texts, image_tokens, image_kv, batch.image_ids)
            by = similarities if self.config.negatives == "hard" else None
            losses["itm"] = matching_loss(self.model, *pairs, by, generator)
        if "mlm" in self.config.objectives:
            assert image_kv is not None
            losses["mlm"] = self._masked_loss(texts, image_kv, momentum_tokens, step, generator)
        if isinstance(self.config, PretrainingConfig) and "lm" in self.config.objectives:
            if image_kv is None or not self.model.shares_cross_attention:
                image_kv = self.model.image_kv(image_tokens, "decode")
            captions = replace_first(batch.tokens, self.tokenizer.dec_id)
            logits = self.model.decode(captions.ids[:, :-1], image_kv)  # (B, T - 1, V)
            labels = objectives.next_token_labels(captions.ids, captions.mask)
            losses["lm"] = objectives.lm_loss(logits, labels, self.config.label_smoothing)
        return losses

    def contrastive_loss(
        self, batch: ImageTextBatch, image_tokens: Tensor, momentum_tokens: Tensor | None, num_frames: int, step: int
    ) -> tuple[Tensor, Similarities]:
        """ITC, and the similarities by which ITM chooses its negatives.

        image_tokens, momentum_tokens: (B, F*N, D), what the image encoders of model and momentum model make of a batch.
        """
        tokens, ids, temperature = batch.tokens, batch.image_ids, self.model.temperature
        image = self.model.embed_image(image_tokens, num_frames)  # (B, E)
        text = self.model.embed_text(tokens.ids, tokens.mask)  # (B, E)
        settings = self.config.contrastive
        if isinstance(settings, InBatchConfig):
            return in_batch_loss(image, text, ids, temperature, settings.label_smoothing)
        assert self.momentum_model is not None  # made with these settings
        assert momentum_tokens is not None
        with torch.no_grad():
            momentum_image = self.momentum_model.embed_image(momentum_tokens, num_frames)
            momentum_text = self.momentum_model.embed_text(tokens.ids, tokens.mask)
        joint = (gather(momentum_image), gather(momentum_text), gather(ids))
        self._pending.append(joint)
        keys = [torch.cat(pair) for pair in zip(joint, self.queue.content(), strict=True)]
        alpha = objectives.alpha_at(step, settings.alpha, settings.alpha_ramp_steps)
        loss = objectives.itc_loss(image, text, momentum_image, momentum_text, ids, keys, temperature, alpha)
        with torch.no_grad():
            return loss, (image @ joint[1].T / temperature, text @ joint[0].T / temperature)

    def _masked_loss(
        self, texts: Tokens, image_kv: CrossKV, momentum_tokens: Tensor | None, step: int, generator: torch.Generator
    ) -> Tensor:
        """MLM of texts (B, T) from [ENC]. Processes hide the tokens that one process would hide."""
        size, length = texts.ids.shape
        shape = size * world_size(), self.model.config.text.max_positions, 3
        uniform = local_rows(torch.rand(shape, generator=generator), size)[:, :length]
        can_hide = texts.mask & (texts.ids != self.tokenizer.enc_id) & (texts.ids != self.tokenizer.sep_id)
        assert self.tokenizer.mask_id is not None  # `build` has seen to it
        uniform = uniform.to(texts.ids.device, non_blocking=True)
        ids, labels = objectives.hide_tokens(
            texts.ids, can_hide, uniform, self.tokenizer.mask_id, self.tokenizer.vocab_size
        )
        logits, settings = self.model.masked_logits(ids, texts.mask, image_kv), self.config.contrastive
        if self.momentum_model is None or momentum_tokens is None or not isinstance(settings, ContrastiveConfig):
            return objectives.masked_lm_loss(logits, labels)
        with torch.no_grad():
            momentum_kv = self.momentum_model.image_kv(momentum_tokens)
            momentum_logits = self.momentum_model.masked_logits(ids, texts.mask, momentum_kv)
        alpha = objectives.alpha_at(step, settings.alpha, settings.alpha_ramp_steps)
        return objectives.masked_lm_loss(logits, labels, momentum_logits, alpha)

    def after_step(self) -> None:
        """Clamp the temperature, let the momentum model follow, and queue the embeddings of this step."""
        if "itc" in self.config.objectives:
            objectives.clamp_temperature(self.model.log_temperature)
        if self.momentum_model is None:
            return
        assert isinstance(self.config.contrastive, ContrastiveConfig)  # which makes a momentum model
        trained, average = (dict(model.named_parameters()) for model in (self.model, self.momentum_model))
        momentum = self.config.contrastive.momentum
        objectives.update_average(average.values(), (trained[name] for name in average), momentum)
        for images, texts, ids in self._pending:
            self.queue.put(images, texts, ids)
        self._pending.clear()


def _make_momentum_model(model: Blip, heads: tuple[Head, ...]) -> Blip:
    """A frozen copy of what these heads need: of ITC vision, text encoder and the two projections. It has no dropout,
    also while the task trains: the released code leaves it on, which only adds noise to the targets.
    """
    vision = replace(model.config.vision, drop_path=0.0)
    text = replace(model.config.text, dropout=0.0)
    momentum_model = Blip(replace(model.config, vision=vision, text=text, heads=heads))
    weights = model.state_dict()
    momentum_model.load_state_dict({name: weights[name] for name in momentum_model.state_dict()})
    return momentum_model.requires_grad_(False).eval()


class Blip2Stage1(Blip2Task):
    """ITC and, where the settings say so, ITM and ITG over a BLIP-2."""

    config: Blip2Stage1Config
    tokenizer: Tokenizer

    @classmethod
    def heads(cls, config: Blip2Stage1Config) -> tuple[Blip2Head, ...]:
        chosen: dict[Blip2Head, bool] = {"itc": True, "itm": config.itm, "itg": config.itg}
        return tuple(head for head, is_trained in chosen.items() if is_trained)

    def forward(self, batch: ImageTextBatch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss itc and, with their heads, itm and itg."""
        features, tokens, ids = self.encode(batch.pixels), batch.tokens, batch.image_ids  # encoded once for all three
        image_kv = self.model.image_kv(features)
        output = self.model.encode_queries(image_kv)
        image = self.model.embed_image(output.queries)  # (B, Q, E)
        text = self.model.embed_text(tokens.ids, tokens.mask)  # (B, E)
        itc, similarities = in_batch_loss(image, text, ids, self.model.temperature, self.config.label_smoothing)
        losses = {"itc": itc}
        if self.config.itm:
            losses["itm"] = matching_loss(self.model, tokens, features, image_kv, ids, similarities, generator)
        if self.config.itg:
            captions = replace_first(tokens, self.tokenizer.dec_id)
            logits = self.model.caption_logits(captions.ids[:, :-1], output)
            labels = objectives.next_token_labels(captions.ids, captions.mask)
            losses["itg"] = objectives.lm_loss(logits, labels, self.config.label_smoothing)
        return losses


def in_batch_loss(
    image: Tensor, text: Tensor, ids: Tensor, temperature: Tensor, label_smoothing: float
) -> tuple[Tensor, Similarities]:
    """ITC among the pairs of the joint batch, and the similarities by which ITM chooses its negatives.

    Gradients reach the rows of every process. The released code of BLIP-2 cuts them off at gathered keys, but only when
    there are several processes.

    image: unit vectors (B, E), or (B, Q, E) of queries; text: (B, E); ids: (B,) image ids.
    """
    with torch.autocast(image.device.type, enabled=False):  # bf16 similarities over 0.07 are too coarse
        image_to_text = similarity_matrix(image, gather_with_gradient(text)) / temperature  # (B, G)
        text_to_image = similarity_matrix(gather_with_gradient(image), text).T / temperature  # (B, G)
        similarities = (image_to_text, text_to_image)
        return objectives.in_batch_itc_loss(*similarities, ids, gather(ids), label_smoothing), similarities


def matching_loss(
    model: Blip | Blip2,
    texts: Tokens,
    features: Tensor,
    image_kv: CrossKV,
    ids: Tensor,
    similarities: Similarities | None,
    generator: torch.Generator,
) -> Tensor:
    """ITM over every pair as positive, one negative text per image and one negative image per text.

    Negatives come from the joint batch. The released pre-training code draws them from the process's own batch; with
    one process that is the same.

    texts: (B, T), beginning as the model's `match_logits` needs them. features: (B, N, D), what the image encoder makes
    of the images; image_kv: `model.image_kv` of these. ids: (B,) image ids. similarities: what makes negatives hard;
    None draws any of other images. generator: in the same state on every process.
    """
    joint_ids = gather(ids)
    if similarities is None:
        alike = torch.zeros(len(ids), len(joint_ids), device=ids.device)
        similarities = (alike, alike)
    weights = [objectives.negative_weights(similarity, ids, joint_ids) for similarity in similarities]
    (text_index, has_text), (image_index, has_image) = (objectives.draw_negatives(w, generator) for w in weights)

    joint_texts = Tokens(gather_padded(texts.ids, 0), gather_padded(texts.mask, False))
    negative_texts = Tokens(joint_texts.ids[text_index], joint_texts.mask[text_index])
    of_image = interleave(texts, negative_texts)
    text_logits = model.match_logits(of_image.ids, of_image.mask, image_kv)  # (2B, 2)
    if world_size() == 1:
        negative_kv = image_kv.select(image_index)
    else:  # gradients reach the processes that hold the images
        joint_features = gather_with_gradient(features) if features.requires_grad else gather(features)
        negative_kv = model.image_kv(joint_features[image_index])
    image_logits = model.match_logits(texts.ids, texts.mask, negative_kv)  # (B, 2)

    labels = torch.stack([torch.ones_like(ids), torch.zeros_like(ids)], dim=1).flatten()
    counted = torch.stack([torch.ones_like(has_text), has_text], dim=1).flatten()
    return objectives.itm_loss(
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
