"""Reads the text of a sample and leaves its picture alone: for language models that are trained on text."""

from dataclasses import dataclass

import numpy as np

from openblip.data.batch import TextBatch
from openblip.data.media import View
from openblip.data.readings import Example, Gathered, text_field
from openblip.data.sample import Sample
from openblip.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextReading:
    """The field `text`, as it is written, several lines included."""

    def read(self, sample: Sample, view: View, rng: np.random.Generator) -> Example:
        return Example(np.empty(0, np.uint8), text_field(sample, "text"))

    def collate(self, examples: Gathered, tokenizer: Tokenizer | None) -> TextBatch:
        return TextBatch(
            pixels=examples.pixels,
            keys=examples.keys,
            shards=examples.shards,
            prompts=[""] * len(examples.keys),
            texts=list(examples.contents),
        )
