"""How rows are written in a file of text: one json object per line, or values under the header of a .csv or .tsv.

pyarrow.csv is not used: it refuses a file for one broken row, and does not say in which line a row begins.
"""

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from openblip.data import sample as samples
from openblip.data.sources import storage
from openblip.errors import SourceError

Fields = Mapping[str, Any]
"""A json object, or the named values of a row."""
Line = tuple[int, int, bytes]
"""A row as it is written: the number of its first line, where it begins, and its bytes."""

AS_UTF8 = "save the file as UTF-8, as `iconv -f latin1 -t utf-8` does"
_LONGEST_ROW = 1 << 16  # bytes; a longer csv row is a quote that was never closed
_BOM = b"\xef\xbb\xbf"
_NUMBERED_CAPTION = re.compile(rb"[^\t]+\.\w+#\d+\t")  # of Flickr8k: dog.jpg#0, a tab and the caption


def open_text(path: str) -> BinaryIO:
    """Open a file of rows as UTF-8, in which a file in UTF-16 is held in memory."""
    file = storage.open_binary(path)
    if storage.is_remote(path):
        # The files of fsspec copy a whole block for every line that is read.
        file = io.BufferedReader(cast(io.RawIOBase, file), _LONGEST_ROW)
    if file.read(2) not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        file.seek(0)
        return file
    with file:
        file.seek(0)
        return io.BytesIO(file.read().decode("utf-16", "replace").encode())


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the rows of one file are written."""

    columns: tuple[str, ...] | None = None  # the header; None for json
    delimiter: str = ","  # or semicolon, tab or |
    is_quoted: bool = True

    @classmethod
    def of(cls, file: BinaryIO, path: str) -> tuple["Dialect", int]:
        """The dialect that the file's name tells, and the line at which rows begin, where the file is left."""
        if not path.lower().endswith((".csv", ".tsv", ".txt", ".token")):
            return cls(), 1
        head = file.readline(samples.MOST_TEXT_BYTES + 1)
        if len(head) > samples.MOST_TEXT_BYTES:
            raise SourceError(f"{path}: its first line, the names of columns, has more than {len(head) - 1} bytes")
        if _NUMBERED_CAPTION.match(head):
            file.seek(0)
            return cls(("image_name", "comment"), "\t", is_quoted=False), 1
        try:
            text = head.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SourceError(f"{path}: the header is not UTF-8 text: {error}; {AS_UTF8}") from error
        delimiter = max(",;\t|", key=text.count)
        try:
            names = tuple(name.strip() for name in next(csv.reader([text], delimiter=delimiter), []))
        except csv.Error as error:
            raise SourceError(f"{path}: the header cannot be read: {error}") from error
        if any(map(is_image_name, names)):
            advice = f"put a line of names above it, as image{delimiter}caption"
            raise SourceError(f"{path}: its first line has no names of columns but {names[0]!r:.80}; {advice}")
        if repeated := [name for name, count in Counter(filter(None, names)).items() if count > 1]:
            raise SourceError(f"{path}: several columns are called {repeated[0]}; rename all but one")
        return cls(names, delimiter), 2

    def lines(self, file: BinaryIO, number: int) -> Iterator[Line]:
        """The rows from the file's position, the start of line `number`.

        Empty lines are left out. A line break within the quotes of a csv does not end a row. A quote that is never
        closed makes its own line a broken row, and the next line is a row again.
        """
        offset = file.tell()
        while first := file.readline(samples.MOST_TEXT_BYTES + 1):
            unread = _skip_line(file) if len(first) > samples.MOST_TEXT_BYTES else 0
            data, error = first, self._quote_error(first)
            while (
                "unexpected end" in error
                and len(data) <= _LONGEST_ROW
                and (more := file.readline(samples.MOST_TEXT_BYTES))
            ):
                data += more
                if b'"' in more:  # else it ends inside the quotes, too
                    error = self._quote_error(data)
            if error:
                data = first
                file.seek(offset + len(first) + unread)
            if data.removeprefix(_BOM).strip():
                yield number, offset, data
            number += data.count(b"\n") + bool(unread)
            offset += len(data) + unread

    def _quote_error(self, data: bytes) -> str:
        """What the csv parser has against a row; "unexpected end of data" where it ends inside quotes."""
        if self.columns is not None and self.is_quoted and b'"' in data:
            try:
                self._values(data, errors="replace")
            except csv.Error as error:
                return str(error)
        return ""

    def _values(self, data: bytes, errors: str = "strict") -> list[str]:
        if not self.is_quoted:
            return data.decode("utf-8", errors).rstrip("\r\n").split(self.delimiter, len(self.columns or ()) - 1)
        text = io.StringIO(data.decode("utf-8", errors), newline="")
        return next(csv.reader(text, delimiter=self.delimiter, strict=True))

    def parse(self, data: bytes) -> Fields:
        """The named values of a row; raises `SourceError`."""
        if len(data) > samples.MOST_TEXT_BYTES:
            raise SourceError(f"a row of more than {samples.MOST_TEXT_BYTES} bytes")
        if self.columns is None:
            return samples.parse_json_object(data.removeprefix(_BOM))
        try:
            values = self._values(data)
        except (csv.Error, UnicodeDecodeError) as error:
            advice = f"; {AS_UTF8}" if isinstance(error, UnicodeDecodeError) else ""
            raise SourceError(f"broken row: {error}{advice}") from error
        if len(values) != len(self.columns):
            raise SourceError(f"{len(values)} values for {len(self.columns)} columns")
        return dict(zip(self.columns, (value.strip() for value in values), strict=True))


def _skip_line(file: BinaryIO) -> int:
    """Pass over the rest of a line; its number of bytes."""
    skipped = 0
    while part := file.readline(_LONGEST_ROW):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


@contextmanager
def open_rows(path: str) -> Iterator[tuple[Dialect, Iterator[Line]]]:
    """The dialect of a file and its rows, which are read while it is open; raises `SourceError`."""
    with storage.source_errors(path), open_text(path) as file:
        dialect, number = Dialect.of(file, path)
        yield dialect, dialect.lines(file, number)


def is_image_name(value: Any) -> bool:
    """Whether a value of a row is the name of an image or video file."""
    return isinstance(value, str) and samples.file_kind(storage.suffix(value)) in ("image", "video")


def is_utf8(data: bytes) -> bool:
    try:
        return data.isascii() or bool(data.decode())
    except UnicodeDecodeError:
        return False
