"""Rows: samples whose texts are in a table or list and whose images are files of their own.

Tables (.jsonl, .csv and .tsv), annotation files and folders are read in shards of a bounded number of rows. Columns and
types of fields are those of docs/data.md.
"""

import contextlib
import errno
import itertools
import json
import math
import os
import re
import sys
from abc import abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from openblip.data import sample as samples
from openblip.data.config import SourceOptions
from openblip.data.sample import Located, MissingFile, Reject, Sample, Selection, Source
from openblip.data.sources import storage
from openblip.data.sources.dialect import AS_UTF8, Dialect, Fields, Line, is_image_name, is_utf8, open_rows, open_text
from openblip.errors import SourceError

Chunk = TypeVar("Chunk")
Place = Callable[[int], str]
"""Where in a file an item stands: `images[7]`."""

ROWS_PER_SHARD = 10_000  # so that a table of millions can be shuffled and resumed in pieces
_ROWS_AT_ONCE = 32
_REMOTE_THREADS = 8
_MOST_NOT_UTF8 = 0.1  # of the rows of a file: fewer are rejects, more are a file in another encoding
_NUM_LOOKED_AT = 100  # rows that tell the columns of a file of json lines

IMAGE_COLUMNS = (
    "image", "image_path", "path", "file_name", "filename", "filepath", "file", "jpg", "png", "webp", "video", "images",
)  # fmt: skip
CAPTION_COLUMNS = ("caption", "captions", "text", "txt")
KEY_COLUMNS = ("key", "__key__", "id")
# Any of these makes a row useful without a caption.
TASK_COLUMNS = ("question", "statement", "label", "instruction", "dialog", "turns", "conversations")
_LINE_FIELDS = frozenset({"key", "caption", "text", "logprob", "tokens", "token_logprobs", "match", "similarity"})
"""Of a line that `openblip caption` or `match` writes about an image file, whose path is the key."""
_OWN_TOKENS = re.compile(r"\s*(?:<__dj__\w+>|<\|__dj__eoc\|>)\s*")  # of data-juicer: places of images, ends of parts
_TYPED = frozenset({*TASK_COLUMNS, "answers", "weight", "choices", "correct_choice"})


