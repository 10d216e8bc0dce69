"""BLIP-2: a Q-Former between a frozen image encoder and a frozen language model (arXiv 2301.12597).

B images, R = B * K rows of text, N image tokens, Q queries, T text tokens, Dv image width, D width of the
Q-Former, Dl width of the language model, E embedding width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.errors import ConfigError, UnsupportedTaskError
from openblip.models.blip import INITIAL_TEMPERATURE
from openblip.models.blip2_config import Blip2Config, Blip2Head, LanguageConfig
from openblip.models.config import VisionConfig
from openblip.models.initial_weights import initialise
from openblip.models.language_model import LanguageModel, Predicted
from openblip.models.lora import train_adapters
from openblip.models.vision_tower import VisionTower, run_frozen, run_without_graph
from openblip.nn.attention import KeyValue
from openblip.nn.kv_cache import GrowingCache, SelfAttentionCache
from openblip.nn.masks import generation_mask, matching_mask, without_padding
from openblip.nn.qformer import QFormer
from openblip.nn.vit import VisionTransformer


class ImageKV(NamedTuple):
    """Cross-attention keys and values of B images, by layer; None where a layer has no cross-attention."""

    layers: Sequence[KeyValue | None]

    def select(self, index: Tensor) -> "ImageKV":
        """Those of the images `index` names, (B') of int64, repeats allowed."""
        return ImageKV([None if kv is None else kv.select(index) for kv in self.layers])


class ReadImages(NamedTuple):
    """Images as the queries have read them, which text may follow."""

    queries: Tensor
    """(B, Q, D)"""
    cache: GrowingCache
    """Keys and values of the queries, by layer."""


class Blip2(nn.Module):
    """A Q-Former with the heads named in `config.heads`, between models that it did not train.

    vision: the image encoder, by default our ViT as `config.vision` describes it. language: the model of head
    llm, None without. Texts of the Q-Former begin with [CLS], of `decode` with [DEC].

    Raises ConfigError for a language model of another width than the config says.
    """

    def __init__(
        self,
        config: Blip2Config,
        vision: VisionTransformer | VisionTower | None = None,
        language: LanguageModel | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        if vision is None:
            if not isinstance(config.vision, VisionConfig):
                raise ConfigError(f"The image encoder {config.vision.name} must be given: it is not ours.")
            vision = VisionTransformer(**asdict(config.vision))
        _check_width(language, config.language)
        heads, width = set(config.heads), config.qformer.hidden_dim
        self.vision_norm = nn.LayerNorm(config.vision.hidden_dim, eps=config.vision_norm_eps)
        self.qformer = QFormer(
            **asdict(config.qformer),
            context_dim=config.vision.hidden_dim,
            reads_text=config.reads_text,
            writes_text="itg" in heads,
        )
        if "itc" in heads:
            self.vision_proj = nn.Linear(width, config.embed_dim)
            self.text_proj = nn.Linear(width, config.embed_dim)
            self.log_temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE).log())
        if "itm" in heads:
            self.itm_head = nn.Linear(width, 2)
        if config.language is not None:
            self.language_proj = nn.Linear(width, config.language.hidden_dim)
        self.apply(initialise)  # before the frozen parts join, which bring their own weights
        nn.init.normal_(self.qformer.embeddings.queries, std=0.02)
        self.vision = vision
        self.language = language
        self.frozen: tuple[str, ...] = ()

    def freeze(self, *parts: str) -> Self:
        """Freeze `parts` of "vision" and "language", and no other: no gradients, and eval mode for good.

        Of a language model with LoRA, the adapters stay trained.
        """
        for name in parts:
            if name not in ("vision", "language"):
                raise ValueError(f"{name} is no part to freeze: vision and language are.")
        for name in ("vision", "language"):
            part = getattr(self, name)
            if part is not None:
                for parameter_name, parameter in part.named_parameters():
                    is_adapter = name == "language" and "lora_" in parameter_name
                    if parameter.is_floating_point():
                        parameter.requires_grad_(name not in parts or is_adapter)
        self.frozen = parts
        return self.train(self.training)

    def frozen_parts(self) -> list[nn.Module]:
        """The parts that `freeze` has frozen."""
        return [part for part in map(self._modules.get, self.frozen) if part is not None]

    def train(self, mode: bool = True) -> Self:
        """As usual, but frozen parts stay in eval mode; dropout of their adapters follows the model."""
        super().train(mode)
        for part in self.frozen_parts():
            part.eval()
            train_adapters(part, mode)
        return self

    @property
    def temperature(self) -> Tensor:
        """What ITC divides similarities by, a scalar; learned as its logarithm, as in `Blip`."""
        self._require("itc")
        return self.log_temperature.exp()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels: float (B, 3, S, S), normalised -> image features (B, N, Dv), before the norm.

        A frozen encoder keeps no graph and computes in its own precision; so its features can be stored.
        """
        if "vision" in self.frozen:
            return run_frozen(self.vision, pixels)
        if not torch.is_grad_enabled():
            return run_without_graph(self.vision, pixels)
        features: Tensor = self.vision(pixels)
        return features

    def image_kv(self, features: Tensor) -> ImageKV:
        """What the queries attend to, (B, N, Dv) projected once per image; the norm before it is trained."""
        normed = F.layer_norm(  # in float32, as the released code
            features.float(),
            self.vision_norm.normalized_shape,
            self.vision_norm.weight.float(),
            self.vision_norm.bias.float(),
            self.vision_norm.eps,
        )
        return ImageKV(self.qformer.image_kv(normed.to(self.vision_norm.weight.dtype)))

    def read_images(self, image_kv: ImageKV) -> ReadImages:
        """The queries over B images, once for ITC, for ITG and for the language model."""
        cache = GrowingCache(self.config.qformer.num_layers)
        queries = self.qformer(image_kv=image_kv.layers, cache=cache)
        return ReadImages(queries, cache)

    def read_with_text(self, ids: Tensor, mask: Tensor, image_kv: ImageKV) -> Tensor:
        """The queries (R, Q, D) that read texts (R, T) from [CLS] with the image: ITM, instructions."""
        num_queries = self.qformer.num_queries
        both = without_padding(matching_mask(num_queries, ids.shape[1]), mask)
        states: Tensor = self.qformer(ids, image_kv.layers, mask=both)
        return states[:, :num_queries]

    def embed_image(self, queries: Tensor) -> Tensor:
        """(B, Q, D) -> unit vectors (B, Q, E), one for each query."""
        self._require("itc")
        return F.normalize(self.vision_proj(queries).float(), dim=-1)

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (R, T) from [CLS], mask bool (R, T) -> unit vectors (R, E): the text alone."""
        self._require("itc")
        first = self.qformer(ids, mask=mask[:, None, None, :])[:, 0]
        return F.normalize(self.text_proj(first).float(), dim=-1)

    def match_logits(self, ids: Tensor, mask: Tensor, image_kv: ImageKV) -> Tensor:
        """ids (R, T) from [CLS] over B images -> (R, 2), index 1 says match: the mean over the queries."""
        self._require("itm")
        logits: Tensor = self.itm_head(self.read_with_text(ids, mask, image_kv)).mean(dim=1)
        return logits

    def caption_logits(self, ids: Tensor, read: ReadImages) -> Tensor:
        """ids (B, T) from [DEC] after images that were read -> logits (B, T, V), for training by ITG."""
        self._require("itg")
        return self.qformer.predict_words(self.qformer(ids, causal=True, cache=read.cache.copy()))

    def decode(self, ids: Tensor, context_kv: ImageKV, cache: SelfAttentionCache | None = None) -> Tensor:
        """ids (R, T) from [DEC] over B images -> logits (R, T, V): what ITG has taught the Q-Former to write.

        With a cache, ids are only the tokens it has not read; an empty one reads the queries first.
        """
        self._require("itg")
        num_queries = self.qformer.num_queries
        if cache is None:
            mask = generation_mask(num_queries, ids.shape[1]).to(ids.device)
            states = self.qformer(ids, context_kv.layers, mask=mask)[:, num_queries:]
        else:
            if cache.length == 0:
                self.qformer(image_kv=context_kv.layers, cache=cache)
            states = self.qformer(ids, causal=True, cache=cache)
        return self.qformer.predict_words(states)

    def new_cache(self, max_length: int) -> SelfAttentionCache:
        """An empty cache for `decode`, of rows of at most `max_length` tokens and their queries."""
        config = self.config.qformer
        return SelfAttentionCache(config.num_layers, config.num_queries + max_length)

    def visual_prompts(self, queries: Tensor) -> Tensor:
        """(R, Q, D) -> what stands before the language model's text, (R, Q, Dl)."""
        self._require("llm")
        prompts: Tensor = self.language_proj(queries)
        return prompts

    def predict_text(self, visual: Tensor, prompts: Sequence[str], texts: Sequence[str]) -> Predicted:
        """What the language model says of texts after visual prompts (R, Q, Dl) and prompts in words."""
        language = self.require_language()
        assert self.config.language is not None  # the config has seen to it
        return language.predict(visual, prompts, texts, self.config.language.max_text_tokens)

    def require_language(self) -> LanguageModel:
        """The language model; UnsupportedTaskError without one."""
        if self.language is None:
            heads = ", ".join(self.config.heads)
            raise UnsupportedTaskError(f"This checkpoint has no language model; it has the heads {heads}.")
        return self.language

    def _require(self, head: Blip2Head) -> None:
        """UnsupportedTaskError unless the model has the head."""
        if head not in self.config.heads:
            raise UnsupportedTaskError(
                f"This checkpoint has no {head} head; it has {', '.join(self.config.heads)}."
            )


def _check_width(language: LanguageModel | None, config: LanguageConfig | None) -> None:
    """ConfigError when a given language model is not of the width that the config says."""
    described = None if config is None else config.hidden_dim
    if language is not None and language.hidden_dim != described:
        raise ConfigError(
            f"The language model is {language.hidden_dim} wide; the config says "
            + ("that there is none." if described is None else f"{described}.")
        )
