"""Captioners that we wrote, run by transformers alone: the prompt in generation_config.json has to be given."""

from pathlib import Path
from typing import Any

import blip2_cases as blip2
import pytest
import torch
import transformers

import openblip
from openblip.checkpoints.loading import load_checkpoint

pytestmark = pytest.mark.slow

DECODINGS: list[tuple[openblip.Greedy | openblip.Beam, dict[str, int]]] = [
    (openblip.Greedy(max_new_tokens=8), {"num_beams": 1}),
    (openblip.Beam(num_beams=3, max_new_tokens=8), {"num_beams": 3}),
]


def captions_of_transformers(folder: Path, class_name: str, images: list[Any], **settings: Any) -> list[str]:
    theirs = getattr(transformers, class_name).from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    prompt = theirs.generation_config.prompt
    inputs = processor(images=images, text=[prompt] * len(images), return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        ids = theirs.generate(**inputs, max_new_tokens=8, do_sample=False, **settings)
    texts = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    assert all(text.startswith(prompt.strip()) for text in texts)
    return [text.removeprefix(prompt.strip()).strip() for text in texts]


@pytest.mark.parametrize(("decoding", "settings"), DECODINGS)
def test_a_blip(tmp_path: Path, images: list[Any], decoding: Any, settings: dict[str, int]) -> None:
    model = openblip.load("openblip-mini-captioner")
    model.save(tmp_path, format="huggingface")
    assert model.prompt
    expected = model.caption(images, decoding=decoding)
    assert captions_of_transformers(tmp_path, "BlipForConditionalGeneration", images, **settings) == expected
    assert openblip.load(tmp_path).caption(images, decoding=decoding) == expected


@pytest.mark.parametrize(("decoding", "settings"), DECODINGS)
def test_a_blip2(tmp_path: Path, images: list[Any], decoding: Any, settings: dict[str, int]) -> None:
    blip2.write_theirs(tmp_path / "theirs", blip2.their_model(blip2.WRITERS[0], "opt"), "opt")
    model = openblip.load(tmp_path / "theirs")
    model.prompt = "a photo of"
    model.save(tmp_path / "written", format="huggingface")
    written = captions_of_transformers(tmp_path / "written", blip2.WRITERS[0], images, **settings)
    assert written == model.caption(images, decoding=decoding)
    assert load_checkpoint(tmp_path / "written").prompt == "a photo of"
