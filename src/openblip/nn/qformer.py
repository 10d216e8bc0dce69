"""The Q-Former: queries that learn to extract from a frozen image encoder what a text needs (BLIP-2 section 3.1).

One transformer with two kinds of tokens. Queries and text share the self-attention; in every second layer the
queries, and only they, attend to the image; each kind has its own feed-forward. The mask decides which token
may attend to which, so one forward serves ITC, ITM and ITG (BLIP-2 section 3.2, Figure 2). A row may attend to
the columns marked #; Q queries come first, then T text tokens:

      contrastive (ITC)       matching (ITM)         generation (ITG)
          Q   T                   Q   T                  Q   T
      Q  ###  ...             Q  ###  ###            Q  ###  ...
      Q  ###  ...             Q  ###  ###            Q  ###  ...
      Q  ###  ...             Q  ###  ###            Q  ###  ...
      T  ...  ###             T  ###  ###            T  ###  #..
      T  ...  ###             T  ###  ###            T  ###  ##.
      T  ...  ###             T  ###  ###            T  ###  ###

ITC keeps image and text apart, so neither can copy from the other: queries and text are run one at a time, and
no mask is needed. In ITM every token attends to every token. In ITG the text attends to the queries and to its
own past, and the queries never attend to the text that they help to generate.

B images, R = B * K rows, Q queries, T text tokens, N image tokens, S = Q + T tokens in all, or slots of a cache, D
width, V vocabulary.
"""

from collections.abc import Sequence
from copy import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openblip.nn.attention import (
    CrossAttention,
    DecodingCache,
    KeyValue,
    LayerBuffer,
    LayerCache,
    LayerKV,
    SelfAttention,
    SelfAttentionCache,
)
from openblip.nn.config import QFormerConfig
from openblip.nn.dropout import Dropout
from openblip.nn.linear import FeedForward
from openblip.nn.text_transformer import LanguageModelHead, Residual, embed_words


def matching_mask(num_queries: int, num_tokens: int) -> Tensor:
    """The bi-directional mask of ITM: bool (S, S), True where a row may attend to a column."""
    return torch.ones(num_queries + num_tokens, num_queries + num_tokens, dtype=torch.bool)


def generation_mask(num_queries: int, num_tokens: int) -> Tensor:
    """The multimodal causal mask of ITG: bool (S, S), True where a row may attend to a column."""
    mask = torch.ones(num_queries + num_tokens, num_queries + num_tokens, dtype=torch.bool).tril()
    mask[:num_queries, :num_queries] = True
    return mask


def without_padding(mask: Tensor, text_mask: Tensor) -> Tensor:
    """A mask (S, S) and text masks bool (R, T), True at real tokens -> (R, 1, S, S), which hides padding too."""
    num_queries = mask.shape[-1] - text_mask.shape[1]
    real = torch.cat([text_mask.new_ones(text_mask.shape[0], num_queries), text_mask], dim=1)  # (R, S)
    return mask.to(text_mask.device)[None, None] & real[:, None, None, :]


class QFormerEmbeddings(nn.Module):
    """Queries, then words plus positions, through one norm. Queries have no positions."""

    def __init__(self, config: QFormerConfig, has_text_branch: bool) -> None:
        super().__init__()
        width = config.hidden_dim
        self.queries = nn.Parameter(torch.zeros(1, config.num_queries, width))
        self.word = nn.Embedding(config.vocab_size, width) if has_text_branch else None
        self.position = nn.Embedding(config.max_positions, width) if has_text_branch else None
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, num_rows: int, with_queries: bool, ids: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """The queries, if asked for, then ids (R, T) at `positions`, by default from 0 on -> (R, S, D)."""
        parts = [self.queries.expand(num_rows, -1, -1)] if with_queries else []
        if ids is not None:
            if self.word is None or self.position is None:
                raise KeyError("This Q-Former has no text branch: it has no word embeddings.")
            parts.append(embed_words(self.word, self.position, ids, positions))
        return cast(Tensor, self.dropout(self.norm(torch.cat(parts, dim=1))))