@dataclass(frozen=True, slots=True)
class ImageRow:
    """What a table or annotation file says of one sample, whose files are still to be read."""

    key: int | str
    image: Sequence[str]  # where the image may lie: the first path that exists counts
    image_id: Any = None  # the data set's own: rows with the same one show the same image
    captions: tuple[str, ...] = ()
    info: Fields = field(default_factory=dict)
    second_image: str | None = None

    @property
    def sample_key(self) -> str:
        return samples.safe_name(str(self.key))

    def texts(self, source: str, shard: str) -> Sample:
        """The sample without its image; raises `SourceError` or `OSError`."""
        return Sample(self.sample_key, shard, b"", self.captions, f"{source}#{self.image_id}", self.info)

    def read(self, source: str, shard: str, selection: Selection) -> Sample | Reject | None:
        """The sample, None where it is skipped, or the reject of what cannot be read."""
        item = self.read_texts(source, shard)
        if isinstance(item, Reject):
            return item
        return None if selection.skips(item) else self.with_image(item) if selection.images else item

    def read_texts(self, source: str, shard: str) -> Sample | Reject:
        """The sample without its image, or the reject of texts that cannot be read."""
        try:
            return self.texts(source, shard)
        except (SourceError, OSError) as error:
            return reject_of(shard, self.sample_key, error)

    def with_image(self, sample: Sample) -> Sample | Reject:
        """The sample with its image, or the reject of one that cannot be read."""
        try:
            second = None if self.second_image is None else storage.read_bytes(self.second_image)
            return replace(sample, image=_read_first(self.image), second_image=second)
        except (SourceError, OSError) as error:
            return reject_of(sample.shard, sample.key, error)


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

    chunks: Fields  # by shard name, which rows they are
    repeats_keys = False  # whether rows may state the same key; else a later one is a reject
    caption_columns: Sequence[str] = CAPTION_COLUMNS

    def shards(self) -> Sequence[str]:
        return list(self.chunks)

    @abstractmethod
    def rows(self, shard: str) -> Iterator[tuple[str, ImageRow | Reject]]:
        """The rows of a shard, each with the place in its file that errors name."""

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        """As every source does; several threads read remote files."""
        wanted = self._wanted(shard, selection)
        with ThreadPoolExecutor(_REMOTE_THREADS, thread_name_prefix="openblip-files") as pool:
            while batch := list(itertools.islice(wanted, _ROWS_AT_ONCE)):
                if any(isinstance(row, ImageRow) and storage.is_remote(row.image[0]) for _, row in batch):
                    yield from self._read_remote(pool, batch, shard, selection)
                    continue
                for number, row in batch:
                    item = row if isinstance(row, Reject) else row.read(self.name, shard, selection)
                    if item is not None:
                        yield Located(number, item)

    def _read_remote(
        self, pool: ThreadPoolExecutor, batch: Sequence[tuple[int, ImageRow | Reject]], shard: str, selection: Selection
    ) -> Iterator[Located]:
        """Some rows, read together; `skip` is asked in their order, and what it raises comes after the rows before."""

        def texts(numbered: tuple[int, ImageRow | Reject]) -> Sample | Reject:
            row = numbered[1]
            return row if isinstance(row, Reject) else row.read_texts(self.name, shard)

        def with_image(chosen: tuple[int, ImageRow | Reject, Sample | Reject]) -> Located:
            number, row, item = chosen
            if not selection.images or isinstance(row, Reject) or isinstance(item, Reject):
                return Located(number, item)
            return Located(number, row.with_image(item))

        chosen: list[tuple[int, ImageRow | Reject, Sample | Reject]] = []
        stop: Exception | None = None
        for (number, row), item in zip(batch, pool.map(texts, batch), strict=True):
            try:
                if isinstance(item, Reject) or not selection.skips(item):
                    chosen.append((number, row, item))
            except Exception as error:  # the limit of a reader
                stop = error
                break
        yield from pool.map(with_image, chosen)
        if stop is not None:
            raise stop

    def _wanted(self, shard: str, selection: Selection) -> Iterator[tuple[int, ImageRow | Reject]]:
        """The rows that are wanted, each with its number. A repeated key gets a number, or is a reject."""
        used: dict[str, int] = {}
        for number, (place, row) in enumerate(self._joined(self.rows(shard))):
            if isinstance(row, ImageRow):
                key = row.sample_key
                if (own_key := unique_key(key, used)) != key:
                    if self.repeats_keys:
                        row = replace(row, key=own_key)
                    else:
                        row = Reject(shard, key, f"{place}: duplicate key, the first one stays")
            if selection.has(number):
                yield number, row

    def _joined(self, rows: Iterator[tuple[str, ImageRow | Reject]]) -> Iterator[tuple[str, ImageRow | Reject]]:
        """The rows, where those that follow each other and differ in their captions alone are one."""
        waiting: tuple[str, ImageRow | Reject] | None = None
        for place, row in rows:
            if waiting is not None:
                if (both := self._join(waiting[1], row)) is not None:
                    waiting = waiting[0], both
                    continue
                yield waiting
            waiting = place, row
        if waiting is not None:
            yield waiting

    def _join(self, first: ImageRow | Reject, second: ImageRow | Reject) -> ImageRow | None:
        """Two rows with the same key as one with the captions of both; None where more than their captions differs."""
        if isinstance(first, Reject) or isinstance(second, Reject) or first.key != second.key or not self.repeats_keys:
            return None
        info, other = ({n: v for n, v in row.info.items() if n not in self.caption_columns} for row in (first, second))
        if replace(first, captions=(), info=info) != replace(second, captions=(), info=other):
            return None
        captions = (*first.captions, *second.captions)
        return replace(first, captions=captions, info={**info, "captions": list(captions)})


