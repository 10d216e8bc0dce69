"""Multi-head attention through scaled_dot_product_attention: self, cross, and cross over two images.

Self-attention has caches for training and decoding. Cross-attention needs none: an image's keys and values are
projected once.

B batch or contexts, R = B * K rows of text (K for each context), T text tokens, N context tokens (of an image, or of a
self-attention the same tokens), S key tokens or slots, D width, H heads, E head width.
"""

from collections.abc import Callable
from copy import copy
from typing import NamedTuple, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.nn.dropout import dropout

ModelT = TypeVar("ModelT", bound=nn.Module)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, S, D) -> (B, H, S, E)."""
    heads: Tensor = x.unflatten(-1, (num_heads, -1))
    return heads.transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, S, E) -> (B, S, D)."""
    return x.transpose(1, 2).flatten(2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention of (B, H, T, E) over (B, H, S, E) -> (B, H, T, E)."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        if query.requires_grad:
            return _attend_for_gradients(query, key, value, mask, dropout, causal)
        if not causal and not dropout and not (HAS_AMX and query.shape[2] >= AMX_QUERIES):
            return _attend_by_products(query, key, value, mask)
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal)


HAS_AMX = torch.cpu._is_amx_tile_supported()
AMX_QUERIES = 32
"""From so many queries on torch's fused kernel is the faster one on processors with AMX."""
SCORES_AT_ONCE = 2**22
"""Attention scores that are kept at a time: those of an image of 577 tokens with 12 heads stay in the last cache."""


def _attend_by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as matrix products and a softmax, for as many images at a time as `SCORES_AT_ONCE` allows. In bfloat16
    on CPUs it takes half the time of torch's fused kernel over an image, and a quarter in a decoding step.
    """
    query = query * query.shape[-1] ** -0.5
    hidden = None if mask is None else (~mask).broadcast_to(*query.shape[:3], key.shape[2])
    mixed = torch.empty_like(query)
    num_at_once = max(1, SCORES_AT_ONCE // max(1, query.shape[1] * query.shape[2] * key.shape[2]))
    for start in range(0, len(query), num_at_once):
        images = slice(start, start + num_at_once)
        scores = query[images] @ key[images].transpose(-1, -2)  # (b, H, T, S)
        if hidden is not None:
            scores.masked_fill_(hidden[images], float("-inf"))
        mixed[images] = scores.softmax(dim=-1) @ value[images]
    return mixed


def _attend_for_gradients(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, probability: float, causal: bool
) -> Tensor:
    """Attention as matrix products and a softmax, which keeps its weights. In bfloat16 on CPUs the backward pass of
    torch's fused kernel takes more than twice as long, also in float32.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # (B, H, T, S)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return dropout(scores.softmax(dim=-1), probability) @ value


class LayerCache:
    """Keys and values of one layer for the tokens so far, concatenated so that gradients flow: for training after a
    shared prefix, and for exported steps, whose cache grows.
    """

    def __init__(self) -> None:
        self.length = 0
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add (R, H, T, E) and return the keys and values of all tokens so far, (R, H, length, E)."""
        if self.key is not None and self.value is not None:
            key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
        self.key, self.value, self.length = key, value, key.shape[2]
        return key, value


class SelfAttentionCache:
    """One `LayerCache` per layer. It can be copied, to branch."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return self.layers[0].length

    def copy(self) -> "SelfAttentionCache":
        """A cache that continues from here; this one does not change."""
        other = SelfAttentionCache(0)
        other.layers = [copy(layer) for layer in self.layers]
        return other


