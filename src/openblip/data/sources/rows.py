"""Rows: samples whose texts are in a table or list and whose images are files of their own.

Tables (.jsonl, .csv and .tsv), annotation files and folders are read in shards of a bounded number of rows. Columns and
types of fields are those of docs/data.md. pyarrow.csv is not used: it refuses a file for one broken row, and does not
say in which line a row begins.
"""

import contextlib
import csv
import errno
import io
import itertools
import json
import math
import os
import sys
from abc import abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, NamedTuple, TypeVar

from openblip.data import sample as samples
from openblip.data.sample import Located, MissingFile, Reject, Sample, Selection, Source
from openblip.data.sources import storage
from openblip.errors import SourceError

Chunk = TypeVar("Chunk")
Fields = Mapping[str, Any]
"""A json object, or the named values of a row."""
Place = Callable[[int], str]
"""Where in a file an item stands: `images[7]`."""

ROWS_PER_SHARD = 10_000  # so that a table of millions can be shuffled and resumed in pieces
_ROWS_AT_ONCE = 32
_REMOTE_THREADS = 8
_LONGEST_ROW = 1 << 16  # bytes; a longer csv row is a quote that was never closed
_BOM = b"\xef\xbb\xbf"

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

    chunks: Fields  # by shard name, which rows they are

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
    return [range(num_rows)[start : start + ROWS_PER_SHARD] for start in range(0, num_rows, ROWS_PER_SHARD)]


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


def row_key(row: Fields, number: int) -> str:
    """The row's own key where it has one, else its number."""
    for name in () if "conversations" in row else KEY_COLUMNS:  # LLaVA's ids name images, with several rows each
        if isinstance(row.get(name), (str, int)) and str(row[name]):
            return samples.safe_name(str(row[name]))
    return f"{number:09d}"


def row_captions(row: Fields, columns: Sequence[str] = CAPTION_COLUMNS) -> tuple[str, ...]:
    """The captions of the first column that has any; raises `SourceError`."""
    return next(filter(None, (samples.caption_texts(row.get(name), name) for name in columns)), ())


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
            except ValueError as error:
                raise SourceError(f"the {name} is broken json: {error}") from error
        is_list = isinstance(rounds, list)
        if not is_list or not all(isinstance(turn, dict) and isinstance(turn.get(said), str) for turn in rounds):
            raise SourceError(f"the {name} must be a list of rounds, each with a {said}")
        fields[name] = rounds
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


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the rows of a file are written: one json object per line, or values under the header of a .csv or .tsv."""

    columns: tuple[str, ...] | None = None  # the header; None for json
    delimiter: str = ","  # or semicolon or tab

    @classmethod
    def of(cls, file: BinaryIO, path: str) -> tuple["Dialect", int]:
        """The dialect that the file's name tells, and the line at which rows begin, where the file is left."""
        if not path.lower().endswith((".csv", ".tsv")):
            return cls(), 1
        try:
            text = file.readline().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SourceError(f"{path}: the header is not UTF-8 text: {error}") from error
        delimiter = max(",;\t", key=text.count)
        return cls(tuple(name.strip() for name in next(csv.reader([text], delimiter=delimiter), [])), delimiter), 2

    def lines(self, file: BinaryIO, number: int) -> Iterator[tuple[int, int, bytes]]:
        """The rows from the file's position, the start of line `number`: number of the first line, offset and bytes.

        Empty lines are left out. A line break within the quotes of a csv does not end a row. A quote that is never
        closed makes its own line a broken row, and the next line is a row again.
        """
        offset = file.tell()
        while first := file.readline():
            data, error = first, self._quote_error(first)
            while "unexpected end" in error and len(data) <= _LONGEST_ROW and (more := file.readline()):
                data += more
                error = self._quote_error(data)
            if error:
                data = first
                file.seek(offset + len(first))
            if data.removeprefix(_BOM).strip():
                yield number, offset, data
            number += data.count(b"\n")
            offset += len(data)

    def _quote_error(self, data: bytes) -> str:
        """What the csv parser has against a row; "unexpected end of data" where it ends inside quotes."""
        if self.columns is not None and b'"' in data:
            try:
                self._values(data, errors="replace")
            except csv.Error as error:
                return str(error)
        return ""

    def _values(self, data: bytes, errors: str = "strict") -> list[str]:
        text = io.StringIO(data.decode("utf-8", errors), newline="")
        return next(csv.reader(text, delimiter=self.delimiter, strict=True))

    def parse(self, data: bytes) -> Fields:
        """The named values of a row; raises `SourceError`."""
        if self.columns is None:
            return samples.parse_json_object(data.removeprefix(_BOM))
        try:
            values = self._values(data)
        except (csv.Error, UnicodeDecodeError) as error:
            raise SourceError(f"broken row: {error}") from error
        if len(values) != len(self.columns):
            raise SourceError(f"{len(values)} values for {len(self.columns)} columns")
        return dict(zip(self.columns, values, strict=True))


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
    images: str | None
    chunks: dict[str, _Chunk] = field(repr=False)

    @classmethod
    def open(cls, spec: str, paths: list[str], images: str | None) -> "TableSource":
        """Pass once over each file to cut it into shards; raises `SourceError`."""
        shards: dict[str, _Chunk] = {}
        for stem, path in storage.shard_names(paths).items():
            chunks = []
            with storage.source_errors(path), storage.open_binary(path) as file:
                dialect, number = Dialect.of(file, path)
                if dialect.columns is not None:
                    check_columns(dialect.columns, IMAGE_COLUMNS, path)
                lines = dialect.lines(file, number)
                while chunk := list(itertools.islice(lines, ROWS_PER_SHARD)):
                    chunks.append(_Chunk(path, dialect, *chunk[0][:2], len(chunk)))
            shards |= chunk_names(stem, chunks)
        if not shards:
            raise SourceError(f"{spec}: no rows")
        return cls(spec, images, shards)

    def num_samples(self, shard: str) -> int:
        return self.chunks[shard].num_rows

    def file_name(self, shard: str) -> str:
        return os.path.basename(self.chunks[shard].path)

    def rows(self, shard: str) -> Iterator[tuple[str, ImageRow | Reject]]:
        chunk = self.chunks[shard]
        folder = self.images or storage.parent(chunk.path)
        with storage.source_errors(chunk.path):
            file = storage.open_binary(chunk.path)
        with file:
            file.seek(chunk.offset)
            for number, _, data in itertools.islice(chunk.dialect.lines(file, chunk.line), chunk.num_rows):
                place = f"{self.file_name(shard)} line {number}"
                try:
                    yield place, _row(chunk.dialect.parse(data), number, folder)
                except SourceError as error:
                    yield place, Reject(shard, f"{number:09d}", f"{place}: {error}")