def unique_key(key: str, used: dict[str, int]) -> str:
    """The key, or where it is used already the key with a number behind it: dog, dog-2, dog-3."""
    own_key = key
    while own_key in used:
        used[key] += 1
        own_key = f"{key}-{used[key]}"
    used[own_key] = 1
    return own_key


def cut_rows(num_rows: int) -> list[range]:
    """The rows of each shard of a list."""
    return [range(num_rows)[start : start + ROWS_PER_SHARD] for start in range(0, num_rows, ROWS_PER_SHARD)]


def chunk_names(stem: str, chunks: Sequence[Chunk]) -> dict[str, Chunk]:
    """The shards of a file by name: `stem` alone, or `stem-00000`, `stem-00001`, ... where there are several."""
    return {stem if len(chunks) == 1 else f"{stem}-{number:05d}": chunk for number, chunk in enumerate(chunks)}


def find_column(names: Iterable[str], wanted: Sequence[str], what: str, place: str = "") -> str:
    """The first of the `wanted` columns that exists; raises `SourceError` that names the existing ones."""
    for name in wanted:
        if name in names:
            return name
    advice = f"; name it with --{what}-column" if place and len(wanted) > 1 else ""
    raise SourceError(f"{place}no {what} column ({', '.join(wanted)}); found: {', '.join(names) or 'none'}{advice}")


def named_columns(column: str | None, usual: Sequence[str]) -> Sequence[str]:
    """The column that the user has named, else the usual ones."""
    return usual if column is None else (column,)


def check_columns(names: Sequence[str], image_columns: Sequence[str], options: SourceOptions, path: str) -> str:
    """Raise `SourceError` for a file without a column of images, or without one that the user has named; return what
    is to be said where captions are needed, if no column has any and none is of a task.
    """
    find_column(names, named_columns(options.image_column, image_columns), "image", f"{path}: ")
    try:
        find_column(
            names, named_columns(options.caption_column, (*CAPTION_COLUMNS, *TASK_COLUMNS)), "caption", f"{path}: "
        )
    except SourceError as error:
        if options.caption_column is not None:
            raise
        return str(error)
    return ""


def row_key(row: Fields, number: int) -> str:
    """The row's own key where it has one, else its number."""
    for name in () if "conversations" in row else KEY_COLUMNS:  # LLaVA's ids name images, with several rows each
        if isinstance(row.get(name), (str, int)) and str(row[name]):
            return samples.safe_name(str(row[name]))
    return f"{number:09d}"


def row_captions(row: Fields, columns: Sequence[str] = CAPTION_COLUMNS) -> tuple[str, ...]:
    """The captions of the first column that has any; raises `SourceError`. A list may be written as json."""
    stated = (samples.caption_texts(_listed(row.get(name)), name) for name in columns)
    captions = next(filter(None, stated), ())
    return tuple(_OWN_TOKENS.sub(" ", text).strip() if "__dj__" in text else text for text in captions)


