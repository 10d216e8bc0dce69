"""BLIP: a ViT and a text transformer as multimodal mixture of encoder-decoder (MED, BLIP section 3.1).

B images, R = B * K rows of text (K for each image), F frames of a video, N image tokens, T text tokens, Dv
image width, D text width, E embedding width, H heads, V vocabulary, S image size, I images and T texts in a
similarity matrix, Q queries of BLIP-2.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.errors import ConfigError, UnsupportedTaskError
from openblip.models.config import GROUNDED_HEADS, Blip2Config, Blip2Head, BlipConfig, Head
from openblip.models.decoder import CachedDecoder, read_prompt
from openblip.models.language_model import train_adapters
from openblip.models.vision_tower import run_without_graph
from openblip.nn.attention import CrossAttention, DecodingCache, LayerKV, PairCrossAttention, record_attention
from openblip.nn.config import Mode
from openblip.nn.linear import Int8Linear, PackedLinear, replace_linear_layers
from openblip.nn.text_transformer import MedLayer, TextTransformer, check_length
from openblip.nn.vit import VisionTransformer, sine_positions

INITIAL_TEMPERATURE = 0.07  # of ITC, as in the released code


class CrossKV(NamedTuple):
    """Cross-attention keys and values of B contexts (images, videos, questions, ...), one entry per layer."""

    layers: Sequence[LayerKV]

    def select(self, index: Tensor | slice) -> "CrossKV":
        """Keys and values of the contexts in `index`, int64 (B'), repeats allowed; of a slice as views."""
        return CrossKV([None if layer is None else layer.select(index) for layer in self.layers])


class ModelWithHeads(nn.Module):
    """What BLIP and BLIP-2 share: heads, which the config names, the temperature of ITC, parts that can be frozen."""

    config: BlipConfig | Blip2Config
    log_temperature: nn.Parameter
    freezable: ClassVar[tuple[str, ...]]
    """The names of the parts that `freeze` takes."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen: tuple[str, ...] = ()

    @property
    def temperature(self) -> Tensor:
        """The temperature that ITC divides similarities by, a scalar. Its logarithm is learned, so that a step changes
        it by a share of itself. The released code learns the value itself: at small scale it then reaches its bounds
        within a hundred steps and spoils the losses.
        """
        self._require("itc")
        return self.log_temperature.exp()

    def freeze(self, *parts: str) -> Self:
        """Freeze the named parts, and unfreeze the other: no gradients, always eval mode. LoRA adapters of a language
        model stay trainable.
        """
        for name in parts:
            if name not in self.freezable:
                raise ValueError(f"{name} cannot be frozen: choose of {' and '.join(self.freezable)}.")
        for name in self.freezable:
            part = self._modules.get(name)
            for parameter_name, parameter in [] if part is None else part.named_parameters():
                if parameter.is_floating_point():
                    is_adapter = name == "language" and "lora_" in parameter_name
                    parameter.requires_grad_(name not in parts or is_adapter)
        self.frozen = parts
        return self.train(self.training)

    def frozen_parts(self) -> list[nn.Module]:
        """The parts that `freeze` has frozen."""
        return [part for part in map(self._modules.get, self.frozen) if part is not None]

    def train(self, mode: bool = True) -> Self:
        """Set training mode; frozen parts stay in eval mode, except for the dropout of their adapters."""
        super().train(mode)
        for part in self.frozen_parts():
            part.eval()
            train_adapters(part, mode)
        return self

    def _require(self, *heads: Head | Blip2Head) -> None:
        """Raise UnsupportedTaskError unless one of `heads` is present."""
        present = self.config.heads
        if not set(heads) & set(present):
            has = ", ".join(present)
            raise UnsupportedTaskError(f"This checkpoint has no {' or '.join(heads)} head; it has {has}.")


class Blip(ModelWithHeads):
    """Image encoder, text encoder and decoder, with the heads named in `config.heads`. The first token of a text says
    how it is encoded, and the caller sets it: [CLS] for `embed_text` and captions of dialogs, [ENC] for texts that
    attend to an image, [DEC] for `decode`.
    """

    config: BlipConfig
    freezable = ("vision",)

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.text.hidden_dim, set(config.heads)
        self.vision = VisionTransformer(config.vision)
        self.text = TextTransformer(
            config.text,
            modes=config.modes,
            context_dims=config.context_dims,
            images_per_text=2 if "nlvr" in heads else 1,
            has_mlm_head="mlm" in heads,
        )
        self.shares_cross_attention = self.text.shares_cross_attention  # then `image_kv` is the same in both modes
        if "itc" in heads:
            self.vision_proj = nn.Linear(config.vision.hidden_dim, config.embed_dim, bias=not config.pooled)
            self.text_pooler = nn.Linear(width, width) if config.pooled else None
            self.text_proj = nn.Linear(width, config.embed_dim, bias=not config.pooled)
            self.log_temperature = nn.Parameter(torch.tensor(math.log(INITIAL_TEMPERATURE)))
        if {"itm", "visdial"} & heads:
            self.itm_head = nn.Linear(width, 2)
        if {"visdial", "prefix"} & heads and width != config.vision.hidden_dim:
            self.caption_proj = nn.Linear(width, config.vision.hidden_dim)
        if "nlvr" in heads:
            self.nlvr_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        if self.vision.class_token.is_meta:
            return  # there is nothing to draw, and torch would import its compiler for it
        self.apply(initialise)
        nn.init.trunc_normal_(self.vision.class_token, std=0.02)
        with torch.no_grad():
            self.vision.position_embedding.copy_(sine_positions(config.vision.grid, config.vision.hidden_dim))

    def pack(self, int8: bool = False) -> None:
        """Lay out the weights for inference on the CPU (`nn.linear`); the model cannot be trained any more. With `int8`
        those inside the transformers are rounded to 8 bits; heads and word embeddings, which cost little, are not.
        """
        if int8:
            replace_linear_layers(self.vision.blocks, Int8Linear)
            replace_linear_layers(self.text.layers, Int8Linear)
        replace_linear_layers(self, PackedLinear)
        self.text.pack_words()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels: float (B, 3, S, S), normalised -> image tokens (B, N, Dv); of a frozen encoder without a graph."""
        if "vision" in self.frozen:
            return run_without_graph(self.vision, pixels).to(next(self.text.parameters()).dtype)
        return cast(Tensor, self.vision(pixels))

    def encode_pair(self, pixels: Tensor) -> Tensor:
        """The left and the right image (B, 2, 3, S, S) -> their tokens (B, 2, N, Dv)."""
        return cast(Tensor, self.encode_image(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]))

    def image_kv(self, image_tokens: Tensor, mode: Mode = "encode") -> CrossKV:
        """Cross-attention keys and values for a mode, computed once per image, video or pair (`judge_logits`). Where
        `shares_cross_attention` (the paper's choice), one result serves both modes.
        """
        if mode not in self.config.context_dims:
            self._require(*GROUNDED_HEADS[mode])
        return CrossKV(self.text.context_kv(image_tokens, mode))

    def question_kv(self, ids: Tensor, mask: Tensor, image_kv: CrossKV) -> CrossKV:
        """Keys and values that `decode` writes answers from: questions (R, T) from [ENC], encoded with images."""
        self._require("vqa")
        states = self.text(ids, "encode", mask=mask, context_kv=image_kv.layers)  # (R, T, D)
        return CrossKV(self.text.context_kv(states, "decode", mask))

    def dialog_kv(self, image_tokens: Tensor, ids: Tensor, mask: Tensor) -> CrossKV:
        """Keys and values for `match_logits` of a dialog: B images (B, N, Dv), each followed by the states of its
        caption, ids (B, T) from [CLS] (BLIP section 5.5, Figure 5c).
        """
        self._require("visdial")
        return self._joint_kv(image_tokens, self.text(ids, "encode", mask=mask), mask, "encode")

    def prefix_kv(self, image_tokens: Tensor, ids: Tensor, mask: Tensor) -> CrossKV:
        """Keys and values from which `decode` writes the rest of texts: B images (B, N, Dv), each followed by the
        states of a text's beginning, ids (B, T) from [ENC], which was read with the image (SimVLM section 3.2).
        """
        self._require("prefix")
        states = self.text(ids, "encode", mask, self.image_kv(image_tokens).layers)
        return self._joint_kv(image_tokens, states, mask, "decode")

    def _joint_kv(self, image_tokens: Tensor, states: Tensor, mask: Tensor, mode: Mode) -> CrossKV:
        """Keys and values of images (B, N, Dv), each followed by states of a text (B, T, D). States of another width
        than the image's, which the papers do not have, are projected to it.
        """
        if self.config.text.hidden_dim != self.config.vision.hidden_dim:
            states = self.caption_proj(states)
        context = torch.cat([image_tokens, states.to(image_tokens.dtype)], dim=1)  # (B, N+T, Dv)
        whole = torch.cat([mask.new_ones(image_tokens.shape[:2]), mask], dim=1)
        return CrossKV(self.text.context_kv(context, mode, whole))

    def embed_image(self, image_tokens: Tensor, num_frames: int = 1) -> Tensor:
        """(B, F*N, Dv) -> unit vectors (B, E) from the class token; for a video, their mean over the frames."""
        class_tokens = image_tokens.unflatten(1, (num_frames, -1))[:, :, 0]  # (B, F, Dv)
        return F.normalize(self.project_image(class_tokens).mean(dim=1).float(), dim=-1)

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (R, T) from [CLS], mask bool (R, T) -> unit vectors (R, E): the unimodal encoder."""
        self._require("itc")
        first = self.text(ids, "encode", mask=mask)[:, 0]
        return F.normalize(self.project_text(first).float(), dim=-1)

    def project_image(self, image_tokens: Tensor) -> Tensor:
        """(..., Dv) -> (..., E), the space in which ITC compares the class token; not of unit length."""
        self._require("itc")
        normed = self.vision.norm(image_tokens) if self.config.pooled else image_tokens
        return cast(Tensor, self.vision_proj(normed))

    def project_text(self, states: Tensor) -> Tensor:
        """States (..., D) of a text alone -> (..., E), the space in which ITC compares [CLS]."""
        self._require("itc")
        pooled = states if self.text_pooler is None else self.text_pooler(states).tanh()
        return cast(Tensor, self.text_proj(pooled))

    def match_logits(self, ids: Tensor, mask: Tensor, image_kv: CrossKV) -> Tensor:
        """ids (R, T) from [ENC] over B images -> (R, 2); index 1 means match. The image-grounded encoder. With
        `dialog_kv` the text is a dialog that ends with an answer, and index 1 means that it is right.
        """
        self._require("itm", "visdial")
        return cast(Tensor, self.itm_head(self.text(ids, "encode", mask, image_kv.layers)[:, 0]))

    def judge_logits(self, ids: Tensor, mask: Tensor, image_kv: CrossKV) -> Tensor:
        """Statements (R, T) from [ENC] over B pairs of images -> (R, 2); index 1 means true (NLVR2)."""
        self._require("nlvr")
        return cast(Tensor, self.nlvr_head(self.text(ids, "encode", mask, image_kv.layers)[:, 0]))

    def masked_logits(self, ids: Tensor, mask: Tensor, image_kv: CrossKV) -> Tensor:
        """ids (R, T) from [ENC], some of them hidden, over B images -> logits (R, T, V) of what stands there."""
        self._require("mlm")
        return self.text.predict_masked(self.text(ids, "encode", mask, image_kv.layers))

    def decode(self, ids: Tensor, context_kv: CrossKV, mask: Tensor | None = None) -> Tensor:
        """ids (R, T) from [DEC] over B images, questions or prefixes -> logits (R, T, V). The image-grounded decoder.

        mask: bool (R, T), True at real tokens; needed only where padding stands before real tokens, since the decoder
        is causal.
        """
        self._require("lm", "vqa", "prefix")
        return self.text.predict_words(self.text(ids, "decode", mask, context_kv.layers))

    def begin_texts(
        self, context_kv: CrossKV, prompt_ids: Tensor, num_images: int, *, samples: int, beams: int, max_new_tokens: int
    ) -> tuple[CachedDecoder, Tensor]:
        """Read a prompt, int64 (P,) from [DEC], over B images or questions: what writes `samples` * `beams` texts of at
        most `max_new_tokens` for each, and the logits (B, V) for their first token.
        """
        self._require("lm", "vqa", "prefix")
        most_read = len(prompt_ids) + max_new_tokens - 1  # the last token is not read
        check_length(most_read, self.text.embeddings["decode"].position)
        cache = DecodingCache(self.config.text.num_layers, len(prompt_ids) + beams * (max_new_tokens - 1))
        return read_prompt(self.text, context_kv, cache, prompt_ids, num_images, samples=samples, beams=beams)

    def recording_cross_attention(self, mode: Mode, layer: int) -> tuple[Self, list[Tensor]]:
        """A view of the model that records where texts look, as `record_attention` does: its forward passes append
        weights (B, H, K * T, N) of one layer. Passes in the other mode are recorded too where both share their
        cross-attention. ConfigError: no such layer.
        """
        layers = self.text.layers
        if not 0 <= layer < len(layers):
            raise ConfigError(f"layer {layer}: this model has the layers 0 to {len(layers) - 1}.")
        attention = cast(MedLayer, layers[layer]).cross_attention[mode].branch
        return record_attention(self, cast(CrossAttention, attention))


def initialise(module: nn.Module) -> None:
    """Set truncated normal weights and zero biases, as ViT and BERT start. Their standard deviation of 0.02 suits a
    width of 768; it is scaled for other widths.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02 * (768 / module.weight[0].numel()) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, PairCrossAttention) and module.merge is not None:
        # The mean that the lower layers take; the released code starts this layer from random weights.
        half = 0.5 * torch.eye(module.merge.out_features)
        with torch.no_grad():
            module.merge.weight.copy_(torch.cat([half, half], dim=1))


def encode_media(encode_image: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """Image tokens (B, N, Dv) of images (B, 3, S, S), normalised; of videos (B, F, 3, S, S) the tokens of all their
    frames, one frame after the other, (B, F*N, Dv) (BLIP section 5.6).
    """
    if pixels.dim() == 4:
        return encode_image(pixels)
    return cast(Tensor, encode_image(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).flatten(1, 2))


SIMILARITY_CHUNK = 64


def similarity_matrix(images: Tensor, texts: Tensor) -> Tensor:
    """Unit vectors (I, E) or (I, Q, E), and (T, E) -> the cosine of every image with every text, (I, T). With queries,
    the highest cosine over an image's queries counts (BLIP-2 section 3.2).
    """
    if images.dim() == 2:
        return images @ texts.T
    return torch.cat([(part @ texts.T).amax(dim=1) for part in images.split(SIMILARITY_CHUNK)])


def similarity_of_pairs(images: Tensor, texts: Tensor) -> Tensor:
    """Unit vectors (R, E) or (R, Q, E), and (R, E) -> the cosine of each pair, (R,), as above."""
    if images.dim() == 2:
        return (images * texts).sum(dim=1)
    return (images * texts[:, None]).sum(dim=2).amax(dim=1)
