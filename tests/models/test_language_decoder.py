"""Texts after prompts that a language model has read once. What is written is held to transformers and to plain passes
in test_language_model.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from openblip.generation.decoding import Beam, Nucleus
from openblip.generation.language import best_texts, write_texts
from openblip.models.language_decoder import LanguageDecoder, TextLayer, read_prompts
from openblip.models.language_model import LanguageModel
from tiny_language_models import MODELS, tiny_language_model, visual_prompts

PROMPTS = ["", "Question: how many dogs?", "a photo of"]


@contextmanager
def tokens_read(language: LanguageModel) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens of every forward pass of the (decoder's) layers."""
    shapes: list[tuple[int, int]] = []

    def note(module: Any, inputs: Any, output: Tensor) -> None:
        shapes.append(tuple(output.shape[:2]))

    norms = [part for name, part in language.named_modules() if name.endswith(("final_layer_norm", ".ln_f", ".norm"))]
    hook = norms[-1].register_forward_hook(note)
    yield shapes
    hook.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_prompt_is_read_once_for_all_its_texts(name: str) -> None:
    language, visual = tiny_language_model(name), visual_prompts(3)
    num_read = 1 if language.is_encoder_decoder else 3 + len(language.first_ids) + 6
    for decoding in (
        Nucleus(max_new_tokens=4, min_new_tokens=4, seed=0),
        Beam(num_beams=4, max_new_tokens=4, min_new_tokens=4),
    ):
        with tokens_read(language) as shapes:
            write_texts(language, visual, PROMPTS, decoding, num_captions=4)
        assert shapes == [(3, num_read), (12, 1), (12, 1), (12, 1)]
    with tokens_read(language) as shapes:
        best_texts(language, visual, PROMPTS, [["two dogs", "a small tree", ""]] * 3)
    assert shapes == [(3, num_read), (9, shapes[1][1])]
    assert shapes[1][1] <= 4  # the longest candidate without its end


def buffers(decoder: LanguageDecoder) -> list[Tensor]:
    layers = getattr(decoder.cache, "self_attention_cache", decoder.cache).layers
    assert all(isinstance(layer, TextLayer) for layer in layers)
    return [buffer for layer in layers for buffer in layer._buffers]


@torch.inference_mode()
@pytest.mark.parametrize("name", list(MODELS))
def test_beams_are_reordered_in_place(name: str) -> None:
    """A reordered beam goes on as the one that it comes from, and nothing is allocated anew."""
    language, visual = tiny_language_model(name), visual_prompts(2)
    read = read_prompts(language, visual, PROMPTS[1:], 4)
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    decoder, other = read.texts(rows, 4), read.texts(rows, 4)
    places = [buffer.data_ptr() for buffer in buffers(decoder)]
    first = torch.tensor([5, 6, 7, 8, 9, 10])
    decoder.step(first)
    parents = torch.tensor([[2, 0, 0], [1, 1, 2]])
    order = (parents + torch.tensor([[0], [3]])).flatten()
    other.step(first[order])
    found, expected = decoder.step(first, parents), other.step(first)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=1e-3)
    assert [buffer.data_ptr() for buffer in buffers(decoder)] == places

    kept = decoder.select(torch.tensor([1]))
    torch.testing.assert_close(kept.step(first[3:]), other.step(first)[3:], atol=1e-5, rtol=1e-5)