def _listed(value: Any) -> Any:
    """The texts of a list that is written as json, else the value."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):  # a text that begins with a bracket
            texts = json.loads(value)
            if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
                return texts
    return value


def row_images(row: Fields, column: str) -> list[str]:
    """The names of the one or two images in a column; raises `SourceError`. A list may be written as json."""
    value = _listed(row.get(column))
    if not isinstance(value, list):
        return [file_name_of(row, column)]
    names = [file_name_of({column: name}, column) for name in value]
    if not 1 <= len(names) <= 2 or (len(names) == 2 and "__dj__" in str(row.get("text"))):
        raise SourceError(f"{column} lists {len(names)} images, and a sample has one, or two with a statement")
    return names


def task_fields(row: Fields) -> dict[str, Any]:
    """The row with its task fields in their types, without empty ones; raises `SourceError` for other types."""
    fields = {name: value for name, value in row.items() if name not in _TYPED or value not in (None, "")}
    for name in fields.keys() & {"question", "statement", "instruction"}:
        fields[name] = text_of(fields, name)
    if "question" in fields:
        fields["answers"] = text_list(fields.get("answers", fields.get("answer")), "answers")
        if "weight" in fields:
            with contextlib.suppress(TypeError, ValueError):
                fields["weight"] = float(fields["weight"])
            if not (isinstance(fields["weight"], float) and 0 < fields["weight"] < math.inf):
                raise SourceError(f"the weight must be a positive number, not {row['weight']!r:.80}")
        if "choices" in fields:
            fields |= choice_fields(fields["choices"], fields.get("correct_choice"))
    if "statement" in fields and "label" in fields:
        fields["label"] = statement_label(fields["label"])
    for name in fields.keys() & {"dialog", "turns", "conversations"}:
        rounds, said = fields[name], "value" if name == "conversations" else "question"
        if isinstance(rounds, str):
            try:
                rounds = json.loads(rounds)
            except (ValueError, RecursionError) as error:
                raise SourceError(f"the {name} is broken json: {error}") from error
        is_list = isinstance(rounds, list)
        if not is_list or not all(isinstance(turn, dict) and isinstance(turn.get(said), str) for turn in rounds):
            raise SourceError(f"the {name} must be a list of rounds, each with a {said}")
        fields[name] = rounds
    return fields


def text_list(value: Any, name: str) -> list[str]:
    """A text, a list of texts or nothing as a list, cleaned; repeats and empty texts stay. Raises `SourceError`."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):  # an answer that begins with a bracket
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


def text_of(item: Fields, name: str) -> str:
    """A text that is not empty, cleaned; this and the next three raise `SourceError` for anything else."""
    value = item.get(name)
    if not isinstance(value, str) or not (text := samples.clean_text(value)):
        raise _wrong(item, name, "a text")
    return text


def id_of(item: Fields, name: str) -> int | str:
    """A number or a text that names something."""
    value = item.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise _wrong(item, name, "a number or a name")
    return value


def number_of(item: Fields, name: str) -> int:
    """An id that is part of a file name, as of COCO; a text of digits counts."""
    try:
        return int(id_of(item, name))
    except ValueError as error:
        raise _wrong(item, name, "a number") from error


