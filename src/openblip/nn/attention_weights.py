"""The weights of an attention in sight, for explanations: who looks where, and what depends on it.

B contexts, K rows of text for each, T text tokens, N context tokens (of a self-attention: the same), H heads,
E head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor

from openblip.nn.attention import CrossAttention, SelfAttention


@contextmanager
def recorded_weights(attention: CrossAttention | SelfAttention) -> Iterator[list[Tensor]]:
    """Inside, `attention` mixes values by a softmax that is written out, with the same result.

    The list it gives receives the weights of every call, float32 or wider (B, H, K * T, N). They are part of
    the graph, so that what comes after can be differentiated with respect to them.
    """
    weights: list[Tensor] = []
    usual = attention.attend

    def attend_in_sight(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        dropout: float = 0.0,
        causal: bool = False,
    ) -> Tensor:
        """As `nn.attention.attend`; (B, H, K * T, E) over (B, H, N, E)."""
        if causal:
            raise ValueError("Attention that is watched is never causal; give its mask.")
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5  # (B, H, K * T, N)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        found = scores.softmax(dim=-1) if scores.itemsize > 4 else scores.float().softmax(dim=-1)
        if not found.requires_grad:  # frozen weights and no gradient from before
            found.requires_grad_()
        weights.append(found)
        return F.dropout(found, dropout).to(value.dtype) @ value

    attention.attend = attend_in_sight
    try:
        yield weights
    finally:
        attention.attend = usual