class LayerBuffer:
    """Keys and values of one layer for decoding: a buffer of fixed shape (R, H, S, E), in which every token has a slot.
    `slots`, int64 (T,), are those of the tokens that are read next. A mask says which slots hold what a token may see.
    """

    slots: Tensor

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (R, H, T, E) into `slots`, and return all slots, (R, H, S, E)."""
        if self.key is None or self.value is None:
            shape = (*key.shape[:2], self.num_slots, key.shape[3])
            self.key, self.value = key.new_zeros(shape), value.new_zeros(shape)  # what is masked must be finite
        return self.key.index_copy_(2, self.slots, key), self.value.index_copy_(2, self.slots, value)


class DecodingCache:
    """One `LayerBuffer` per layer; the first tokens that are read decide the number of rows."""

    def __init__(self, num_layers: int, num_slots: int) -> None:
        self.num_slots = num_slots
        self.layers = [LayerBuffer(num_slots) for _ in range(num_layers)]

    def at(self, slots: Tensor) -> Self:
        """This cache, for reading the tokens of these slots next."""
        for layer in self.layers:
            layer.slots = slots
        return self

    def map(self, change: Callable[[Tensor], Tensor]) -> "DecodingCache":
        """A cache whose keys and values, each (R, H, S, E), are changed: rows are selected, say, or repeated."""
        other = DecodingCache(0, self.num_slots)
        for layer in self.layers:
            changed = copy(layer)
            changed.key, changed.value = (None if x is None else change(x) for x in (layer.key, layer.value))
            other.layers.append(changed)
        return other

    def tensors(self) -> list[Tensor]:
        """All keys and values."""
        return [x for layer in self.layers for x in (layer.key, layer.value) if x is not None]


class SelfAttention(nn.Module):
    """Attention of a sequence over itself, optionally causal and with a cache of earlier tokens."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim)
        self.out = nn.Linear(hidden_dim, hidden_dim)
        self.attend = attend  # an attribute, so that `record_attention` can replace it

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, cache: LayerCache | LayerBuffer | None = None
    ) -> Tensor:
        """(R, T, D) -> (R, T, D).

        mask: bool, True where a key may be attended, broadcastable to (R, H, T, S); None means everywhere. causal:
        token t attends to tokens up to t; with a buffer its mask says so. cache: holds earlier tokens; those of x are
        added to it.
        """
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        if cache is not None:
            k, v = cache.append(k, v)
        if isinstance(cache, LayerBuffer) or q.shape[2] == 1:  # a single query is the last token
            causal = False
        elif causal and (cache is not None or mask is not None):
            num_queries, num_keys = q.shape[2], k.shape[2]  # the queries are the last of the keys
            causal_mask = x.new_ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)  # (T, S)
            mask = causal_mask if mask is None else mask & causal_mask
            causal = False
        mixed = self.attend(q, k, v, mask, self.dropout if self.training else 0.0, causal)
        return cast(Tensor, self.out(merge_heads(mixed)))


class KeyValue(NamedTuple):
    """Projected keys and values of B contexts, each (B, H, S, E)."""

    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    """bool (B, 1, 1, S), True at real tokens; None when none is padding."""

    def select(self, index: Tensor | slice) -> "KeyValue":
        """Keys and values of the contexts in `index`, int64 (B'), repeats allowed; of a slice as a view."""
        mask = None if self.mask is None else self.mask[index]
        return KeyValue(self.key[index], self.value[index], mask)


