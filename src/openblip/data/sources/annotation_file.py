"""What all annotation files share: the file with its images, the source of its rows, and how its json is read."""

import contextlib
import json
import os
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from openblip.data.sample import Reject, Source
from openblip.data.sources import storage
from openblip.data.sources.rows import Dialect, ImageRow, RowSource
from openblip.errors import SourceError

Fields = Mapping[str, Any]  # a json object


@dataclass(frozen=True, slots=True)
class AnnotationFile:
    """An annotation file and where its images are."""

    source: str  # the spec that named it
    path: str
    content: Any = field(repr=False)  # the parsed json; None for a file of rows (json lines or .csv): `lines` reads it
    images: str  # the folder of its images or videos
    split: str | None = None  # what stood after a `#`

    @property
    def stem(self) -> str:
        return os.path.basename(self.path).rpartition(".")[0]

    def beside(self, name: str) -> str:
        """The path of a file in the same folder."""
        return storage.join(storage.parent(self.path), name)

    def image_paths(self, *folders: str) -> Callable[[str], list[str]]:
        """A function from an image's name to its possible paths: in the folders that exist, and in `images`."""
        paths = (storage.join(self.images, folder) for folder in folders)
        present = [*(path for path in paths if storage.is_directory(path)), self.images]
        return lambda name: [storage.join(path, name) for path in present]

    def lines(self) -> Iterator[tuple[str, Any]]:
        """The rows of a file of rows, each with its place; a `SourceError` stands for a broken one."""
        with storage.open_binary(self.path) as file:
            dialect, number = Dialect.of(file, self.path)
            for line, _, data in dialect.lines(file, number):
                try:
                    yield f"line {line}", dialect.parse(data)
                except SourceError as error:
                    yield f"line {line}", error

    def choose_split(
        self, name: str, *, may_omit: bool = False
    ) -> tuple[list[Any], Callable[[int], str], dict[str, int]]:
        """The items of the chosen split in the list `name`, their places in the file, and the size of each split.

        `restval` is part of `train`. An item without a split is broken, and becomes a reject of every split.
        `may_omit`: the only split of a file is taken where none is chosen. Raises `SourceError` that lists the splits.
        """
        items: list[Any] = self.content[name]
        stated = [item.get("split") if isinstance(item, dict) else None for item in items]
        splits = [("train" if s == "restval" else s) if isinstance(s, str) and s else None for s in stated]
        sizes = Counter(split for split in splits if split is not None)
        chosen = next(iter(sizes)) if self.split is None and may_omit and len(sizes) == 1 else self.split
        if chosen not in sizes:
            listed = ", ".join(f"#{split} ({size} {name})" for split, size in sizes.items())
            wanted = "say which split after a #" if chosen is None else f"there is no split {chosen}"
            raise SourceError(f"{self.source}: {wanted}; the file has {listed or 'none'}")
        numbers = [n for n, split in enumerate(splits) if split in (chosen, None)]
        return [items[n] for n in numbers], lambda n: f"{name}[{numbers[n]}]", dict(sizes)


class AnnotationRows(NamedTuple):
    """The samples that a file lists; each row is made when it is read.

    `items` are what the file states of each sample: an object, or a `SourceError` for what could not be parsed. `row`
    makes a row of an object and its number from 0, or raises `SourceError`. `place` says where in the file an item
    stands. `description` has the format's name, and which companions of the file are there or missing.
    """

    items: Sequence[Any]
    row: Callable[[Fields, int], ImageRow]
    description: Mapping[str, object]
    place: Callable[[int], str] = "[{}]".format


@dataclass
class AnnotationSource(RowSource):
    """An annotation file in shards of a bounded number of rows, in its order."""

    name: str
    listed: AnnotationRows = field(repr=False)
    chunks: dict[str, range] = field(repr=False)
    reopen: tuple[Callable[..., Source], tuple[Any, ...]] = field(repr=False)

    # A process that is not forked opens the file anew: rows are not pickled.
    def __reduce__(self) -> tuple[Callable[..., Source], tuple[Any, ...]]:
        return self.reopen

    def num_samples(self, shard: str) -> int:
        return len(self.chunks[shard])

    def describe(self) -> Mapping[str, object]:
        return self.listed.description

    def rows(self, shard: str) -> Iterator[tuple[str, ImageRow | Reject]]:
        for number in self.chunks[shard]:
            place, item = self.listed.place(number), self.listed.items[number]
            try:
                if isinstance(item, SourceError):
                    raise item.with_traceback(None)
                yield place, self.listed.row(as_object(item), number)
            except SourceError as error:
                yield place, Reject(shard, place, f"{place}: {error}")


def read_document(path: str) -> Any:
    """The parsed json of a file, less what is never read of it; raises `SourceError`."""
    with storage.source_errors(path):
        data = storage.read_bytes(path)
    try:
        return json.loads(data.decode("utf-8-sig"), object_hook=_without_unread)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise SourceError(f"{path}: broken json: {error}") from error


def _without_unread(parsed: dict[str, Any]) -> Any:
    """What is read of an object of a known kind, so that a file of hundreds of megabytes fits into memory."""
    if "answer_confidence" in parsed:  # VQA: ten answers to each of 440,000 questions, few of them different
        answer = parsed.get("answer")
        return sys.intern(answer) if type(answer) is str else parsed
    if "raw" in parsed:  # Karpathy: the tokens of 600,000 sentences
        return parsed["raw"]
    if "answer_options" in parsed:  # VisDial: a hundred numbers for each of 1.2 million rounds
        with contextlib.suppress(TypeError, OverflowError):  # no list of numbers: its reader says so
            parsed["answer_options"] = array("i", parsed["answer_options"])
    elif "qa_id" in parsed:  # Visual Genome: the objects that 1.7 million questions are about
        parsed.pop("a_objects", None)
        parsed.pop("q_objects", None)
    return parsed


def first_objects(items: Any) -> list[Fields]:
    """The objects among the first hundred of a list, which tell its format; none in anything else than a list."""
    return [item for item in items[:100] if isinstance(item, dict)] if isinstance(items, list) else []


def as_object(item: Any) -> Fields:
    """The item; raises `SourceError` when it is no json object."""
    if not isinstance(item, dict):
        raise SourceError(f"expected an object, found {item!r:.80}")
    return item


def objects_by_id(items: Any, name: str) -> Iterator[tuple[int | str, Fields]]:
    """The objects of a list that have an id in the field `name`; others are of no use."""
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and isinstance(item.get(name), (int, str)):
            yield item[name], item
