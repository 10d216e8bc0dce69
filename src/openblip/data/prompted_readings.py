"""What BLIP-2's tasks read of a sample, as words: its language model has a tokenizer of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from openblip.data.batch import TextBatch
from openblip.data.media import Media, Picture, View
from openblip.data.readings import Example, Gathered
from openblip.data.sample import Sample
from openblip.data.tokenizer import Tokenizer, normalize_caption
from openblip.errors import SourceError


@dataclass(frozen=True, kw_only=True)
class PromptedCaptionReading:
    """A picture or clip with one of its captions, drawn at random, after a prompt that all have in common."""

    media: Media = field(default_factory=Picture)
    prompt: str = ""

    def read(self, sample: Sample, view: View, rng: np.random.Generator) -> Example:
        return Example(self.media(sample, view, rng), drawn_caption(sample, rng))

    def collate(self, examples: Gathered, tokenizer: Tokenizer | None) -> TextBatch:
        return text_batch(examples, [self.prompt] * len(examples.keys), examples.contents)


def text_batch(examples: Gathered, prompts: Sequence[str], texts: Sequence[str]) -> TextBatch:
    """The batch of examples that a language model continues."""
    return TextBatch(
        pixels=examples.pixels,
        keys=examples.keys,
        shards=examples.shards,
        prompts=list(prompts),
        texts=list(texts),
    )


def drawn_caption(sample: Sample, rng: np.random.Generator) -> str:
    """One of a sample's captions at random, normalised; `SourceError` when it has none."""
    captions = [text for caption in sample.captions if (text := normalize_caption(caption))]
    if not captions:
        raise SourceError("no caption")
    return captions[int(rng.integers(len(captions)))]