class CrossAttention(nn.Module):
    """Attention of text over a context: the tokens of its image, or of another text. `project` computes a context's
    keys and values once; `forward` may then be called for any number of texts.
    """

    def __init__(self, hidden_dim: int, context_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(hidden_dim, hidden_dim)
        self.key_value = nn.Linear(context_dim, 2 * hidden_dim)
        self.out = nn.Linear(hidden_dim, hidden_dim)
        self.attend = attend  # an attribute, so that `record_attention` can replace it

    def project(self, context: Tensor, mask: Tensor | None = None) -> KeyValue:
        """(B, N, Dc), and bool (B, N), True at real tokens -> keys and values, each (B, H, N, E)."""
        key, value = (split_heads(part, self.num_heads) for part in self.key_value(context).chunk(2, dim=-1))
        if context.device.type == "cpu" and not torch.is_grad_enabled():
            key, value = key.contiguous(), value.contiguous()  # once here, not in every step that reads them
        return KeyValue(key, value, None if mask is None else mask[:, None, None, :])

    def forward(self, x: Tensor, context_kv: KeyValue) -> Tensor:
        """(R, T, D) over B contexts -> (R, T, D); K consecutive rows belong to one context. The K rows are folded into
        the query axis, so a context's keys and values are never copied.
        """
        num_rows, num_tokens, _ = x.shape
        num_contexts = context_kv.key.shape[0]
        if num_rows % num_contexts:
            raise ValueError(f"{num_rows} rows of text do not divide over {num_contexts} images or contexts.")
        folded = self.query(x).reshape(num_contexts, -1, x.shape[-1])  # (B, K*T, D)
        query = split_heads(folded, self.num_heads)
        dropout = self.dropout if self.training else 0.0
        mixed = self.attend(query, context_kv.key, context_kv.value, context_kv.mask, dropout=dropout)
        return cast(Tensor, self.out(merge_heads(mixed).reshape(num_rows, num_tokens, -1)))


class PairKeyValue(NamedTuple):
    """Keys and values of two images."""

    first: KeyValue
    second: KeyValue

    def select(self, index: Tensor | slice) -> "PairKeyValue":
        return PairKeyValue(self.first.select(index), self.second.select(index))


LayerKV = KeyValue | PairKeyValue | None
"""What a layer attends to; None for text alone, and in layers without cross-attention."""


class PairCrossAttention(nn.Module):
    """Attention of text over two images, with a branch for each (BLIP section 5.4, Figure 5b). The branches are merged
    by their mean, or with `learned_merge` by a linear layer over both.
    """

    def __init__(self, hidden_dim: int, context_dim: int, num_heads: int, dropout: float, learned_merge: bool) -> None:
        super().__init__()
        self.first = CrossAttention(hidden_dim, context_dim, num_heads, dropout)
        self.second = CrossAttention(hidden_dim, context_dim, num_heads, dropout)
        self.merge = nn.Linear(2 * hidden_dim, hidden_dim) if learned_merge else None

    def project(self, context: Tensor, mask: Tensor | None = None) -> PairKeyValue:
        """(B, 2, N, Dc) -> keys and values of both images."""
        if mask is not None:
            raise ValueError("Two images have no padding: pass no mask.")
        return PairKeyValue(self.first.project(context[:, 0]), self.second.project(context[:, 1]))

    def forward(self, x: Tensor, context_kv: PairKeyValue) -> Tensor:
        """(R, T, D) over B pairs of images -> (R, T, D)."""
        first, second = self.first(x, context_kv.first), self.second(x, context_kv.second)
        if self.merge is None:
            return cast(Tensor, (first + second) / 2)
        return cast(Tensor, self.merge(torch.cat([first, second], dim=-1)))


def record_attention(model: ModelT, attention: CrossAttention | SelfAttention) -> tuple[ModelT, list[Tensor]]:
    """A view of `model` that records the weights of one of its attentions, for explanations. The list receives those of
    each forward pass of the view, float32 or wider (B, H, K * T, N). They are part of the graph, so that outputs can be
    differentiated with respect to them: the softmax is computed explicitly, with equal results.

    The view shares all weights and all modules, except that attention and those around it: the model itself does not
    change, so it may meanwhile run in other threads, in other views too.
    """
    weights: list[Tensor] = []

    def attend_and_record(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        dropout: float = 0.0,
        causal: bool = False,
    ) -> Tensor:
        if causal:
            raise ValueError("Recorded attention is never causal; give its mask.")
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # (B, H, K * T, N)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        probs = scores.softmax(dim=-1) if scores.itemsize > 4 else scores.float().softmax(dim=-1)
        if not probs.requires_grad:  # frozen weights and no gradient from before
            probs.requires_grad_()
        weights.append(probs)
        return F.dropout(probs, dropout).to(value.dtype) @ value

    name = next(name for name, module in model.named_modules() if module is attention)
    view = copy(model)
    module: nn.Module = view
    for part in filter(None, name.split(".")):
        inner = copy(module.get_submodule(part))
        module._modules = {**module._modules, part: inner}
        module = inner
    module.attend = attend_and_record  # type: ignore[assignment]
    return view, weights
