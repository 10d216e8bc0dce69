"""Opens annotation files: which one a .json, .jsonl or .csv is, is told by its structure, whatever its name."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from openblip.data.sample import Reject, Source
from openblip.data.sources import rows, storage
from openblip.data.sources.annotation_file import (
    AnnotationFile,
    AnnotationRows,
    as_object,
    first_objects,
    read_document,
)
from openblip.data.sources.annotation_formats import ANNOTATION_FORMATS, NLVR, VIDEO_LIST, AnnotationFormat
from openblip.data.sources.rows import ImageRow, RowSource
from openblip.data.sources.table import Dialect, TableSource
from openblip.errors import SourceError

_LONGEST_LINE = 1 << 20  # bytes of a first line; that of no format of rows is longer


@dataclass
class AnnotationSource(RowSource):
    """An annotation file in shards of a bounded number of rows, in its order."""

    name: str
    listed: AnnotationRows = field(repr=False)
    chunks: dict[str, range] = field(repr=False)
    reopen: tuple[Callable[..., Source], tuple[Any, ...]] = field(repr=False)
    """A process that is not forked opens the file anew: rows are not pickled."""

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


def open_annotated(spec: str, path: str, images: str | None, split: str | None = None) -> Source:
    """Open a .json, .jsonl, .csv or .tsv: an annotation file where its structure is of one, else a table.

    `images` is the folder of the images, `split` what stood after a `#`. Raises `SourceError` when a .json is neither,
    or a file that belongs to it or the folder of images is missing.
    """
    known, is_table = _recognise_rows(path)
    content: Any = None
    if known is None and not is_table:
        content = read_document(path)
        known = next((known for known in ANNOTATION_FORMATS if known.is_of(content)), None)
        if known is None:
            raise SourceError(f"{path}: not an annotation file that can be read{_described(content)}")
    if split is not None and (known is None or not known.has_splits):
        raise SourceError(f"{spec}: this file has no splits to choose from; leave out #{split}")
    if known is None:
        return TableSource.open(spec, [path], images)
    if images is None:
        raise SourceError(f"{path}: give the folder of its images with --images DIR")
    if not storage.is_directory(images):
        raise SourceError(f"{images}: no such folder of images")
    file = AnnotationFile(spec, path, content, images, split)
    listed = known.rows(file)
    if not listed.items:
        raise SourceError(f"{spec}: it lists no samples")
    chunks = rows.chunk_names(file.stem if split is None else f"{file.stem}-{split}", rows.cut_rows(len(listed.items)))
    return AnnotationSource(spec, listed, chunks, (open_annotated, (spec, path, images, split)))


def _recognise_rows(path: str) -> tuple[AnnotationFormat | None, bool]:
    """The format of annotation file that the first row tells, if any, and whether the file consists of rows (json
    lines or .csv) and is not one json document.
    """
    with storage.source_errors(path), storage.open_binary(path) as file:
        columns = Dialect.of(file, path)[0].columns
        if columns is not None:
            return (VIDEO_LIST if VIDEO_LIST.recognises(dict.fromkeys(columns)) else None), True
        head = file.read(_LONGEST_LINE).decode("utf-8-sig", "replace")
    first = next((line for line in head.split("\n") if line.strip()), "")
    try:
        item = json.loads(first)
    except (ValueError, RecursionError):
        item = None  # a part of a document, or a broken line of a table, which names it
    if NLVR.recognises(item):
        return NLVR, True
    if path.lower().endswith(".json"):
        has_more = len(head.strip()) > len(first.strip())  # one object alone is a document
        return None, has_more and isinstance(item, dict) and not item.keys().isdisjoint(rows.IMAGE_COLUMNS)
    if VIDEO_LIST.recognises(item):
        return VIDEO_LIST, True
    return None, not first.lstrip().startswith("[")


def _described(content: Any) -> str:
    """What a file has in it, whose companion it may be, and what can be read."""
    objects = first_objects(content)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if isinstance(content, dict):
        what = f"an object with {', '.join(content) or 'nothing'}"
    else:
        what = f"a list of objects with {', '.join(objects[0]) or 'nothing'}" if objects else f"{content!r:.40}"
    if any("answers" in item for item in first_objects(annotations)):
        what += ", so the annotations of VQA questions: give the questions file, which finds them"
    elif any("round_id" in item for item in objects):
        what += ", so the dense annotations of VisDial: give the dialogs file, which finds them"
    return f": it is {what}. Known are {'; '.join(known.known_as for known in (*ANNOTATION_FORMATS, NLVR))}"