class QFormerLayer(nn.Module):
    """Shared self-attention, cross-attention of the queries in layers that have one, two feed-forwards."""

    def __init__(self, config: QFormerConfig, context_dim: int | None, has_text_branch: bool) -> None:
        super().__init__()
        width, num_heads, dropout = config.hidden_dim, config.num_heads, config.dropout
        self.self_attention = Residual(SelfAttention(width, num_heads, dropout), config)
        self.cross_attention = (
            None if context_dim is None else Residual(CrossAttention(width, context_dim, num_heads, dropout), config)
        )
        self.query_feed_forward = Residual(FeedForward(width, config.mlp_dim), config)
        self.text_feed_forward = Residual(FeedForward(width, config.mlp_dim), config) if has_text_branch else None

    def forward(
        self,
        x: Tensor,
        num_queries: int,
        mask: Tensor | None,
        causal: bool,
        image_kv: LayerKV,
        cache: LayerCache | LayerBuffer | None,
    ) -> Tensor:
        """(R, S, D) -> (R, S, D); the first `num_queries` tokens are queries. mask: bool, to (R, H, S, S)."""
        x = self.self_attention(x, mask, causal=causal, cache=cache)
        queries, text = x[:, :num_queries], x[:, num_queries:]
        parts = []
        if num_queries:
            if self.cross_attention is not None:
                queries = self.cross_attention(queries, image_kv)
            parts.append(self.query_feed_forward(queries))
        if self.text_feed_forward is not None and text.shape[1]:
            parts.append(self.text_feed_forward(text))
        return torch.cat(parts, dim=1) if parts else x  # of no texts there are no tokens


class QFormer(nn.Module):
    """Queries and text through layers that share their self-attention.

    context_dim: width of the image tokens. has_text_branch: whether there are word embeddings and text
    feed-forwards, which stage 2 drops. has_lm_head: whether there is the prediction head of ITG.
    """

    def __init__(self, config: QFormerConfig, *, context_dim: int, has_text_branch: bool, has_lm_head: bool) -> None:
        super().__init__()
        self.num_queries = config.num_queries
        self.activation_checkpointing = config.activation_checkpointing
        self.embeddings = QFormerEmbeddings(config, has_text_branch)
        self.layers = nn.ModuleList(
            QFormerLayer(config, None if i % config.cross_attention_every else context_dim, has_text_branch)
            for i in range(config.num_layers)
        )
        self.lm_head = LanguageModelHead(config) if has_lm_head else None

    def pack_words(self) -> None:
        """`LanguageModelHead.pack`, where there is ITG's head."""
        if self.lm_head is not None and self.embeddings.word is not None:
            self.lm_head.pack(self.embeddings.word.weight)

    def image_kv(self, image_tokens: Tensor) -> list[LayerKV]:
        """(B, N, Dv) -> cross-attention keys and values by layer, None in layers without cross-attention."""
        cross_attentions = [cast(QFormerLayer, layer).cross_attention for layer in self.layers]
        return [None if c is None else cast(CrossAttention, c.branch).project(image_tokens) for c in cross_attentions]

    def forward(
        self,
        ids: Tensor | None = None,
        image_kv: Sequence[LayerKV] | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: SelfAttentionCache | DecodingCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """States (R, S, D) of the queries, which are run when `image_kv` of B images is given, then of ids (R, T).

        mask: bool, True where a token may attend, broadcastable to (R, H, S, S); None means everywhere.
        causal: text attends only to what precedes it; for text without queries, or after cached ones. cache:
        receives keys and values; of a `DecodingCache`, mask is over its slots. positions: int64 (T,) of the text, or
        one for all tokens; by default from 0 on.
        """
        with_queries = image_kv is not None
        counted = ids if ids is not None else next(kv.key for kv in image_kv or () if isinstance(kv, KeyValue))
        num_rows = counted.shape[0]
        num_queries = self.num_queries if with_queries else 0
        x: Tensor = self.embeddings(num_rows, with_queries, ids, positions)
        checkpointing = self.activation_checkpointing and self.training
        for i, layer in enumerate(self.layers):
            kv = None if image_kv is None else image_kv[i]
            layer_cache = None if cache is None else cache.layers[i]
            arguments = (x, num_queries, mask, causal, kv)
            if not checkpointing or isinstance(cache, DecodingCache):  # a buffer is written once
                x = layer(*arguments, layer_cache)
                continue
            x, grown = checkpoint(_run_layer_on_copied_cache, layer, layer_cache, *arguments, use_reentrant=False)
            if cache is not None:
                cache.layers[i] = grown
        return x

    def predict_words(self, states: Tensor) -> Tensor:
        """Text states (R, T, D) -> logits (R, T, V). KeyError for a model without ITG's head."""
        if self.lm_head is None or self.embeddings.word is None:
            raise KeyError("This Q-Former has no ITG head, so it cannot write text.")
        return cast(Tensor, self.lm_head(states, self.embeddings.word.weight))


def _run_layer_on_copied_cache(
    layer: nn.Module, cache: LayerCache | None, *arguments: object
) -> tuple[Tensor, LayerCache | None]:
    """Run a layer on a copy of its cache and return its output and the grown copy. The given cache is not changed,
    because activation checkpointing runs the layer again in the backward pass.
    """
    grown = copy(cache)
    return layer(*arguments, grown), grown
