"""Rows: samples whose texts are in a table or list and whose images are files of their own.

Tables, annotation files and folders are read through here, in shards of a bounded number of rows. The fields of tasks
are checked and brought to the types of docs/data.md. A cell of a .csv is a text, so a list is written there as json and
a label as `true`.
"""

import contextlib
import errno
import itertools
import json
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from openblip.data import sample as samples
from openblip.data.sample import Located, MissingFile, Reject, Sample, Selection, Source
from openblip.data.sources import storage
from openblip.errors import SourceError

Chunk = TypeVar("Chunk")

ROWS_PER_SHARD = 10_000  # so that a table of millions can be shuffled and resumed in pieces
_ROWS_AT_ONCE = 32
_REMOTE_THREADS = 8

IMAGE_COLUMNS = (
    "image", "image_path", "path", "file_name", "filename", "filepath", "file", "jpg", "png", "webp", "video",
)  # fmt: skip
CAPTION_COLUMNS = ("caption", "captions", "text", "txt")
KEY_COLUMNS = ("key", "__key__", "id")
# Any of these makes a row useful without a caption.
TASK_COLUMNS = ("question", "statement", "label", "instruction", "dialog", "turns", "conversations")
_TYPED = frozenset({*TASK_COLUMNS, "answers", "weight", "choices", "correct_choice"})


@dataclass(frozen=True, slots=True)
class ImageRow:
    """What a table or annotation file says of one sample, whose files are still to be read."""

    key: int | str
    image: Sequence[str]  # where the image may lie: the first path that exists counts
    image_id: Any = None  # the data set's own: rows with the same one show the same image
    captions: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    second_image: str | None = None

    @property
    def sample_key(self) -> str:
        return samples.safe_name(str(self.key))

    def texts(self, source: str, shard: str) -> Sample:
        """The sample without its image; raises `SourceError` or `OSError`."""
        return Sample(self.sample_key, shard, b"", self.captions, f"{source}#{self.image_id}", self.info)

    def read(self, source: str, shard: str, selection: Selection) -> Sample | Reject | None:
        """The sample, None where it is skipped, or the reject of what cannot be read."""
        try:
            sample = self.texts(source, shard)
            if selection.skips(sample):
                return None
            if not selection.images:
                return sample
            second = None if self.second_image is None else storage.read_bytes(self.second_image)
            return replace(sample, image=_read_first(self.image), second_image=second)
        except (SourceError, OSError) as error:
            return reject_of(shard, self.sample_key, error)


def _read_first(paths: Sequence[str]) -> bytes:
    """Read the first of the files that exists; raises `FileNotFoundError` that names all of them."""
    for path in paths:
        try:
            return storage.read_bytes(path)
        except FileNotFoundError as error:
            if len(paths) == 1:
                raise
            missing = error
    others = ", nor ".join(paths[1:])
    raise FileNotFoundError(errno.ENOENT, f"No such file, nor {others}", paths[0]) from missing


def reject_of(shard: str, key: str, error: SourceError | OSError) -> Reject:
    """The reject of a sample that cannot be read; an error of the machine or network is raised again."""
    if samples.is_transient(error):
        raise error
    if isinstance(error, FileNotFoundError):
        return MissingFile(shard, key, f"cannot be read: {error}", str(error.filename or error))
    return Reject(shard, key, f"cannot be read: {error}" if isinstance(error, OSError) else str(error))


class RowSource(Source):
    """A source whose shards are lists of rows."""

    chunks: Mapping[str, Any]  # by shard name, which rows they are

    def shards(self) -> Sequence[str]:
        return list(self.chunks)

    @abstractmethod
    def rows(self, shard: str) -> Iterator[tuple[str, ImageRow | Reject]]:
        """The rows of a shard, each with the place in its file that errors name."""

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        """As every source does; several threads read remote images."""
        wanted = self._wanted(shard, selection)

        def read(numbered: tuple[int, ImageRow | Reject]) -> Sample | Reject | None:
            row = numbered[1]
            return row if isinstance(row, Reject) else row.read(self.name, shard, selection)

        with ThreadPoolExecutor(_REMOTE_THREADS, thread_name_prefix="openblip-files") as pool:
            while batch := list(itertools.islice(wanted, _ROWS_AT_ONCE)):
                is_remote = any(isinstance(row, ImageRow) and storage.is_remote(row.image[0]) for _, row in batch)
                items = pool.map(read, batch) if is_remote else map(read, batch)
                for (number, _), item in zip(batch, items, strict=True):
                    if item is not None:
                        yield Located(number, item)

    def _wanted(self, shard: str, selection: Selection) -> Iterator[tuple[int, ImageRow | Reject]]:
        """The rows that are wanted, each with its number; a repeated key is a reject."""
        keys: set[str] = set()
        for number, (place, row) in enumerate(self.rows(shard)):
            if isinstance(row, ImageRow):
                if (key := row.sample_key) in keys:
                    row = Reject(shard, key, f"{place}: duplicate key, the first one stays")
                keys.add(key)
            if selection.has(number):
                yield number, row


def cut_rows(num_rows: int) -> list[range]:
    """The rows of each shard of a list."""
    starts = range(0, num_rows, ROWS_PER_SHARD)
    return [range(start, min(start + ROWS_PER_SHARD, num_rows)) for start in starts]


