"""Lists of clips with captions: the test list of MSRVTT that retrieval is reported on,
`MSRVTT_JSFUSION_test.csv` (`video_id`, `sentence`), and the same as the authors of BLIP distribute it,
`msrvtt_test.jsonl` (`clip_name`, `caption`).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar

from openblip.data.sample import Source, caption_texts, safe_name
from openblip.data.sources import storage
from openblip.data.sources.annotations import (
    AnnotationFile,
    AnnotationSource,
    as_object,
    first_objects,
    picture_folder,
    text_of,
)
from openblip.data.sources.files import FileRecord
from openblip.data.sources.rows import Csv, Dialect, JsonLines
from openblip.data.sources.tables import IMAGE_COLUMNS
from openblip.data.sources.video_clips import ClipFolder
from openblip.errors import SourceError

_CLIP_COLUMNS = ("clip_name", "video_id")
_CAPTION_COLUMNS = ("sentence", "caption", "captions")

Row = tuple[str, Any]
"""Where in the file it stands, and what it says: an object, or the error of what cannot be parsed."""


@dataclass(slots=True)
class ListedClips:
    """The clips of a list, each with the captions of all its rows; the key is the clip's name."""

    known_as: ClassVar[str] = "a list of clips (clip_name or video_id) with sentence or caption"
    has_splits: ClassVar[bool] = False

    source: str
    clips: ClipFolder
    names: list[str] = field(repr=False)
    captions: dict[str, tuple[str, ...]] = field(repr=False)
    broken: list[tuple[str, SourceError]] = field(repr=False)

    @classmethod
    def recognises(cls, content: Any) -> bool:
        return any(_lists_clips(row) for row in first_objects(content))

    @classmethod
    def of(cls, file: AnnotationFile) -> "ListedClips":
        return cls.of_rows(file, ((f"[{number}]", row) for number, row in enumerate(file.content)))

    @classmethod
    def of_rows(cls, file: AnnotationFile, rows: Iterable[Row]) -> "ListedClips":
        captions: dict[str, tuple[str, ...]] = {}
        broken: list[tuple[str, SourceError]] = []
        for where, row in rows:
            try:
                name, texts = _named_captions(row)
            except SourceError as error:
                broken.append((where, error))
            else:
                captions[name] = captions.get(name, ()) + texts
        return cls(file.source, ClipFolder.of(file.images), list(captions), captions, broken)

    def __len__(self) -> int:
        return len(self.names) + len(self.broken)

    def where(self, number: int) -> str:
        return self.names[number] if number < len(self.names) else self.broken[number - len(self.names)][0]

    def record(self, number: int, shard: str) -> FileRecord:
        """The broken rows come after all clips."""
        if number >= len(self.names):
            raise self.broken[number - len(self.names)][1]
        name = self.names[number]
        return FileRecord(
            key=safe_name(name),
            shard=shard,
            image_path=self.clips.find(name),
            captions=self.captions[name],
            image_id=f"{self.source}#{name}",
            info={"image_id": name},
        )

    def describe(self) -> dict[str, object]:
        missing = self.clips.lacking(self.names)
        return {"format": "list of captioned clips", **({"missing": missing} if missing else {})}


def is_clip_list(path: str) -> bool:
    """Whether the header of a .csv or the first line of a .jsonl names clips without a path."""
    try:
        with storage.open_binary(path) as file:
            dialect, line = _dialect(file, path)
            if isinstance(dialect, Csv):
                return _lists_clips(dict.fromkeys(dialect.columns))
            first = next(dialect.rows(file, line), None)
            return first is not None and _lists_clips(dialect.parse(first, path))
    except (SourceError, OSError):
        return False  # what is broken about a table is said where it is opened


def open_clip_list(spec: str, path: str, images: str | None) -> Source:
    """The clips of a .csv or .jsonl. Raises `SourceError` when it or the folder of clips cannot be read."""
    file = AnnotationFile(spec, path, None, picture_folder(path, images))
    return AnnotationSource.of(file, ListedClips.of_rows(file, _rows(path)))


def _rows(path: str) -> Iterator[Row]:
    with storage.open_binary(path) as file:
        dialect, line = _dialect(file, path)
        for row in dialect.rows(file, line):
            try:
                yield f"line {row.line}", dialect.parse(row, "the row")
            except SourceError as error:
                yield f"line {row.line}", error


def _dialect(file: BinaryIO, path: str) -> tuple[Dialect, int]:
    """How the file is read, and the line at which its rows begin."""
    if path.lower().endswith(".jsonl"):
        return JsonLines(), 1
    return Csv.of(file, path), 2


def _lists_clips(row: Mapping[str, Any]) -> bool:
    return (
        any(name in row for name in _CLIP_COLUMNS)
        and any(name in row for name in _CAPTION_COLUMNS)
        and not any(name in row for name in IMAGE_COLUMNS)
    )


def _named_captions(row: Any) -> tuple[str, tuple[str, ...]]:
    """The name of a row's clip and its captions."""
    if isinstance(row, SourceError):
        raise row
    fields = as_object(row)
    name = text_of(fields, next((name for name in _CLIP_COLUMNS if name in fields), _CLIP_COLUMNS[0]))
    stated = (caption_texts(fields.get(column), column) for column in _CAPTION_COLUMNS)
    return name, next(filter(None, stated), ())
