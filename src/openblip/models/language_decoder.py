"""Texts that a language model of transformers is writing: prompts are read once, then a token of every text in a step.

The model reads the prompts into a cache of its own. Every text continues it in a row whose keys and values are
allocated once, with room for all that it may get. So a step copies nothing of what was read before, and when beams are
reordered only what they have written moves, since beams of a prompt have the prompt in common.

B prompts, Q visual prompts of each, K texts, R = B * K rows of text (any rows, where given texts are read), S tokens of
a prompt with its visual prompts and padding, T new tokens, H heads, E head width, D width of an encoder's states, V
vocabulary.
"""

import inspect
from collections.abc import Iterable, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

from openblip.errors import ConfigError
from openblip.models.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadPrompts:
    """B prompts that a language model has read, for any number of texts."""

    model: Any
    cache: Any
    """The model's own, of B rows."""
    logits: Tensor
    """(B, V), float32, for the first token of a text."""
    mask: Tensor | None
    """int64 (B, S), 1 at real tokens; None when none is padding."""
    positions: Tensor | None = None
    """int64 (B, 1), of the first token of a text; None where the model counts by itself."""
    encoded: Tensor | None = None
    """(B, S, D), the states of an encoder; None for a decoder."""

    def texts(self, rows: Tensor, num_tokens: int) -> "LanguageDecoder":
        """Begin a text of at most `num_tokens` tokens in each row; rows int64 (R,) are the prompts they continue."""
        mask, encoded = self.mask, self.encoded
        if encoded is not None:  # the decoder attends to keys and values, and reads the shape alone
            encoded = encoded[:1].expand(len(rows), -1, -1)
        elif mask is not None:
            mask = F.pad(mask, (0, num_tokens), value=1)
        return LanguageDecoder(
            model=self.model,
            cache=continue_cache(self.cache, rows, num_tokens),
            texts_per_prompt=len(rows) // len(self.logits),
            mask=None if mask is None else mask[rows],
            positions=None if self.positions is None else self.positions[rows],
            encoded=encoded,
        )


def read_prompts(language: LanguageModel, visual: Tensor, prompts: Sequence[str], num_tokens: int) -> ReadPrompts:
    """Read visual prompts (B, Q, Dl) and text prompts, for texts of at most `num_tokens` tokens after them. Raises
    ConfigError when the model has too few positions.
    """
    model: Any = language.model
    inputs: dict[str, Any] = language.generation_inputs(visual, prompts)
    attention_mask = inputs["attention_mask"]
    length, limit = attention_mask.shape[1], getattr(model.config, "max_position_embeddings", None)
    longest = length if language.is_encoder_decoder else length + num_tokens - 1  # the last is not read
    if limit is not None and longest > limit:  # T5 has none
        raise ConfigError(
            f"Visual prompts and prompt take {length} tokens and max_new_tokens is {num_tokens}: the "
            f"language model reads at most {limit}; give a shorter prompt or ask for fewer tokens."
        )
    mask = None if attention_mask.all() else attention_mask
    encoded = positions = None
    if language.is_encoder_decoder:
        encoded = model.get_encoder()(**inputs)[0]  # (B, S, D)
        start = attention_mask.new_full((len(encoded), 1), model.config.decoder_start_token_id)
        inputs = {"encoder_outputs": (encoded,), "attention_mask": mask, "decoder_input_ids": start}
    else:
        transformer = model.get_base_model() if hasattr(model, "get_base_model") else model  # within peft's adapters
        arguments = inspect.signature(transformer.forward).parameters
        if "position_ids" in arguments:
            counts = attention_mask.cumsum(dim=1)  # (B, S)
            positions = counts[:, -1:]
            inputs["position_ids"] = (counts - 1).clamp(min=0)
        if "logits_to_keep" in arguments:
            inputs["logits_to_keep"] = 1
    output = model(**inputs, use_cache=True)
    logits, cache = output.logits[:, -1].float(), output.past_key_values
    return ReadPrompts(model=model, cache=cache, logits=logits, mask=mask, positions=positions, encoded=encoded)


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageDecoder:
    """R texts that a language model is writing: a `generation.steps.TextDecoder`."""

    model: Any
    cache: Any
    texts_per_prompt: int
    mask: Tensor | None  # (R, S + T) of a decoder, (R, S) of an encoder
    positions: Tensor | None  # (R, 1), of the next tokens
    encoded: Tensor | None

    def read(self, ids: Tensor) -> Tensor:
        """Read the next tokens of every text, ids (R, T): logits (R, T, V) for what follows each."""
        num_new = ids.shape[1]
        inputs: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True, "attention_mask": self.mask}
        if self.encoded is not None:
            inputs |= {"decoder_input_ids": ids, "encoder_outputs": (self.encoded,)}
        else:
            inputs["input_ids"] = ids
            if self.mask is not None:
                inputs["attention_mask"] = self.mask[:, : self.cache.get_seq_length() + num_new]
            if self.positions is not None:
                inputs["position_ids"] = self.positions + torch.arange(num_new, device=ids.device)
                self.positions.add_(num_new)
        return cast(Tensor, self.model(**inputs).logits)

    def step(self, ids: Tensor, parents: Tensor | None = None) -> Tensor:
        """Read the next token of every text, ids (R,): logits (R, V), float32. With parents, int64 (B, K), text k of a
        prompt first becomes what its text parents[k] was.
        """
        if parents is not None:
            reorder_texts(self.cache, parent_rows(parents))
        return self.read(ids[:, None])[:, -1].float()

    def select(self, images: Tensor) -> Self:
        """The texts of these prompts only, int64 (B')."""
        rows = text_rows(images, self.texts_per_prompt)
        return replace(
            self,
            cache=cache_of_rows(self.cache, rows),
            mask=None if self.mask is None else self.mask[rows],
            positions=None if self.positions is None else self.positions[rows],
            encoded=None if self.encoded is None else self.encoded[: len(rows)],
        )


class TextLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of a layer, (R, H, S + T, E): those of the prompt that each row continues, then room for
    `num_tokens` of the text. transformers sees the part that is filled.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, prompts: Any, rows: Tensor, num_tokens: int) -> None:
        """prompts: a layer of transformers' with a row for each prompt."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(prompts.keys, prompts.values)
        num_heads, self._prompt_length = prompts.keys.shape[1:3]
        self._buffers: list[Tensor] = []
        for read in (prompts.keys, prompts.values):
            buffer = read.new_empty(len(rows), num_heads, self._prompt_length + num_tokens, read.shape[3])
            buffer[:, :, : self._prompt_length] = read[rows]
            self._buffers.append(buffer)
        self._fill(self._prompt_length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add those of T tokens, (R, H, T, E), and return all so far."""
        start = self.keys.shape[2]
        self._fill(start + key_states.shape[2])
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r becomes what row beam_idx[r], a text of the same prompt, was."""
        for filled in (self.keys, self.values):
            written = filled[:, :, self._prompt_length :]
            written.copy_(written[beam_idx])

    def of_rows(self, rows: Tensor) -> "TextLayer":
        """The layer of some rows, of any prompts."""
        selected = copy(self)
        selected._buffers = [buffer[rows] for buffer in self._buffers]
        selected._fill(self.keys.shape[2])
        return selected

    def _fill(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def text_rows(prompts: Tensor, texts_per_prompt: int) -> Tensor:
    """The rows of the texts, int64 (R,), of these prompts, int64 (B',)."""
    offsets = torch.arange(texts_per_prompt, device=prompts.device)
    return (prompts[:, None] * texts_per_prompt + offsets).flatten()


def parent_rows(parents: Tensor) -> Tensor:
    """The rows, int64 (R,), of the texts that those of each prompt continue, where parents are int64 (B, K)."""
    return (parents + parents.shape[1] * torch.arange(len(parents), device=parents.device)[:, None]).flatten()


def continue_cache(cache: Any, rows: Tensor, num_tokens: int) -> Any:
    """The cache of B prompts for texts of at most `num_tokens` tokens. rows: int64 (R,), the prompts they follow."""
    layers = [
        TextLayer(layer, rows, num_tokens) if type(layer) is DynamicLayer else _of_rows(layer, rows)
        for layer in _text_layers(cache)
    ]
    return _with_layers(cache, layers, rows)


def cache_of_rows(cache: Any, rows: Tensor) -> Any:
    """The cache of some texts, int64 (R'), of `continue_cache`."""
    return _with_layers(cache, [_of_rows(layer, rows) for layer in _text_layers(cache)], rows)


def reorder_texts(cache: Any, rows: Tensor) -> None:
    """Let each text become what another text of the same prompt was, int64 (R,)."""
    for layer in _text_layers(cache):
        layer.reorder_cache(rows)


def _text_layers(cache: Any) -> list[Any]:
    """The layers of the attention of texts over themselves and, in a decoder, their prompts."""
    return list((cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache).layers)


def _with_layers(cache: Any, layers: Iterable[Any], rows: Tensor) -> Any:
    """A cache with other layers of texts; the keys and values of an encoder become those of `rows`."""
    changed = copy(cache)
    if not isinstance(cache, EncoderDecoderCache):
        changed.layers = list(layers)
        return changed
    changed.self_attention_cache = _with_layers(cache.self_attention_cache, layers, rows)
    encoded = [_of_rows(layer, rows) for layer in cache.cross_attention_cache.layers]
    changed.cross_attention_cache = _with_layers(cache.cross_attention_cache, encoded, rows)
    return changed


def _of_rows(layer: Any, rows: Tensor) -> Any:
    """A layer of any kind (windows and states too, which transformers manages itself) with other rows."""
    if isinstance(layer, TextLayer):
        return layer.of_rows(rows)
    layer = copy(layer) if isinstance(layer, DynamicLayer) else deepcopy(layer)
    layer.reorder_cache(rows)
    return layer
