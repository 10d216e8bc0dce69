"""The Q-Former once more, slow and obvious: BERT's layers, one row, one head, one token at a time.

Cross-attention to the image in every second layer and for queries only, a feed-forward for queries and one
for text (BLIP-2 section 3.1). Weights are taken from ours by their names.

S tokens, N image tokens, D width, E head width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class PlainQFormer:
    """weights: those of a `QFormer` by name, in any precision; they are used in float64."""

    def __init__(self, weights: dict[str, Tensor], num_heads: int, eps: float) -> None:
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.num_heads = num_heads
        self.eps = eps
        self.num_layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))

    def read(self, ids: list[int], image: Tensor, may_attend: Tensor) -> Tensor:
        """States (S, D) of queries and ids, which see image tokens (N, Dv) and what a mask (S, S) allows."""
        queries = self.weights["embeddings.queries"][0]
        words = [
            self.weights["embeddings.word.weight"][token] + self.weights["embeddings.position.weight"][place]
            for place, token in enumerate(ids)
        ]
        states = [self.norm("embeddings.norm", token) for token in [*queries, *words]]
        for number in range(self.num_layers):
            states = self.layer(f"layers.{number}", states, len(queries), image.double(), may_attend)
        return torch.stack(states)

    def layer(
        self, name: str, states: list[Tensor], num_queries: int, image: Tensor, may_attend: Tensor
    ) -> list[Tensor]:
        query, key, value = self.parts(f"{name}.self_attention.branch.qkv", 3)
        attended = []
        for place, state in enumerate(states):
            seen = [other for column, other in enumerate(states) if may_attend[place, column]]
            mixed = self.attend(query(state), [key(s) for s in seen], [value(s) for s in seen])
            attended.append(self.after(f"{name}.self_attention", state, mixed))
        results = []
        for place, state in enumerate(attended):
            is_query = place < num_queries
            if is_query and f"{name}.cross_attention.norm.weight" in self.weights:
                (ask,) = self.parts(f"{name}.cross_attention.branch.query", 1)
                key, value = self.parts(f"{name}.cross_attention.branch.key_value", 2)
                mixed = self.attend(ask(state), [key(patch) for patch in image], [value(patch) for patch in image])
                state = self.after(f"{name}.cross_attention", state, mixed)
            kind = f"{name}.{'query' if is_query else 'text'}_feed_forward"
            inner = self.linear(f"{kind}.branch.0", state)
            gelu = inner * 0.5 * (1.0 + torch.erf(inner / math.sqrt(2.0)))
            results.append(self.norm(f"{kind}.norm", state + self.linear(f"{kind}.branch.2", gelu)))
        return results

    def attend(self, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Each head's mean of the values (D,), weighted by a softmax of scaled products."""
        width = len(query) // self.num_heads
        heads = []
        for start in range(0, len(query), width):
            part = slice(start, start + width)
            scores = torch.stack([query[part] @ key[part] for key in keys]) / math.sqrt(width)
            weights = scores.exp() / scores.exp().sum()
            heads.append(sum(weight * value[part] for weight, value in zip(weights, values, strict=True)))
        return torch.cat(heads)

    def after(self, name: str, state: Tensor, mixed: Tensor) -> Tensor:
        """BERT's residual: the norm comes last."""
        return self.norm(f"{name}.norm", state + self.linear(f"{name}.branch.out", mixed))

    def parts(self, name: str, count: int) -> list[Callable[[Tensor], Tensor]]:
        """The projections that one of our linear layers holds, one below the other."""
        weights = self.weights[f"{name}.weight"].chunk(count)
        biases = self.weights[f"{name}.bias"].chunk(count)
        return [lambda x, w=w, b=b: w @ x + b for w, b in zip(weights, biases, strict=True)]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean()
        unit = centred / torch.sqrt((centred**2).mean() + self.eps)
        return unit * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