def chunk_names(stem: str, chunks: Sequence[Chunk]) -> dict[str, Chunk]:
    """The shards of a file by name: `stem` alone, or `stem-00000`, `stem-00001`, ... where there are several."""
    return {stem if len(chunks) == 1 else f"{stem}-{number:05d}": chunk for number, chunk in enumerate(chunks)}


def find_column(names: Iterable[str], wanted: Sequence[str], what: str, place: str = "") -> str:
    """The first of the `wanted` columns that exists; raises `SourceError` that names the existing ones."""
    for name in wanted:
        if name in names:
            return name
    raise SourceError(f"{place}no {what} column ({', '.join(wanted)}); found: {', '.join(names) or 'none'}")


def check_columns(names: Sequence[str], image_columns: Sequence[str], path: str) -> None:
    """Raise `SourceError` for a file without a column of images, or without one of captions or of a task."""
    find_column(names, image_columns, "image", f"{path}: ")
    find_column(names, (*CAPTION_COLUMNS, *TASK_COLUMNS), "caption", f"{path}: ")


def row_key(row: Mapping[str, Any], number: int) -> str:
    """The row's own key where it has one, else its number."""
    for name in () if "conversations" in row else KEY_COLUMNS:  # LLaVA's ids name images, with several rows each
        if isinstance(row.get(name), (str, int)) and str(row[name]):
            return samples.safe_name(str(row[name]))
    return f"{number:09d}"


def row_captions(row: Mapping[str, Any], columns: Sequence[str] = CAPTION_COLUMNS) -> tuple[str, ...]:
    """The captions of the first column that has any; raises `SourceError`."""
    return next(filter(None, (samples.caption_texts(row.get(name), name) for name in columns)), ())


def task_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its task fields in their types, without empty ones; raises `SourceError` for other types."""
    fields = {name: value for name, value in row.items() if name not in _TYPED or value not in (None, "")}
    for name in fields.keys() & {"question", "statement", "instruction"}:
        fields[name] = text_of(fields, name)
    if "question" in fields:
        fields["answers"] = text_list(fields.get("answers", fields.get("answer")), "answers")
        if "weight" in fields:
            fields["weight"] = _weight(fields["weight"])
        if "choices" in fields:
            fields |= choice_fields(fields["choices"], fields.get("correct_choice"))
    if "statement" in fields and "label" in fields:
        fields["label"] = statement_label(fields["label"])
    for name in fields.keys() & {"dialog", "turns", "conversations"}:
        fields[name] = _rounds(fields[name], name)
    return fields


def text_list(value: Any, name: str) -> list[str]:
    """A text, a list of texts or nothing as a list, cleaned; repeats and empty texts stay. Raises `SourceError`."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):  # an answer that begins with a bracket
            value = json.loads(value)
    if value is None or value == "":
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SourceError(f"{name} must be a text or a list of texts, not {value!r:.80}")
    # Nearly all are ASCII, which has no lone surrogates: a table of millions is read fast.
    return [text.strip() if text.isascii() else samples.clean_text(text) for text in texts]


def choice_fields(choices: Any, correct: Any) -> dict[str, Any]:
    """The fields of a multiple choice; `correct` is the index of the right one, None where it is unknown."""
    listed = text_list(choices, "choices")
    if correct in (None, ""):
        return {"choices": listed}
    try:
        index = int(correct)
    except (TypeError, ValueError) as error:
        raise SourceError(f"the correct choice must be a number, not {correct!r:.80}") from error
    if not 0 <= index < len(listed):
        raise SourceError(f"the correct choice is number {index} of {len(listed)} choices, counted from 0")
    return {"choices": listed, "correct_choice": index}


def statement_label(value: Any) -> bool | None:
    """Whether a statement holds; None where the row does not say."""
    if value is None or value == "":
        return None
    label = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(label, bool):
        raise SourceError(f"the label of a statement must be true or false, not {value!r:.80}")
    return label


def _weight(value: Any) -> float:
    with contextlib.suppress(TypeError, ValueError):
        weight = float(value)
        if math.isfinite(weight) and weight > 0:
            return weight
    raise SourceError(f"the weight must be a positive number, not {value!r:.80}")


def _rounds(value: Any, name: str) -> list[Any]:
    """A list of objects, each with what was asked or said."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise SourceError(f"the {name} is broken json: {error}") from error
    said = "value" if name == "conversations" else "question"
    if not isinstance(value, list) or not all(isinstance(t, dict) and isinstance(t.get(said), str) for t in value):
        raise SourceError(f"the {name} must be a list of rounds, each with a {said}")
    return value


def text_of(item: Mapping[str, Any], name: str) -> str:
    """A text that is not empty, cleaned; this and the next three raise `SourceError` for anything else."""
    value = item.get(name)
    if not isinstance(value, str) or not (text := samples.clean_text(value)):
        raise _wrong(item, name, "a text")
    return text


def id_of(item: Mapping[str, Any], name: str) -> int | str:
    """A number or a text that names something."""
    value = item.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise _wrong(item, name, "a number or a name")
    return value


def number_of(item: Mapping[str, Any], name: str) -> int:
    """An id that is part of a file name, as of COCO; a text of digits counts."""
    try:
        return int(id_of(item, name))
    except ValueError as error:
        raise _wrong(item, name, "a number") from error


def file_name_of(item: Mapping[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not value or "\0" in value:
        raise _wrong(item, name, "the name of a file")
    return value


def _wrong(item: Mapping[str, Any], name: str, wanted: str) -> SourceError:
    return SourceError(f"{name} must be {wanted}, not {item[name]!r:.80}" if name in item else f"no {name}")
