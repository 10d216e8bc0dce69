"""One text transformer with two modes: `encode` attends both ways, `decode` causally (BLIP section 3.1).

Encoder and decoder are the same layers except for what the paper's Table 3 separates: `ByMode` holds one
module for both modes or one for each, so sharing is structure and no weights are tied afterwards.

B images, R = B * K rows of text, T text tokens, S slots of a cache, N image tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Generic, Literal, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openblip.nn.attention import CrossAttention, DecodingCache, LayerBuffer, LayerKV, PairCrossAttention, SelfAttention
from openblip.nn.config import Mode, QFormerConfig, Sharing, TextConfig
from openblip.nn.dropout import Dropout
from openblip.nn.linear import FeedForward, PackedLinear

M = TypeVar("M", bound=nn.Module)


class ByMode(nn.Module, Generic[M]):
    """One module for every mode (`shared`), or one for each."""

    def __init__(self, make: Callable[[Mode], M], modes: Sequence[Mode], shared: bool) -> None:
        super().__init__()
        self.variants = nn.ModuleDict({"shared": make(modes[0])} if shared and modes else {m: make(m) for m in modes})
        self.modes = tuple(modes)
        self.shared = shared

    def __getitem__(self, mode: Mode) -> M:
        """The module of `mode`. Raises KeyError when the model does not have this mode."""
        if mode not in self.modes:
            raise KeyError(f"This model cannot {mode}; it has {', '.join(self.modes)}.")
        return cast(M, self.variants["shared" if self.shared else mode])


class TextEmbeddings(nn.Module):
    """Word plus position embedding, normalised. BLIP has no token types."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.position = nn.Embedding(config.max_positions, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """ids (R, T) at `positions`, int64 (T,) or one for all, by default from 0 on -> (R, T, D)."""
        return cast(Tensor, self.dropout(self.norm(embed_words(self.word, self.position, ids, positions))))


def embed_words(word: nn.Embedding, position: nn.Embedding, ids: Tensor, positions: Tensor | None) -> Tensor:
    """Words plus positions of ids (R, T) -> (R, T, D). positions: int64 (T,), or (1,) for all; None means from 0 on,
    with a ValueError for more tokens than positions, which on a GPU would only be a device assertion.
    """
    if positions is None:
        check_length(ids.shape[1], position)
        positions = torch.arange(ids.shape[1], device=ids.device)
    return cast(Tensor, word(ids) + position(positions))


def check_length(num_tokens: int, position: nn.Embedding) -> None:
    """Raise ValueError for a text of more tokens than the model has positions."""
    if num_tokens > position.num_embeddings:
        raise ValueError(f"A text of {num_tokens} tokens: the model has {position.num_embeddings} positions.")


class Residual(nn.Module):
    """norm(x + dropout(branch(x, ...))): BERT's post-norm residual around attention."""

    def __init__(self, branch: nn.Module, config: TextConfig | QFormerConfig) -> None:
        super().__init__()
        self.branch = branch
        self.norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(R, T, D) -> (R, T, D)."""
        return cast(Tensor, self.norm(x + self.dropout(self.branch(x, *args, **kwargs))))


_SHARED_PARTS: dict[Sharing, frozenset[str]] = {  # BLIP Table 3
    "all": frozenset({"embeddings", "self_attention", "cross_attention", "feed_forward"}),
    "all_but_ca": frozenset({"embeddings", "self_attention", "feed_forward"}),
    "all_but_sa": frozenset({"embeddings", "cross_attention", "feed_forward"}),
    "none": frozenset(),
}


class MedLayer(nn.Module):
    """Self-attention, cross-attention to the image and a feed-forward, each shared by the modes as configured.
    `cross_attention` makes the attention of a mode: a CrossAttention, or over two images a PairCrossAttention.
    context_modes: those that attend to something else than the text.
    """

    def __init__(
        self,
        config: TextConfig,
        modes: Sequence[Mode],
        cross_attention: Callable[[Mode], nn.Module],
        context_modes: Sequence[Mode],
    ) -> None:
        super().__init__()

        def by_mode(part: str, make: Callable[[Mode], nn.Module], modes: Sequence[Mode] = modes) -> ByMode[Residual]:
            return ByMode(lambda mode: Residual(make(mode), config), modes, part in _SHARED_PARTS[config.sharing])

        width, num_heads = config.hidden_dim, config.num_heads
        self.self_attention = by_mode("self_attention", lambda _: SelfAttention(width, num_heads, config.dropout))
        self.cross_attention = by_mode("cross_attention", cross_attention, context_modes)
        self.feed_forward = by_mode("feed_forward", lambda _: FeedForward(width, config.mlp_dim))

    def forward(
        self, x: Tensor, mode: Mode, mask: Tensor | None, context_kv: LayerKV, cache: LayerBuffer | None
    ) -> Tensor:
        """(R, T, D) -> (R, T, D). mask: bool, True where a token may attend, broadcastable to (R, H, T, S)."""
        x = self.self_attention[mode](x, mask, causal=mode == "decode", cache=cache)
        if context_kv is not None:
            x = self.cross_attention[mode](x, context_kv)
        return cast(Tensor, self.feed_forward[mode](x))


class LanguageModelHead(nn.Module):
    """BERT's prediction head: transform, normalise, compare with every word embedding."""

    def __init__(self, config: TextConfig | QFormerConfig) -> None:
        super().__init__()
        self.transform = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self._packed: tuple[PackedLinear] | None = None  # a tuple, so that it is no part of the state

    def pack(self, word_embeddings: Tensor) -> None:
        """Keep a copy of the (V, D) word embeddings as `PackedLinear` holds weights, for inference on the CPU. It is
        float32: logits that are rounded to bfloat16 are often equal, and a fiftieth of the tokens would be others.
        """
        self._packed = (PackedLinear(word_embeddings.float(), self.bias.float()),)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._packed = None  # moved or cast, the head compares with the word embeddings themselves
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        """(R, T, D) and the (V, D) word embeddings of the decoder -> logits (R, T, V)."""
        states = self.norm(F.gelu(self.transform(x)))
        if self._packed is not None:
            return cast(Tensor, self._packed[0](states.float()))
        return F.linear(states, word_embeddings, self.bias)


