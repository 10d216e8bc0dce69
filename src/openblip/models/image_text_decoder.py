"""Texts that an image-text-to-text model of transformers is writing, whatever its architecture.

The model prepares its inputs itself, as its `generate` does: positions, masks and caches of each architecture are in
its own code. Images and prompt are read once, into a cache that all texts of an image continue.

B images with their prompts, R rows of text, K texts of an image, S tokens of a prompt with those of its image, T tokens
so far, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from openblip.models.language_decoder import cache_of_rows, continue_cache, parent_rows, reorder_texts, text_rows

_OF_IMAGES = ("pixel_", "image_")  # beginnings of the inputs that are read with the prompt, and not again


@dataclass(kw_only=True, eq=False)
class ImageTextDecoder:
    """The texts of B images: a `generation.steps.TextDecoder`. At first each image has one text, its prompt."""

    model: Any
    ids: Tensor
    """int64 (R, S + T), with the prompts."""
    inputs: dict[str, Any]
    """What the model keeps from step to step besides ids: the cache, and of each row mask and positions."""
    adjust: Any
    """What the checkpoint demands of its texts (tokens that are never written, or that begin each): ids and logits in,
    logits out, transformers' `LogitsProcessorList`. What it rules out has no probability; in the beam search of
    transformers it keeps its share.
    """
    end_ids: Sequence[int]
    """The tokens that end a text; all of them count as the first."""
    texts_per_image: int = 1

    def texts(self, texts_per_image: int, num_tokens: int) -> Self:
        """Begin so many texts of each image, of at most `num_tokens` tokens."""
        images = torch.arange(len(self.ids), device=self.ids.device)
        rows = images.repeat_interleave(texts_per_image)
        cache = continue_cache(self.inputs["past_key_values"], rows, num_tokens)
        inputs = {**_rows_of(self.inputs, rows, len(images)), "past_key_values": cache}
        return replace(self, ids=self.ids[rows], inputs=inputs, texts_per_image=texts_per_image)

    def step(self, ids: Tensor, parents: Tensor | None = None) -> Tensor:
        """Read the next token of every text, ids (R,): logits (R, V), float32. With parents, int64 (B, K), text k of an
        image first becomes what its text parents[k] was.
        """
        if parents is not None:  # masks and positions are the same in all texts of an image
            rows = parent_rows(parents)
            reorder_texts(self.inputs["past_key_values"], rows)
            self.ids = self.ids[rows]
        self.ids = torch.cat([self.ids, ids[:, None]], dim=1)
        return self._read(next_sequence_length=1)

    def select(self, images: Tensor) -> Self:
        """The texts of these images only, int64 (B')."""
        rows = text_rows(images, self.texts_per_image)
        cache = cache_of_rows(self.inputs["past_key_values"], rows)
        inputs = {**_rows_of(self.inputs, rows, len(self.ids)), "past_key_values": cache}
        return replace(self, ids=self.ids[rows], inputs=inputs)

    def _read(self, **how: Any) -> Tensor:
        """Read what is new of `ids`: logits (R, V), float32, for what follows."""
        given = self.model.prepare_inputs_for_generation(self.ids, **how, **self.inputs)
        output = self.model(**given, return_dict=True)
        is_encoder_decoder = self.model.config.is_encoder_decoder
        self.inputs = self.model._update_model_kwargs_for_generation(
            output, self.inputs, is_encoder_decoder=is_encoder_decoder
        )
        logits: Tensor = self.adjust(self.ids, output.logits[:, -1].float())
        if len(self.end_ids) > 1:
            ends = logits[:, self.end_ids].logsumexp(dim=1)
            logits = logits.index_fill(1, torch.tensor(self.end_ids, device=logits.device), -torch.inf)
            logits[:, self.end_ids[0]] = ends
        return logits


def read_image_prompts(
    model: Any, inputs: Mapping[str, Tensor], num_tokens: int, end_ids: Sequence[int]
) -> tuple[ImageTextDecoder, Tensor]:
    """Read images and prompts, once, for texts of at most `num_tokens` tokens: the decoder, whose `texts` continue
    them, and the logits (B, V), float32, for their first token.

    inputs: of the model's processor, without padding: B images that give equally many tokens.
    """

    def read(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kept: Any,
    ) -> tuple[ImageTextDecoder, Tensor]:
        """Called by `generate` in place of its own search, with everything as the architecture wants it."""
        decoder = ImageTextDecoder(
            model=model, ids=input_ids, inputs=kept, adjust=logits_processor, end_ids=tuple(end_ids)
        )
        logits = decoder._read(is_first_iteration=True)
        decoder.inputs = {name: x for name, x in decoder.inputs.items() if not name.startswith(_OF_IMAGES)}
        return decoder, logits

    # How texts are searched and sampled is said by our own settings, not by the checkpoint's.
    neutral = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    found: tuple[ImageTextDecoder, Tensor] = model.generate(
        **inputs, **neutral, custom_generate=read, max_new_tokens=num_tokens, min_new_tokens=0, use_cache=True
    )
    return found


def _rows_of(inputs: Mapping[str, Any], rows: Tensor, num_rows: int) -> dict[str, Any]:
    """The inputs of some of `num_rows` rows; what is not of rows stays."""

    def select(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):  # the states of an encoder
            return type(value)(**{key: select(key, each) for key, each in value.items()})
        dim = 1 if name == "position_ids" and isinstance(value, Tensor) and value.ndim == 3 else 0  # (3, R, S + T)
        if isinstance(value, Tensor) and value.ndim > dim and value.shape[dim] == num_rows:
            return value.index_select(dim, rows)
        return value

    return {name: select(name, value) for name, value in inputs.items()}
