"""Files that are there whole or not at all, JSON, JSON lines that resume, and hashes.

A writer works on a file or folder beside the real one whose name ends in `.partial`. It is flushed and renamed when it
is whole, so a reader, or a process that resumes after a kill, never sees a part of it.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from openblip.errors import ConfigError, OpenBlipError, OutputError, causes

PARTIAL = ".partial"
_URL = re.compile(r"[\w+.-]{2,}://")
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextmanager
def name_full_disk(path: str | Path, stream: IO[Any] | None = None) -> Iterator[None]:
    """Raise `OutputError`, which names the file, where writing it meets a full disk, quota or limit of file sizes.

    Libraries hide that in errors of their own: torch raises it while it handles the OSError, safetensors (in Rust)
    says "os error 28". What an open `stream` has not written is dropped, since closing it would try, and fail, again.
    """
    try:
        yield
    except OpenBlipError:  # which says already what is the matter, such as that of a file inside a folder
        raise
    except Exception as error:
        for cause in causes(error):
            found = re.search(r"\(os error (\d+)\)", str(cause))
            number = cause.errno if isinstance(cause, OSError) else int(found[1]) if found else None
            if number in _NO_ROOM:
                if stream is not None:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                raise OutputError(
                    f"{path} cannot be written: {os.strerror(number)}; make room and run the command again. "
                    "Files that were finished before are whole."
                ) from error
        raise


def locate(place: str | Path) -> Path:
    """The path of a file or folder on this machine or, for a URL of fsspec such as s3://bucket/run, one with the
    methods of `pathlib.Path`. Nothing that is said about files there is remembered, since other machines write them.
    """
    if not isinstance(place, str):
        return place
    if place.startswith("file://"):
        place = place.removeprefix("file://")
    if not _URL.match(place):
        return Path(place).expanduser()
    try:
        from upath import UPath

        return cast(Path, UPath(place, use_listings_cache=False))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{place}: {error}") from error


def is_local(path: Path) -> bool:
    """Whether a path that `locate` gave is on this machine."""
    return isinstance(path, Path)


@contextmanager
def _uploaded_file(path: Any) -> Iterator[Path]:
    """Yield a local path to write to; a store shows a file that is put there once all of it has arrived."""
    with tempfile.TemporaryDirectory(prefix="openblip-") as folder:
        partial = Path(folder) / path.name
        with name_full_disk(partial):
            yield partial
        try:
            path.fs.put_file(str(partial), path.path)
        except Exception as error:
            raise OutputError(f"{path} cannot be written: {type(error).__name__}: {error}") from error


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield the path to write to: on success the file appears at `path`, its folder too; on an error nothing does."""
    path = locate(path)
    if not is_local(path):
        with _uploaded_file(path) as partial:
            yield partial
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # With host and process, so that two processes may write the same file at once.
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL}")
    try:
        with name_full_disk(path):
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it replaces `folder`, on an error nothing changes."""
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with name_full_disk(folder):
            yield partial
            for path in partial.rglob("*"):
                if path.is_file():
                    with path.open("rb+") as file:
                        os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_partials(folder: str | Path) -> None:
    """Remove what killed writers left in a folder, not in the folders below it."""
    folder = locate(folder)
    for path in folder.glob(f"*{PARTIAL}") if is_local(folder) else ():  # a store has none
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder that `locate` gave, with all that is in it."""
    if is_local(folder):
        shutil.rmtree(folder)
    else:
        cast(Any, folder).fs.rm(cast(Any, folder).path, recursive=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file, atomically."""
    with atomic_file(path) as partial:
        partial.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8, atomically. Lone surrogates (of file names that are no UTF-8) become `\\udcxx`."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, value: Any) -> None:
    """Write one JSON value, indented, with a line break at its end, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write one JSON value per line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def damage(path: str | Path) -> str | None:
    """What a download that went wrong has left in a file's place; None where nothing shows."""
    with Path(path).open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer in place of the file: run `git lfs pull` in its folder, or download it again"
    if start.startswith((b"<!doctype html", b"<html")):
        return "is a web page in place of the file: download it again"
    return None if start else "is empty: download it again"


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; raises `ConfigError`, which names the file, for one that is missing, damaged or no object."""
    try:
        value = json.loads(locate(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {type(value).__name__} where a JSON object was expected")
    return value


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Of each setting that differs, by its name: "seed was 0, is now 1"."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return {name: f"{name} was {before.get(name)!r:.100}, is now {now.get(name)!r:.100}" for name in names}


class JsonLine(NamedTuple):
    """One line of a JSON lines file, with its number, counted from 1, and the byte offset after its line break."""

    number: int
    value: Any
    end: int


def read_jsonl(path: str | Path) -> Iterator[JsonLine]:
    """Yield the whole lines of a file that a process appends to; an absent file has none.

    A last line without a line break was being written when its process was killed: it is left out, and a writer that
    goes on truncates the file to the `end` of the last line it keeps. Raises `ConfigError`, which names file and line,
    for a whole line that is not JSON.
    """
    if not Path(path).exists():
        return
    end = 0
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: not JSON: {error}") from error
            yield JsonLine(number, value, end)


def hash_bytes(data: str | bytes, num_bytes: int = 16) -> bytes:
    """A hash of `num_bytes` bytes, the same on every machine. Text is hashed in UTF-8, lone surrogates as they are."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=num_bytes).digest()


def hash_int(data: str | bytes, num_bits: int = 63) -> int:
    """A hash as a non-negative integer below 2 ** num_bits, the same on every machine.

    The default fits an int64; two of a billion different inputs collide with a chance of 5 %.
    """
    num_bytes = -(-num_bits // 8)
    return int.from_bytes(hash_bytes(data, num_bytes), "big") >> (8 * num_bytes - num_bits)
