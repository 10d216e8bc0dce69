"""Files of a source: local paths by the operating system, anything with `scheme://` by fsspec."""

import glob
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from openblip.data.sample import safe_name
from openblip.errors import MissingExtraError, SourceError

T = TypeVar("T")

_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBER_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_remote(path: str) -> bool:
    return "://" in path


def _remote(path: str, call: Callable[[Any, str], T]) -> T:
    """`call(filesystem, path within it)`. Whatever a client library raises becomes an `OSError`, as of a
    local file.
    """
    import fsspec

    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise MissingExtraError(f"{path}: {error}") from error
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from error
    try:
        return call(filesystem, inner)
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


def open_binary(path: str) -> BinaryIO:
    """A seekable binary file; raises `OSError` when it is not there."""
    if not is_remote(path):
        try:
            return open(path, "rb")
        except ValueError as error:  # a name that no file can have: a null byte, a lone surrogate
            raise OSError(f"{path!a}: {error}") from error
    return _remote(path, lambda filesystem, inner: cast(BinaryIO, filesystem.open(inner, "rb")))


def read_bytes(path: str) -> bytes:
    if not is_remote(path):
        with open_binary(path) as file:
            return file.read()
    return _remote(path, lambda filesystem, inner: cast(bytes, filesystem.cat_file(inner)))


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`; raises `OSError` when the file ends before."""
    if is_remote(path):
        data = _remote(
            path, lambda filesystem, inner: cast(bytes, filesystem.cat_file(inner, offset, offset + size))
        )
    else:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
    if len(data) != size:
        raise OSError(f"{path} ends early: wanted {size} bytes at {offset}, found {len(data)}")
    return data


def file_size(file: BinaryIO) -> int:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size


def is_directory(path: str) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    return _remote(path, lambda filesystem, inner: bool(filesystem.isdir(inner)))


def canonical(path: str) -> str:
    """The path as listings begin: absolute, or the URL as its file system spells it."""
    if not is_remote(path):
        return os.path.abspath(path)
    return _remote(path, lambda filesystem, inner: str(filesystem.unstrip_protocol(inner)))


def exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    return _remote(path, lambda filesystem, inner: bool(filesystem.exists(inner)))


def list_files(directory: str, *, recursive: bool = False) -> list[str]:
    """Every file in a directory, sorted; links to directories are not followed."""
    if is_remote(directory):
        return _remote(
            directory,
            lambda filesystem, inner: sorted(
                str(filesystem.unstrip_protocol(name))
                for name in filesystem.find(inner, maxdepth=None if recursive else 1)
            ),
        )
    if not recursive:
        return sorted(entry.path for entry in os.scandir(directory) if entry.is_file())
    walk = os.walk(directory)
    return sorted(os.path.join(parent, name) for parent, _, names in walk for name in names)


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}.tar` and `a{x,y}.tar` as a shell expands them; leading zeros set the width."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    numbers = _NUMBER_RANGE.fullmatch(match[1])
    if numbers:
        first, last = numbers.groups()
        step = 1 if int(first) <= int(last) else -1
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        choices = [str(n).zfill(width) for n in range(int(first), int(last) + step, step)]
    else:
        choices = match[1].split(",")
    expanded = (expand_braces(pattern[: match.start()] + c + pattern[match.end() :]) for c in choices)
    return list(itertools.chain.from_iterable(expanded))


def _expand_glob(path: str) -> list[str]:
    if not any(character in path for character in "*?["):
        return [path]
    if exists(path):  # a file whose name has a bracket in it
        return [path]
    if not is_remote(path):
        return sorted(glob.glob(path, recursive=True))
    return _remote(
        path,
        lambda filesystem, inner: sorted(
            str(filesystem.unstrip_protocol(name)) for name in filesystem.glob(inner)
        ),
    )


def expand_paths(spec: str) -> list[str]:
    """The existing files that a path with braces or wildcards names.

    Raises `SourceError` when a named file is missing or nothing matches.
    """
    paths = [path for pattern in expand_braces(spec) for path in _expand_glob(os.path.expanduser(pattern))]
    if not paths:
        raise SourceError(f"{spec}: no file matches")
    missing = [path for path in paths if not exists(path)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise SourceError(f"{missing[0]}{more}: no such file or folder")
    return list(dict.fromkeys(paths))


def join(directory: str, name: str) -> str:
    """`name` taken relative to `directory`, unless it is absolute or a URL."""
    if is_remote(name) or os.path.isabs(name):
        return name
    return f"{directory.rstrip('/')}/{name}" if is_remote(directory) else os.path.join(directory, name)


def parent(path: str) -> str:
    return path.rsplit("/", 1)[0] if is_remote(path) else os.path.dirname(path)


def shard_names(paths: list[str]) -> dict[str, str]:
    """Shard name -> path: the file's stem; where files share it, with as many parent folders as tell all
    apart.
    """
    parts = {path: (*Path(path).parts[:-1], Path(path).stem) for path in paths}
    depth = dict.fromkeys(paths, 1)
    while True:
        names = {path: _joined(parts[path][-depth[path] :]) for path in paths}
        count = Counter(names.values())
        shared = [path for path in paths if count[names[path]] > 1]
        if not shared:
            return {name: path for path, name in names.items()}
        # Only the suffix differs: a.jsonl beside a.csv.
        if all(depth[path] > len(parts[path]) for path in shared):
            return {_joined(Path(path).parts): path for path in paths}
        for path in shared:
            depth[path] += 1


def _joined(parts: tuple[str, ...]) -> str:
    return safe_name("-".join(part.strip("/:") for part in parts).lstrip("-"))