def _row(values: Fields, number: int, folder: str) -> ImageRow:
    """The image of the first column that names one, and `second_image`; rows of the same images share their id."""
    names = [file_name_of(values, find_column(values, IMAGE_COLUMNS, "image"))]
    if values.get("second_image") not in (None, ""):
        names.append(file_name_of(values, "second_image"))
    image_id = values.get("image_id")
    image_id = " ".join(names) if image_id in (None, "") else image_id
    image, *second = (storage.join(folder, name) for name in names)
    return ImageRow(row_key(values, number), (image,), image_id, row_captions(values), task_fields(values), *second)


class AnnotationRows(NamedTuple):
    """The samples that a file lists; each row is made when it is read."""

    items: Sequence[Any]  # what the file states of each: an object, or a `SourceError` for what could not be parsed
    row: Callable[[Fields, int], ImageRow]  # of an object and its number from 0; raises `SourceError`
    description: Mapping[str, object]  # the format's name, and which companions of the file are there or missing
    place: Place = "[{}]".format


@dataclass
class AnnotationSource(RowSource):
    """An annotation file in shards of a bounded number of rows, in its order."""

    name: str
    path: str
    content: Any = field(repr=False)  # the parsed json; None for a file of rows (json lines or .csv): `lines` reads it
    images: str  # the folder of its images or videos
    split: str | None  # what stood after a `#`
    list_rows: Callable[["AnnotationSource"], AnnotationRows] = field(repr=False)
    opener: Callable[..., Source] = field(repr=False)

    def __post_init__(self) -> None:
        self.listed = self.list_rows(self)
        if not self.listed.items:
            raise SourceError(f"{self.name}: it lists no samples")
        stem = self.stem if self.split is None else f"{self.stem}-{self.split}"
        self.chunks = chunk_names(stem, cut_rows(len(self.listed.items)))

    # A process that is not forked opens the file anew: rows are not pickled.
    def __reduce__(self) -> tuple[Callable[..., Source], tuple[Any, ...]]:
        return self.opener, (self.name, self.path, self.images, self.split)

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
    if not isinstance(item, dict):
        raise SourceError(f"expected an object, found {item!r:.80}")
    return item


def objects_by_id(items: Any, name: str) -> Iterator[tuple[int | str, Fields]]:
    """The objects of a list that have an id in the field `name`; others are of no use."""
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and isinstance(item.get(name), (int, str)):
            yield item[name], item
