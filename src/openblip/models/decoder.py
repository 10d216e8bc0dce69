"""Texts that a model of ours is writing: a step reads one more token of every text, and all earlier ones are kept.

Tensors have fixed shapes, and a step changes them in place. Samples of an image have rows of keys and values of their
own. Beams share one row, in which every token of every beam has a slot, and a mask says which slots hold a beam's own
past: to reorder beams moves the mask and no keys.

A images or other contexts, N samples of each, G = A * N rows of keys and values, K beams of each sample, R = G * K
texts, P tokens of the prompt, F slots before it (the queries of a Q-Former), S slots in all, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor

from openblip.nn.attention import DecodingCache
from openblip.nn.qformer import QFormer
from openblip.nn.text_transformer import TextTransformer


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedDecoder:
    """The texts of A images after their prompt, N * K for each: a `generation.steps.TextDecoder`."""

    transformer: TextTransformer | QFormer
    context_kv: Any
    """The A images as the texts attend to them (`CrossKV`), never copied for samples or beams; None where the texts
    attend to queries in the cache."""
    cache: DecodingCache
    """G rows of S slots."""
    samples: int
    visible: Tensor
    """bool (G, 1, K, S): the slots with a text's own past."""
    slots: Tensor
    """int64 (K,): those of the next tokens, the same in all rows."""
    position: Tensor
    """int64 (1,): of the next tokens."""

    def step(self, ids: Tensor, parents: Tensor | None = None) -> Tensor:
        """Read the next token of every text, ids (R,), and return the logits (R, V), float32, for what follows.
        parents (A, K): before, beam k of an image goes on with the past of its beam parents[k].
        """
        beams = len(self.slots)
        if parents is not None:
            self.visible.copy_(torch.take_along_dim(self.visible, parents[:, None, :, None], dim=2))
        itself = torch.eye(beams, dtype=torch.bool, device=ids.device).expand(len(self.visible), 1, beams, beams)
        self.visible.index_copy_(3, self.slots, itself)
        states = self.transformer(
            ids.view(-1, beams),
            mask=self.visible,
            cache=self.cache.at(self.slots),
            positions=self.position,
            **_of_images(self.context_kv),
        )
        self.slots.add_(beams)
        self.position.add_(1)
        return self.transformer.predict_words(states).flatten(0, 1).float()

    def select(self, images: Tensor | slice) -> Self:
        """The texts of these images, int64 (A'), or as views those of a slice, all with the same number of steps."""

        def of_rows(x: Tensor) -> Tensor:
            return cast(Tensor, x.unflatten(0, (-1, self.samples))[images].flatten(0, 1))

        slots, position = self.slots, self.position
        if not isinstance(images, slice):
            slots, position = slots.clone(), position.clone()
        return replace(
            self,
            context_kv=None if self.context_kv is None else self.context_kv.select(images),
            cache=self.cache.map(of_rows),
            visible=of_rows(self.visible),
            slots=slots,
            position=position,
        )

    def tensors(self) -> list[Tensor]:
        """All tensors that a step reads or changes, except for the model's weights."""
        return [*tensors_of(self.context_kv), *self.cache.tensors(), self.visible, self.slots, self.position]


def read_prompt(
    transformer: TextTransformer | QFormer,
    context_kv: Any,
    cache: DecodingCache,
    prompt_ids: Tensor,
    num_images: int,
    *,
    samples: int,
    beams: int,
    num_prefix: int = 0,
) -> tuple[CachedDecoder, Tensor]:
    """Read the prompt, int64 (P,), once for each image: the decoder of its texts, and the logits (A, V), float32, for
    their first token. cache: its F prefix slots are filled already.
    """
    first = num_prefix + len(prompt_ids)
    slots = torch.arange(cache.num_slots, device=prompt_ids.device)
    prompt_slots = slots[num_prefix:first]
    positions = prompt_slots - num_prefix
    states = transformer(
        prompt_ids.expand(num_images, -1),
        mask=(slots <= prompt_slots[:, None])[None, None],  # (1, 1, P, S)
        cache=cache.at(prompt_slots),
        positions=positions,
        **_of_images(context_kv),
    )
    decoder = CachedDecoder(
        transformer=transformer,
        context_kv=context_kv,
        cache=cache if samples == 1 else cache.map(lambda x: x.repeat_interleave(samples, dim=0)),
        samples=samples,
        visible=(slots < first).repeat(num_images * samples, 1, beams, 1),
        slots=slots[first : first + beams].clone(),
        position=positions[-1:] + 1,
    )
    return decoder, transformer.predict_words(states[:, -1:])[:, 0].float()


def _of_images(context_kv: Any) -> dict[str, Any]:
    """How a transformer is told what texts attend to; a Q-Former has its queries in the cache."""
    return {} if context_kv is None else {"mode": "decode", "context_kv": context_kv.layers}


def tensors_of(nested: Any) -> list[Tensor]:
    """The tensors in tuples and lists of them, of lists and of None, in order."""
    if isinstance(nested, Tensor):
        return [nested]
    return [x for part in nested or () for x in tensors_of(part)]
