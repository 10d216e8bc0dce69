"""One text transformer with two modes: `encode` attends both ways, `decode` causally (BLIP section 3.1).

Encoder and decoder are the same layers except for what the paper's Table 3 separates: `ByMode` holds one
module for both modes or one for each, so sharing is structure and no weights are tied afterwards.

B images, R = B * K rows of text, T text tokens, N image tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Generic, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openblip.nn.attention import CrossAttention, KeyValue, PairCrossAttention, PairKeyValue, SelfAttention
from openblip.nn.kv_cache import LayerCache, SelfAttentionCache

_Mode = Literal["encode", "decode"]
M = TypeVar("M", bound=nn.Module)
ContextKeyValue = KeyValue | PairKeyValue


class ByMode(nn.Module, Generic[M]):
    """One module for every mode (`shared`), or one for each."""

    def __init__(self, make: Callable[[_Mode], M], modes: Sequence[_Mode], shared: bool) -> None:
        super().__init__()
        self.variants = nn.ModuleDict({"shared": make(modes[0])} if shared else {m: make(m) for m in modes})
        self.modes = tuple(modes)
        self.shared = shared

    def __getitem__(self, mode: _Mode) -> M:
        """The module of `mode`. Raises KeyError when the model does not have this mode."""
        if mode not in self.modes:
            raise KeyError(f"This model cannot {mode}; it has {', '.join(self.modes)}.")
        return cast(M, self.variants["shared" if self.shared else mode])


class TextEmbeddings(nn.Module):
    """Word plus position embedding, normalised. BLIP has no token types."""

    def __init__(self, vocab_size: int, max_positions: int, hidden_dim: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, hidden_dim)
        self.position = nn.Embedding(max_positions, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        """ids (R, T) whose first token stands at position `start` -> (R, T, D)."""
        return cast(Tensor, self.dropout(self.norm(embed_words(self.word, self.position, ids, start))))


def embed_words(word: nn.Embedding, position: nn.Embedding, ids: Tensor, start: int) -> Tensor:
    """Words plus positions of ids (R, T) whose first token stands at `start` -> (R, T, D).

    Raises ValueError for more tokens than positions, which on a GPU would only be a device assertion.
    """
    end = start + ids.shape[1]
    if end > position.num_embeddings:
        raise ValueError(f"A text of {end} tokens: the model has {position.num_embeddings} positions.")
    return cast(Tensor, word(ids) + position(torch.arange(start, end, device=ids.device)))


def feed_forward(hidden_dim: int, mlp_dim: int) -> nn.Sequential:
    """A feed-forward of BERT, (R, T, D) -> (R, T, D)."""
    return nn.Sequential(nn.Linear(hidden_dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, hidden_dim))


class Residual(nn.Module):
    """norm(x + dropout(branch(x, ...))): BERT's post-norm residual around attention."""

    def __init__(self, branch: nn.Module, hidden_dim: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.branch = branch
        self.norm = nn.LayerNorm(hidden_dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(R, T, D) -> (R, T, D)."""
        return cast(Tensor, self.norm(x + self.dropout(self.branch(x, *args, **kwargs))))


class MedLayer(nn.Module):
    """Self-attention, cross-attention to the image and a feed-forward, each shared by the modes as configured.

    `cross_attention` makes the attention of a mode: a CrossAttention, or over two images a PairCrossAttention.
    """

    def __init__(
        self,
        *,
        cross_attention: Callable[[_Mode], nn.Module],
        hidden_dim: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float,
        eps: float,
        modes: Sequence[_Mode],
        shared: frozenset[str],
    ) -> None:
        super().__init__()

        def residual(branch: nn.Module) -> Residual:
            return Residual(branch, hidden_dim, dropout, eps)

        self.self_attention = ByMode(
            lambda mode: residual(SelfAttention(hidden_dim, num_heads, dropout)), modes, "self_attention" in shared
        )
        self.cross_attention = ByMode(lambda mode: residual(cross_attention(mode)), modes, "cross_attention" in shared)
        self.feed_forward = ByMode(
            lambda mode: residual(feed_forward(hidden_dim, mlp_dim)), modes, "feed_forward" in shared
        )

    def forward(
        self, x: Tensor, mode: _Mode, mask: Tensor | None, context_kv: ContextKeyValue | None, cache: LayerCache | None
    ) -> Tensor:
        """(R, T, D) -> (R, T, D). mask: bool (R, 1, 1, S), True at real tokens; without context_kv, text alone."""
        x = self.self_attention[mode](x, mask, causal=mode == "decode", cache=cache)
        if context_kv is not None:
            x = self.cross_attention[mode](x, context_kv)
        return cast(Tensor, self.feed_forward[mode](x))


class LanguageModelHead(nn.Module):
    """BERT's prediction head: transform, normalise, compare with every word embedding."""

    def __init__(self, hidden_dim: int, vocab_size: int, eps: float) -> None:
        super().__init__()
        self.transform = nn.Linear(hidden_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        """(R, T, D) and the (V, D) word embeddings of the decoder -> logits (R, T, V)."""
        return F.linear(self.norm(F.gelu(self.transform(x))), word_embeddings, self.bias)


_SHARED_PARTS: dict[str, frozenset[str]] = {  # BLIP Table 3
    "all": frozenset({"embeddings", "self_attention", "cross_attention", "feed_forward"}),
    "all_but_ca": frozenset({"embeddings", "self_attention", "feed_forward"}),
    "all_but_sa": frozenset({"embeddings", "cross_attention", "feed_forward"}),
    "none": frozenset(),
}


class TextTransformer(nn.Module):
    """The text side of MED: unimodal encoder, image-grounded encoder and image-grounded decoder in one."""

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_dim: int,
        context_dims: Mapping[_Mode, int],
        images_per_text: Literal[1, 2] = 1,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        max_positions: int,
        dropout: float,
        layer_norm_eps: float,
        sharing: str,
        modes: Sequence[_Mode],
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        shared = _SHARED_PARTS[sharing]
        self.activation_checkpointing = activation_checkpointing
        self.shares_cross_attention = "cross_attention" in shared
        self.embeddings = ByMode(
            lambda mode: TextEmbeddings(vocab_size, max_positions, hidden_dim, dropout, layer_norm_eps),
            modes,
            "embeddings" in shared,
        )

        def cross_attention(layer: int, mode: _Mode) -> nn.Module:
            if images_per_text == 1:
                return CrossAttention(hidden_dim, context_dims[mode], num_heads, dropout)
            learned_merge = layer >= num_layers // 2  # BLIP section 5.4: the mean in the first six of twelve
            return PairCrossAttention(hidden_dim, context_dims[mode], num_heads, dropout, learned_merge)

        self.layers = nn.ModuleList(
            MedLayer(
                cross_attention=partial(cross_attention, layer),
                hidden_dim=hidden_dim,
                num_heads=num_heads,
                mlp_dim=mlp_dim,
                dropout=dropout,
                eps=layer_norm_eps,
                modes=modes,
                shared=shared,
            )
            for layer in range(num_layers)
        )
        self.lm_head = LanguageModelHead(hidden_dim, vocab_size, layer_norm_eps) if "decode" in modes else None

    def context_kv(self, context: Tensor, mode: _Mode, mask: Tensor | None = None) -> list[ContextKeyValue]:
        """Cross-attention keys and values of every layer, for the context that texts attend to.

        context: image tokens (B, N, Dv), those of two images (B, 2, N, Dv), or the states of another text
        (B, T, D), whose mask is bool (B, T), True at real tokens.
        """
        branches = [cast(MedLayer, layer).cross_attention[mode].branch for layer in self.layers]
        return [cast(CrossAttention | PairCrossAttention, branch).project(context, mask) for branch in branches]

    def forward(
        self,
        ids: Tensor,
        mode: _Mode,
        mask: Tensor | None = None,
        context_kv: Sequence[ContextKeyValue] | None = None,
        cache: SelfAttentionCache | None = None,
    ) -> Tensor:
        """Hidden states (R, T, D) of ids (R, T).

        mask: bool (R, T), True at real tokens; None when none is padding. Not with a cache, whose rows
        have no padding. context_kv: per layer, of B contexts, R = B * K; None for text alone.
        """
        if cache is not None and mask is not None:
            raise ValueError("A cached step has no padding: pass a mask or a cache, not both.")
        x: Tensor = self.embeddings[mode](ids, start=0 if cache is None else cache.length)
        key_mask = None if mask is None else mask[:, None, None, :]
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