class TextTransformer(nn.Module):
    """The text side of MED: unimodal encoder, image-grounded encoder and image-grounded decoder in one. context_dims:
    width of what each mode attends to; a mode that reads text alone has none. has_mlm_head: whether the encoder
    predicts masked words.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        modes: Sequence[Mode],
        context_dims: Mapping[Mode, int],
        images_per_text: Literal[1, 2] = 1,
        has_mlm_head: bool = False,
    ) -> None:
        super().__init__()
        shared = _SHARED_PARTS[config.sharing]
        self.activation_checkpointing = config.activation_checkpointing
        self.shares_cross_attention = "cross_attention" in shared
        self.embeddings = ByMode(lambda mode: TextEmbeddings(config), modes, "embeddings" in shared)

        def cross_attention(layer: int, mode: Mode) -> nn.Module:
            shape = (config.hidden_dim, context_dims[mode], config.num_heads, config.dropout)
            if images_per_text == 1:
                return CrossAttention(*shape)
            # BLIP section 5.4: the mean in the first six of twelve
            return PairCrossAttention(*shape, learned_merge=layer >= config.num_layers // 2)

        context_modes = [mode for mode in modes if mode in context_dims]
        self.layers = nn.ModuleList(
            MedLayer(config, modes, partial(cross_attention, layer), context_modes)
            for layer in range(config.num_layers)
        )
        self.lm_head = LanguageModelHead(config) if "decode" in modes else None
        self.mlm_head = LanguageModelHead(config) if has_mlm_head else None

    def pack_words(self) -> None:
        """`LanguageModelHead.pack`, where there is a decoder."""
        if self.lm_head is not None:
            self.lm_head.pack(self.embeddings["decode"].word.weight)

    def context_kv(self, context: Tensor, mode: Mode, mask: Tensor | None = None) -> list[LayerKV]:
        """Cross-attention keys and values of every layer, for the context that texts attend to.

        context: image tokens (B, N, Dv), those of two images (B, 2, N, Dv), or the states of another text
        (B, T, D), whose mask is bool (B, T), True at real tokens.
        """
        branches = [cast(MedLayer, layer).cross_attention[mode].branch for layer in self.layers]
        return [cast(CrossAttention | PairCrossAttention, branch).project(context, mask) for branch in branches]

    def forward(
        self,
        ids: Tensor,
        mode: Mode,
        mask: Tensor | None = None,
        context_kv: Sequence[LayerKV] | None = None,
        cache: DecodingCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (R, T, D) of ids (R, T). mask: bool (R, T), True at real tokens; None when none is padding.
        context_kv: per layer, of B contexts, R = B * K; None for text alone. positions: int64 (T,), or one for all
        tokens; by default from 0 on. With a cache, which has earlier tokens, mask says which of its slots each token
        attends to, bool, broadcastable to (R, 1, T, S).
        """
        x: Tensor = self.embeddings[mode](ids, positions)
        key_mask = mask if mask is None or cache is not None else mask[:, None, None, :]
        for i, layer in enumerate(self.layers):
            kv = None if context_kv is None else context_kv[i]
            layer_cache = None if cache is None else cache.layers[i]
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, x, mode, key_mask, kv, layer_cache, use_reentrant=False)
            else:
                x = layer(x, mode, key_mask, kv, layer_cache)
        return x

    def predict_words(self, hidden: Tensor) -> Tensor:
        """Decoder states (R, T, D) -> logits (R, T, V). KeyError for a model without a decoder."""
        if self.lm_head is None:
            raise KeyError("This model has no decoder.")
        return cast(Tensor, self.lm_head(hidden, self.embeddings["decode"].word.weight))

    def predict_masked(self, hidden: Tensor) -> Tensor:
        """Encoder states (R, T, D) -> logits (R, T, V). KeyError for a model that predicts no masked words."""
        if self.mlm_head is None:
            raise KeyError("This model has no head for masked words.")
        return cast(Tensor, self.mlm_head(hidden, self.embeddings["encode"].word.weight))
