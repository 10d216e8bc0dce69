"""Reading text alone: as it is written, and whatever its picture is."""

import numpy as np
import pytest
import torch

from openblip.data.readings import Gathered
from openblip.data.sample import Sample
from openblip.data.text_reading import TextReading
from openblip.errors import SourceError

TEXT = "A small Dog.\nQuestion: what is it?  Answer: dog"


def sample(**info) -> Sample:
    return Sample(key="k", shard="s", image=b"no picture", captions=("a cat",), image_id="i", info=info)


def no_view(image, rng):
    raise AssertionError("a picture was decoded")


def test_the_text_is_given_as_it_is_and_no_picture_is_decoded():
    pixels, content = TextReading().read(sample(text=TEXT), no_view, np.random.default_rng(0))
    assert pixels.size == 0
    assert content == TEXT


@pytest.mark.parametrize("info", [{}, {"text": ""}, {"text": 7}])
def test_a_sample_without_text_is_a_reject(info):
    with pytest.raises(SourceError, match="no text"):
        TextReading().read(sample(**info), no_view, np.random.default_rng(0))


def test_a_batch_has_texts_and_empty_prompts():
    gathered = Gathered(torch.zeros(2, 0), [TEXT, "b"], ["k", "l"], ["s", "s"])
    batch = TextReading().collate(gathered, None)
    assert batch.texts == [TEXT, "b"]
    assert batch.prompts == ["", ""]
    assert (batch.keys, batch.shards) == (["k", "l"], ["s", "s"])
