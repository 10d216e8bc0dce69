"""The two text formats of tables, as byte ranges first and values later: jsonl and csv."""

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from openblip.data.sample import parse_json_object
from openblip.errors import SourceError

_BOM = b"\xef\xbb\xbf"
_LONGEST_ROW = 1 << 16  # bytes; a longer csv row is a quote that was never closed


@dataclass(frozen=True, slots=True)
class Row:
    """The bytes of one row; `line` counts from 1 and is where the row starts."""

    line: int
    offset: int
    data: bytes


class Dialect(Protocol):
    """How a file is cut into rows, and a row into named values."""

    def rows(self, file: BinaryIO, line: int) -> Iterator[Row]:
        """The rows from the file's position, which is the start of line number `line`; blank ones are left
        out.
        """
        ...

    def parse(self, row: Row, where: str) -> Mapping[str, Any]:
        """Raises `SourceError` that begins with `where`."""
        ...


@dataclass(frozen=True, slots=True)
class JsonLines:
    """One json object per line."""

    def rows(self, file: BinaryIO, line: int) -> Iterator[Row]:
        offset = file.tell()
        for number, data in enumerate(iter(file.readline, b""), line):
            if data.removeprefix(_BOM).strip():
                yield Row(number, offset, data)
            offset += len(data)

    def parse(self, row: Row, where: str) -> Mapping[str, Any]:
        return parse_json_object(row.data.removeprefix(_BOM), where)


@dataclass(frozen=True, slots=True)
class Csv:
    """Comma-separated values with a header, or values separated by semicolon or tab."""

    columns: tuple[str, ...]
    delimiter: str

    @classmethod
    def of(cls, file: BinaryIO, path: str) -> "Csv":
        """Reads the header; the file is left at the start of the second row."""
        header = file.readline()
        try:
            text = header.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SourceError(f"{path}: the header is not UTF-8 text: {error}") from error
        delimiter = max(",;\t", key=text.count)
        columns = tuple(name.strip() for name in next(csv.reader([text], delimiter=delimiter), []))
        return cls(columns, delimiter)

    def rows(self, file: BinaryIO, line: int) -> Iterator[Row]:
        """A line break within quotes does not end a row. A quote that is never closed makes its own line a
        broken row, and the next line is a row again.
        """
        offset = file.tell()
        while first := file.readline():
            data = first
            error = self._error(data)
            while "unexpected end" in error and len(data) <= _LONGEST_ROW and (more := file.readline()):
                data += more
                error = self._error(data)
            if error:
                data = first
                file.seek(offset + len(first))
            if data.strip():
                yield Row(line, offset, data)
            line += data.count(b"\n")
            offset += len(data)

    def _error(self, data: bytes) -> str:
        """What the csv parser has against the row; "unexpected end of data" where it ends inside quotes."""
        if b'"' in data:
            try:
                self._values(data, errors="replace")
            except csv.Error as error:
                return str(error)
        return ""

    def _values(self, data: bytes, errors: str = "strict") -> list[str]:
        lines = io.StringIO(data.decode("utf-8", errors), newline="")
        return next(csv.reader(lines, delimiter=self.delimiter, strict=True))

    def parse(self, row: Row, where: str) -> Mapping[str, Any]:
        try:
            values = self._values(row.data)
        except (csv.Error, UnicodeDecodeError) as error:
            raise SourceError(f"{where}: broken row: {error}") from error
        if len(values) != len(self.columns):
            raise SourceError(f"{where}: {len(values)} values for {len(self.columns)} columns")
        return dict(zip(self.columns, values, strict=True))
