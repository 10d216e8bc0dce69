"""A source whose shards are lists in memory, which remembers what was read; and shorthands for loaders."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from openblip.data.batch import ImageTextProcessor
from openblip.data.config import Preprocessing
from openblip.data.loader import LoadedBatch, Loader
from openblip.data.sample import Located, Reject, Sample, Selection, Source
from openblip.data.sources import Mixture, open_mixture
from openblip.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["sample text 0123456789"], 150)


class MemorySource(Source):
    """`reads` lists every (shard, number) whose payload was given out."""

    def __init__(self, name: str, shards: dict[str, Sequence[Sample | Reject | Exception]]) -> None:
        self.name, self.content = name, shards
        self.reads: list[tuple[str, int]] = []

    def shards(self) -> Sequence[str]:
        return list(self.content)

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        for number, item in enumerate(self.content[shard]):
            if isinstance(item, Exception):
                raise item
            if selection.has(number) and (isinstance(item, Reject) or not selection.skips(item)):
                self.reads.append((shard, number))
                yield Located(number, item)


def numbered(name: str, sizes: Sequence[int], image: bytes, captions: int = 1) -> MemorySource:
    """Shards of so many samples, with keys that count through."""
    count = itertools.count()

    def sample(shard: str) -> Sample:
        key = f"{next(count):05d}"
        texts = tuple(f"sample {key} text {i}" for i in range(captions))
        return Sample(key, shard, image, texts, f"{name}/{shard}/{key}")

    return MemorySource(name, {f"{i:04d}": [sample(f"{i:04d}") for _ in range(n)] for i, n in enumerate(sizes)})


def load(source: Any, **options: Any) -> Loader:
    """A loader of a source, a mixture, or what a spec names."""
    if not isinstance(source, Mixture):
        source = Mixture((source,)) if isinstance(source, Source) else open_mixture(str(source))
    settings: dict[str, Any] = {"batch_size": 4, "seed": 3, "processor": ImageTextProcessor()} | options
    return Loader(source, tokenizer=TOKENIZER, preprocessing=Preprocessing(image_size=8), **settings)


def take(loader: Loader, num_batches: int) -> list[LoadedBatch]:
    """The first batches; afterwards its threads and workers are gone."""
    iterator = iter(loader)
    try:
        return list(itertools.islice(iterator, num_batches))
    finally:
        iterator.close()  # type: ignore[attr-defined]


def names(batches: Sequence[LoadedBatch]) -> list[tuple[str, str]]:
    """(shard, key) of every sample in order."""
    return [pair for b in batches for pair in zip(b.batch.shards, b.batch.keys, strict=True)]
