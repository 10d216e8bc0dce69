"""BLIP-2: a Q-Former between a frozen image encoder and a frozen language model (arXiv 2301.12597).

B images, R = B * K rows of text (K for each image), N image tokens, Q queries, T text tokens, Dv image width,
D width of the Q-Former, Dl width of the language model, E embedding width, H heads, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.errors import ConfigError, UnsupportedTaskError
from openblip.models.blip import INITIAL_TEMPERATURE, CrossKV, ModelWithHeads, initialise
from openblip.models.config import Blip2Config, Projection
from openblip.models.decoder import CachedDecoder, read_prompt
from openblip.models.gating import Gating, ShownExamples
from openblip.models.language_model import LanguageModel, Predicted
from openblip.models.vision_tower import VisionTower, run_frozen, run_without_graph
from openblip.nn.attention import CrossAttention, DecodingCache, SelfAttention, SelfAttentionCache, record_attention
from openblip.nn.config import VisionConfig
from openblip.nn.connectors import make_connector
from openblip.nn.linear import PackedLinear, replace_linear_layers
from openblip.nn.qformer import QFormer, QFormerLayer, generation_mask, matching_mask, without_padding
from openblip.nn.text_transformer import check_length
from openblip.nn.vit import VisionTransformer


class QueryOutput(NamedTuple):
    """The queries after attending to B images; text may follow them."""

    queries: Tensor
    """(B, Q, D)"""
    cache: SelfAttentionCache
    """Keys and values of the queries, by layer."""


class QueryAttention(NamedTuple):
    """Attention weights of a layer of the Q-Former, a tensor for every forward pass."""

    image: list[Tensor]
    """(B, H, K * Q, N): where the queries look."""
    tokens: list[Tensor]
    """(R, H, Q + T, Q + T): how queries and text attend to each other in the next layer (in the last layer:
    before the queries look)."""


class Blip2(ModelWithHeads):
    """A Q-Former with the heads named in `config.heads`, or a connector in its place, between a frozen image encoder
    and language model.

    vision: the image encoder; None makes our ViT as `config.vision` describes it. language: the language model
    of head llm; None without this head. Texts of the Q-Former begin with [CLS], those of `decode` with [DEC].

    Raises ConfigError for a language model of another width than the config says.
    """

    config: Blip2Config
    freezable = ("vision", "language")

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
                raise ConfigError(
                    f"The image encoder {config.vision.name} must be given: it is a model of transformers."
                )
            vision = VisionTransformer(config.vision)
        described = None if config.language is None else config.language.hidden_dim
        if language is not None and language.hidden_dim != described:
            raise ConfigError(
                f"The language model is {language.hidden_dim} wide; the config says "
                + ("that there is none." if described is None else f"{described}.")
            )
        heads, width, context_dim = set(config.heads), config.qformer.hidden_dim, config.vision.hidden_dim
        self.vision_norm = nn.LayerNorm(context_dim, eps=config.vision_norm_eps)
        self.connector = None if config.connector is None else make_connector(config.connector, context_dim)
        if self.connector is not None:
            width = self.connector.width
        else:
            self.qformer = QFormer(
                config.qformer,
                context_dim=context_dim,
                has_text_branch=config.has_text_branch,
                has_lm_head="itg" in heads,
            )
        if "itc" in heads:
            self.vision_proj = nn.Linear(width, config.embed_dim)
            self.text_proj = nn.Linear(width, config.embed_dim)
            self.log_temperature = nn.Parameter(torch.tensor(math.log(INITIAL_TEMPERATURE)))
        if "itm" in heads:
            self.itm_head = nn.Linear(width, 2)
        if config.language is not None:
            self.language_proj = _projection(config.projection, width, config.language.hidden_dim)
        if config.gated is not None and config.language is not None:
            self.gating = Gating(config.gated, config.language.hidden_dim)
        if not self.vision_norm.weight.is_meta:  # there is nothing to draw, and torch would import its compiler for it
            self.apply(initialise)  # before the frozen parts are added, which have their own weights
            for name, parameter in self.named_parameters():
                if name.endswith(("queries", "gating.tag")):
                    nn.init.normal_(parameter, std=0.02)
        self.vision = vision
        self.language = language

    def pack(self) -> None:
        """Lay out the weights of all linear layers for inference on the CPU (`nn.linear`); they cannot be trained any
        more. Quantised layers of the language model keep their own layout.
        """
        replace_linear_layers(self, PackedLinear)
        if self.connector is None:
            self.qformer.pack_words()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels: float (B, 3, S, S), normalised -> image features (B, N, Dv), before the norm. A frozen encoder keeps
        no graph and computes in its own precision, so that its features can be stored.
        """
        if "vision" in self.frozen:
            return run_frozen(self.vision, pixels)
        return cast(Tensor, self.vision(pixels)) if torch.is_grad_enabled() else run_without_graph(self.vision, pixels)

    def _norm(self, features: Tensor) -> Tensor:
        """Features (B, N, Dv) after the trained norm, which is computed in float32, as in the released code."""
        norm = self.vision_norm
        normed = F.layer_norm(features.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
        return normed.to(norm.weight.dtype)

    def image_kv(self, features: Tensor) -> CrossKV:
        """Features (B, N, Dv) -> the keys and values that the queries attend to, after the trained norm."""
        return CrossKV(self.qformer.image_kv(self._norm(features)))

    def encode_visual(self, features: Tensor) -> Tensor:
        """Features (B, N, Dv) -> the tokens (B, Q, D) that `visual_prompts` takes: the queries, or a connector's."""
        if self.connector is not None:
            return cast(Tensor, self.connector(self._norm(features)))
        return self.encode_queries(self.image_kv(features)).queries

    def encode_queries(self, image_kv: CrossKV) -> QueryOutput:
        """Run the queries over B images, once for ITC, ITG and the language model."""
        cache = SelfAttentionCache(self.config.qformer.num_layers)
        return QueryOutput(self.qformer(image_kv=image_kv.layers, cache=cache), cache)

    def encode_multimodal(self, ids: Tensor, mask: Tensor, image_kv: CrossKV) -> Tensor:
        """Queries (R, Q, D) that attend to texts (R, T) from [CLS] and to the image: ITM, instructions."""
        num_queries = self.qformer.num_queries
        both = without_padding(matching_mask(num_queries, ids.shape[1]), mask)
        return cast(Tensor, self.qformer(ids, image_kv.layers, mask=both)[:, :num_queries])

    def embed_image(self, queries: Tensor) -> Tensor:
        """(B, Q, D) -> unit vectors (B, Q, E), one for each query."""
        self._require("itc")
        return F.normalize(self.vision_proj(queries).float(), dim=-1)

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (R, T) from [CLS], mask bool (R, T) -> unit vectors (R, E): the text alone."""
        self._require("itc")
        first = self.qformer(ids, mask=mask[:, None, None, :])[:, 0]
        return F.normalize(self.text_proj(first).float(), dim=-1)

    def match_logits(self, ids: Tensor, mask: Tensor, image_kv: CrossKV) -> Tensor:
        """ids (R, T) from [CLS] over B images -> (R, 2), the mean over the queries; index 1 means match."""
        self._require("itm")
        return cast(Tensor, self.itm_head(self.encode_multimodal(ids, mask, image_kv)).mean(dim=1))

    def caption_logits(self, ids: Tensor, output: QueryOutput) -> Tensor:
        """ids (B, T) from [DEC] after the queries of B images -> logits (B, T, V), for training by ITG."""
        self._require("itg")
        return self.qformer.predict_words(self.qformer(ids, causal=True, cache=output.cache.copy()))

    def decode(self, ids: Tensor, context_kv: CrossKV) -> Tensor:
        """ids (R, T) from [DEC] over B images -> logits (R, T, V), by the head that ITG trains."""
        self._require("itg")
        num_queries = self.qformer.num_queries
        mask = generation_mask(num_queries, ids.shape[1]).to(ids.device)
        return self.qformer.predict_words(self.qformer(ids, context_kv.layers, mask=mask)[:, num_queries:])

    def begin_texts(
        self, context_kv: CrossKV, prompt_ids: Tensor, num_images: int, *, samples: int, beams: int, max_new_tokens: int
    ) -> tuple[CachedDecoder, Tensor]:
        """Run the queries over B images, and read a prompt, int64 (P,) from [DEC], after them: what writes `samples` *
        `beams` texts of at most `max_new_tokens` for each, and the logits (B, V) for their first token.
        """
        self._require("itg")
        most_read = len(prompt_ids) + max_new_tokens - 1  # the last token is not read
        assert self.qformer.embeddings.position is not None  # a model with this head has a text branch
        check_length(most_read, self.qformer.embeddings.position)
        num_queries = self.qformer.num_queries
        cache = DecodingCache(
            self.config.qformer.num_layers, num_queries + len(prompt_ids) + beams * (max_new_tokens - 1)
        )
        slots = torch.arange(cache.num_slots, device=prompt_ids.device)
        self.qformer(image_kv=context_kv.layers, mask=(slots < num_queries)[None], cache=cache.at(slots[:num_queries]))
        layout = {"samples": samples, "beams": beams, "num_prefix": num_queries}
        return read_prompt(self.qformer, None, cache, prompt_ids, num_images, **layout)

    def visual_prompts(self, queries: Tensor) -> Tensor:
        """Queries (R, Q, D) -> visual prompts of the language model (R, Q, Dl)."""
        self._require("llm")
        return cast(Tensor, self.language_proj(queries))

    def predict_text(
        self, visual: Tensor, prompts: Sequence[str], texts: Sequence[str], images_per_sequence: int = 1
    ) -> Predicted:
        """Predict texts by the language model, after visual prompts (R, Q, Dl) and text prompts, and with
        `images_per_sequence` after images and texts of the rows before (`LanguageModel.predict`).
        """
        language = self.require_language()
        assert self.config.language is not None  # guaranteed by the config
        with self.attending(visual, images_per_sequence=images_per_sequence) as shown:
            return language.predict(shown, prompts, texts, self.config.language.max_text_tokens, images_per_sequence)

    @contextmanager
    def attending(
        self, visual: Tensor, examples: ShownExamples | None = None, images_per_sequence: int = 1
    ) -> Iterator[Tensor]:
        """What stands before R texts for their images, after examples: the visual prompts (R, Q, Dl), or in a model
        with gated layers, which attend to these as long as the context is open, a tag (R, 1, Dl). images_per_sequence:
        as in `predict_text`.
        """
        if self.config.gated is not None:
            model = self.require_language().model
            with self.gating.attending(model, visual, examples, images_per_sequence) as shown:
                yield shown
        elif examples is not None:
            yield torch.cat([examples.words.expand(len(visual), -1, -1), visual], dim=1)
        else:
            yield visual

    def require_language(self) -> LanguageModel:
        """The language model. Raises UnsupportedTaskError when there is none."""
        if self.language is None:
            heads = ", ".join(self.config.heads)
            raise UnsupportedTaskError(f"This checkpoint has no language model; it has the heads {heads}.")
        return self.language

    def recording_query_attention(self, layer: int | None) -> tuple[Self, QueryAttention]:
        """A view of the model that records the attention of its forward passes, as `record_attention` does, in a layer
        whose queries attend to the image. layer: None takes the middle one of these layers. ConfigError: a layer
        without cross-attention.
        """
        if self.connector is not None:
            raise UnsupportedTaskError("A connector in place of the Q-Former has no attention that could be shown.")
        layers = [cast(QFormerLayer, module) for module in self.qformer.layers]
        attending = {i: m.cross_attention for i, m in enumerate(layers) if m.cross_attention is not None}
        layer = list(attending)[len(attending) // 2] if layer is None else layer
        if layer not in attending:
            possible = ", ".join(map(str, attending))
            raise ConfigError(f"layer {layer}: the queries attend to the image in layers {possible}.")
        following = cast(SelfAttention, layers[min(layer + 1, len(layers) - 1)].self_attention.branch)
        view, tokens = record_attention(self, following)
        view, image = record_attention(view, cast(CrossAttention, attending[layer].branch))
        return view, QueryAttention(image, tokens)


def _projection(kind: Projection, width: int, language_dim: int) -> nn.Module:
    """From queries (R, Q, D) to visual prompts (R, Q, Dl)."""
    first = nn.Linear(width, language_dim)
    return first if kind == "linear" else nn.Sequential(first, nn.GELU(), nn.Linear(language_dim, language_dim))
