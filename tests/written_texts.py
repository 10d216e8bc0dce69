"""Token ids that a language model writes, by our search or by that of transformers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from openblip.generation.decoding import Beam
from openblip.generation.language import write_texts
from openblip.models.language_model import LanguageModel


def beam_ids(
    language: LanguageModel,
    visual: Tensor,
    prompts: Sequence[str],
    max_new_tokens: int,
    num_beams: int = 1,
    **more: Any,
) -> list[list[int]]:
    """Without end tokens; one beam is greedy."""
    decoding = Beam(num_beams=num_beams, max_new_tokens=max_new_tokens, **more)
    return [text.ids for (text,) in write_texts(language, visual, prompts, decoding)]


def ids_of_transformers(
    language: LanguageModel, visual: Tensor, prompts: Sequence[str], **settings: Any
) -> list[list[int]]:
    """The same by the `generate` of transformers."""
    model: Any = language.model
    own = model.generation_config
    model.generation_config = type(own)(
        bos_token_id=own.bos_token_id, decoder_start_token_id=own.decoder_start_token_id
    )
    inputs = language.generation_inputs(visual, prompts)
    output = model.generate(
        **inputs, eos_token_id=language.end_id, pad_token_id=language.pad_id, do_sample=False, **settings
    )
    model.generation_config = own
    rows = output[:, int(language.is_encoder_decoder) :].tolist()  # without the decoder's start token
    return [row[: row.index(language.end_id)] if language.end_id in row else row for row in rows]
