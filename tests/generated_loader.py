"""A loader whose batches a test makes."""

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

from openblip.data.loader import LoadedBatch


class GeneratedLoader:
    """Stands for a `Loader` over the batches of a generator; no worker reads them, and every file is used."""

    def __init__(self, batches: Iterator[LoadedBatch]) -> None:
        self.batches = batches
        self.state = SimpleNamespace(value=0)

    def __iter__(self) -> Iterator[LoadedBatch]:
        return self.batches

    def count_unused(self) -> Counter[str]:
        return Counter()