def file_name_of(item: Fields, name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not value or "\0" in value:
        raise _wrong(item, name, "the name of a file")
    return value


def _wrong(item: Fields, name: str, wanted: str) -> SourceError:
    return SourceError(f"{name} must be {wanted}, not {item[name]!r:.80}" if name in item else f"no {name}")


def check_rows(dialect: Dialect, lines: Iterable[Line], options: SourceOptions, path: str) -> str:
    """`check_columns` of a file by its header, or by the columns of its first rows."""
    names, rows = list(dialect.columns or ()), list[Fields]()
    for _, _, data in itertools.islice(lines, _NUM_LOOKED_AT):
        with contextlib.suppress(SourceError):
            rows.append(dialect.parse(data))
    names += dict.fromkeys(name for row in rows for name in row if name not in names)
    if not rows and dialect.columns is None:
        return ""  # every row is a reject
    has_lines = "key" in names and not any(name in names for name in IMAGE_COLUMNS)
    images = ("key",) if has_lines and any(is_image_name(row.get("key")) for row in rows) else IMAGE_COLUMNS
    lacks = check_columns(names, images, options, path)
    return "" if dialect.columns is None else lacks  # a later line may have what the first ones lack


def has_object_rows(path: str) -> bool:
    """Whether one of a file's first rows is a whole json object."""
    with open_rows(path) as (dialect, lines):
        for _, _, data in itertools.islice(lines, _NUM_LOOKED_AT):
            with contextlib.suppress(SourceError):
                return bool(dialect.parse(data))
    return False


class _Chunk(NamedTuple):
    """A shard: `num_rows` rows of a file from byte `offset`, where line `line` begins."""

    path: str
    dialect: Dialect
    line: int
    offset: int
    num_rows: int


@dataclass
class TableSource(RowSource):
    """Files of rows, each in shards of a bounded number of rows."""

    name: str
    options: SourceOptions
    chunks: dict[str, _Chunk] = field(repr=False)
    lacks: str = ""
    option_names = frozenset({"images", "image_column", "caption_column"})
    repeats_keys = True

    @classmethod
    def open(cls, spec: str, paths: list[str], options: SourceOptions) -> "TableSource":
        """Pass once over each file to cut it into shards; raises `SourceError`."""
        shards: dict[str, _Chunk] = {}
        lacks = ""
        for stem, path in storage.shard_names(paths).items():
            chunks: list[_Chunk] = []
            num_not_utf8 = 0
            with open_rows(path) as (dialect, lines):
                while chunk := list(itertools.islice(lines, ROWS_PER_SHARD)):
                    if not chunks:
                        lacks = lacks or check_rows(dialect, chunk, options, path)
                    num_not_utf8 += sum(not is_utf8(data) for _, _, data in chunk)
                    chunks.append(_Chunk(path, dialect, *chunk[0][:2], len(chunk)))
            if num_not_utf8 > _MOST_NOT_UTF8 * sum(chunk.num_rows for chunk in chunks):
                raise SourceError(f"{path}: {num_not_utf8} rows are not UTF-8 text; {AS_UTF8}")
            shards |= chunk_names(stem, chunks)
        if not shards:
            raise SourceError(f"{spec}: no rows")
        return cls(spec, options, shards, lacks)

    def num_samples(self, shard: str) -> int:
        return self.chunks[shard].num_rows

    def file_name(self, shard: str) -> str:
        return os.path.basename(self.chunks[shard].path)

    def file_state(self, shard: str) -> Mapping[str, Any]:
        """Of the table; the images that it names are files of their own."""
        return storage.file_state(self.chunks[shard].path)

    @property
    def caption_columns(self) -> Sequence[str]:  # type: ignore[override]
        return named_columns(self.options.caption_column, CAPTION_COLUMNS)

    def rows(self, shard: str) -> Iterator[tuple[str, ImageRow | Reject]]:
        chunk = self.chunks[shard]
        folder = self.options.images or storage.parent(chunk.path)
        with storage.source_errors(chunk.path):
            file = open_text(chunk.path)
        with file:
            file.seek(chunk.offset)
            for number, _, data in itertools.islice(chunk.dialect.lines(file, chunk.line), chunk.num_rows):
                place = f"{self.file_name(shard)} line {number}"
                try:
                    yield place, table_row(chunk.dialect.parse(data), number, folder, self.options)
                except SourceError as error:
                    yield place, Reject(shard, f"{number:09d}", f"{place}: {error}")


def table_row(values: Fields, number: int, folder: str, options: SourceOptions) -> ImageRow:
    """The image of the first column that names one, and `second_image`; rows of the same images share their id."""
    columns = named_columns(options.image_column, IMAGE_COLUMNS)
    captions = row_captions(values, named_columns(options.caption_column, CAPTION_COLUMNS))
    if options.image_column is None and values.keys().isdisjoint(columns) and is_image_name(values.get("key")):
        return _line_row(values, folder, captions)
    names = row_images(values, find_column(values, columns, "image"))
    if options.caption_column is not None:
        find_column(values, (options.caption_column,), "caption")
    if values.get("second_image") not in (None, ""):
        names = [names[0], file_name_of(values, "second_image")]
    image_id = values.get("image_id")
    image_id = " ".join(names) if image_id in (None, "") else image_id
    image, *second = (storage.join(folder, name) for name in names)
    return ImageRow(row_key(values, number), (image,), image_id, captions, task_fields(values), *second)


def _line_row(values: Fields, folder: str, captions: tuple[str, ...]) -> ImageRow:
    """A line that `openblip caption --out` wrote about an image file: the key is its path, from the working directory
    of that time, the folder of the images or that of the lines. Lines of one key are captions of one image.
    """
    path = file_name_of(values, "key")
    info = task_fields({name: value for name, value in values.items() if name not in _LINE_FIELDS})
    return ImageRow(path, (path, storage.join(folder, path)), path, captions, info)


class AnnotationRows(NamedTuple):
    """The samples that a file lists; each row is made when it is read."""

    items: Sequence[Any]  # what the file states of each: an object, or a `SourceError` for what could not be parsed
    row: Callable[[Fields, int], ImageRow]  # of an object and its number from 0; raises `SourceError`
    description: Mapping[str, object]  # the format's name, and which companions of the file are there or missing
    place: Place = "[{}]".format
    may_repeat_keys: bool = False  # as tables may


@dataclass
class AnnotationSource(RowSource):
    """An annotation file in shards of a bounded number of rows, in its order."""

    name: str
    path: str
    content: Any = field(repr=False)  # the parsed json; None for a file of rows (json lines or .csv): `lines` reads it
    images: str  # the folder of its images or videos
    split: str | None  # what stood after a `#`
    options: SourceOptions
    option_names = frozenset({"images"})
    list_rows: Callable[["AnnotationSource"], AnnotationRows] = field(repr=False)
    opener: Callable[..., Source] = field(repr=False)

    def __post_init__(self) -> None:
        self.listed = self.list_rows(self)
        self.repeats_keys = self.listed.may_repeat_keys
        if not self.listed.items:
            raise SourceError(f"{self.name}: it lists no samples")
        stem = self.stem if self.split is None else f"{self.stem}-{self.split}"
        self.chunks = chunk_names(stem, cut_rows(len(self.listed.items)))

    # A process that is not forked opens the file anew: rows are not pickled.
    def __reduce__(self) -> tuple[Callable[..., Source], tuple[Any, ...]]:
        return self.opener, (self.name, self.path, self.options, self.split)

    def num_samples(self, shard: str) -> int:
        return len(self.chunks[shard])

    def file_state(self, shard: str) -> Mapping[str, Any]:
        return storage.file_state(self.path)

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

    def check_columns(self, names: Iterable[str], image_columns: Sequence[str]) -> None:
        """`check_columns` for a format whose columns the user may name."""
        self.lacks = check_columns([*names], image_columns, self.options, self.path)
        self.option_names = frozenset({"images", "image_column", "caption_column"})
        self.caption_columns = named_columns(self.options.caption_column, CAPTION_COLUMNS)

    def has_images(self) -> bool:
        """Whether an image of the first rows is there."""
        first = itertools.islice(self.rows(next(iter(self.chunks))), _NUM_LOOKED_AT)
        return any(map(storage.exists, (path for _, row in first if isinstance(row, ImageRow) for path in row.image)))

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
        """The items of a list or rows, each with its place; a `SourceError` stands for a broken row."""
        if self.content is not None:
            yield from ((f"[{number}]", item) for number, item in enumerate(self.content))
            return
        with open_rows(self.path) as (dialect, lines):
            for line, _, data in lines:
                try:
                    yield f"line {line}", dialect.parse(data)
                except SourceError as error:
                    yield f"line {line}", error

    def choose_split(self, name: str, *, may_omit: bool = False) -> tuple[list[Any], Place, dict[str, int]]:
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
            raise SourceError(f"{self.name}: {wanted}; the file has {listed or 'none'}")
        numbers = [n for n, split in enumerate(splits) if split in (chosen, None)]
        return [items[n] for n in numbers], lambda n: f"{name}[{numbers[n]}]", dict(sizes)


def read_document(path: str) -> Any:
    """The parsed json of a file, less what is never read of it; raises `SourceError`."""
    with storage.source_errors(path):
        data = storage.read_bytes(path, limit=None)
    try:
        return json.loads(data.decode(json.detect_encoding(data)), object_hook=_without_unread)
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
    if not isinstance(item, dict):
        raise SourceError(f"expected an object, found {item!r:.80}")
    return item


def objects_by_id(items: Any, name: str) -> Iterator[tuple[int | str, Fields]]:
    """The objects of a list that have an id in the field `name`; others are of no use."""
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and isinstance(item.get(name), (int, str)):
            yield item[name], item
