"""Files of a source: local paths through the operating system, anything with `scheme://` through fsspec.

Functions raise `OSError` for what cannot be read, whatever a client library raises.
"""

import errno
import glob
import io
import os
import re
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from filelock import FileLock

from openblip.data.sample import is_transient, parse_json_object, safe_name
from openblip.errors import MissingExtraError, SourceError
from openblip.files import atomic_file, hash_bytes

Result = TypeVar("Result")

_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBER_RANGE = re.compile(r"(\d+)\.\.(\d+)")

_CONTENTS = {
    b"<!doctype html": "but a web page: download the file again",
    b"<html": "but a web page: download the file again",
    b"<svg": "but a drawing in SVG: convert it",
    b"<?xml": "but an XML document, such as the error of a server: download the file again",
    b"version https://git-lfs": "but a pointer of Git LFS: fetch the file with git lfs pull",
    b"PK\3\4": "but a zip archive: unpack it",
    b"PAR1": "but a parquet file",
    b"\x1f\x8b": "but compressed with gzip: decompress it first",
    b"BZh": "but compressed with bzip2: decompress it first",
    b"\xfd7zXZ": "but compressed with xz: decompress it first",
    b"\x28\xb5\x2f\xfd": "but compressed with zstandard: decompress it first",
}  # by what the file begins with

MOST_FILE_BYTES = 128 << 20  # of an image file; one of 178 million pixels has half of that
_BLOCK_BYTES = 4 << 20  # a remote file is read in blocks of this size, a request each
_BLOCKS_KEPT = 3  # of the last ones read: a sample's texts may lie behind its image and are read before it
_FEW_PATHS = 16  # as many remote paths are looked for one by one
_COPIES_BYTES = 64 << 30  # of remote shards in the folder for temporary files


def is_remote(path: str) -> bool:
    return "://" in path


def absolute(path: str) -> str:
    """A local path made independent of the working directory; a URL does not change."""
    return path if is_remote(path) else os.path.abspath(os.path.expanduser(path))


@contextmanager
def _os_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


def _remote(path: str, call: Callable[[Any, str], Result]) -> Result:
    """Return `call(file system, path within it)`."""
    import fsspec

    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise MissingExtraError(f"{path}: {error}") from error
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from error
    with _os_errors(path):
        return call(filesystem, inner)


class _RemoteFile:
    """An open file of fsspec, whose errors are `OSError`s."""

    def __init__(self, path: str, file: Any) -> None:
        self.path, self.file = path, file

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.file, name)
        return _os_errors(self.path)(value) if callable(value) else value  # as a decorator

    def __enter__(self) -> "_RemoteFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


@contextmanager
def source_errors(path: str, *, keep_transient: bool = False) -> Iterator[None]:
    """Turn an `OSError` into a `SourceError` that names the file; `keep_transient`: unless it is an outage."""
    try:
        yield
    except OSError as error:
        if keep_transient and is_transient(error):
            raise
        raise SourceError(f"{path}: cannot be read: {error}") from error


def open_binary(path: str) -> BinaryIO:
    """Open a file for reading, seekable. A remote one is read in large blocks, so in few requests."""
    if not is_remote(path):
        return _open_plain(path)

    def open_remote(filesystem: Any, inner: str) -> Any:
        options = {"cache_type": "blockcache", "cache_options": {"maxblocks": _BLOCKS_KEPT}}
        try:
            file = filesystem.open(inner, "rb", block_size=_BLOCK_BYTES, **options)
        except TypeError:  # a file system without these options
            file = filesystem.open(inner, "rb")
        # fsspec's memory file system hands out one file object to everyone who opens the file.
        return io.BytesIO(file.getvalue()) if isinstance(file, io.BytesIO) else file

    return cast(BinaryIO, _RemoteFile(path, _remote(path, open_remote)))


def read_bytes(path: str, limit: int | None = MOST_FILE_BYTES) -> bytes:
    """The whole of a file, which must be a plain one: a device or a pipe has no end. One of more than `limit` bytes is
    not read.
    """
    if is_remote(path):
        return _remote(path, lambda filesystem, inner: _read_whole(filesystem, inner, limit))
    with _open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise OSError(errno.EFBIG, f"{size} bytes, more than the limit of {limit}", path)
        return file.read(size)


def _read_whole(filesystem: Any, inner: str, limit: int | None) -> bytes:
    """A remote file; what names a local one (`file://`) is read as such."""
    if "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)):
        return read_bytes(inner, limit)
    if limit is None:
        return cast(bytes, filesystem.cat_file(inner))
    data = cast(bytes, filesystem.cat_file(inner, end=limit + 1))  # one request, which does not ask for the size first
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"more than the limit of {limit} bytes", inner)
    return data


def _open_plain(path: str) -> BinaryIO:
    """Open a local file for reading, unless it is a folder, a device, a pipe or a socket."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # else a pipe waits for a writer

    try:
        file = open(path, "rb", opener=opener)  # noqa: SIM115 (the caller closes it)
    except ValueError as error:  # a name that no file can have: a null byte, a lone surrogate
        raise OSError(f"{path!a}: {error}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path}: not a plain file but a device, a pipe or a socket")
    return file


def read_object(path: str) -> dict[str, Any]:
    """Raises `SourceError` that names the file."""
    with source_errors(path):
        return parse_json_object(read_bytes(path), path)


def file_size(file: BinaryIO) -> int:
    """The size of an open file, which is left at its start."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size


def open_copied(path: str) -> BinaryIO:
    """Open a file that several streams read at once, each a piece of it: a remote one as a local copy.

    The copy is made once for all processes of the machine, in the folder for temporary files, and named after what the
    file system says of the file (size, time, ETag). Copies that were not opened for longest make room for others, and a
    file beyond the bound is read where it is.
    """
    if not is_remote(path):
        return open_binary(path)
    info: dict[str, Any] = _remote(path, lambda filesystem, inner: filesystem.info(inner))
    user = getattr(os, "getuid", lambda: 0)()  # Windows has no numbers of users, and a folder for each
    folder = Path(tempfile.gettempdir()) / f"openblip-shards-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    copies = {file: file.stat() for file in folder.glob("*.shard")}
    used = sum(state.st_size for state in copies.values())
    bound = min(_COPIES_BYTES, (shutil.disk_usage(folder).free + used) // 2)
    size = info.get("size")
    if size is None or size > bound or folder.stat().st_uid != user:
        return open_binary(path)
    name = hash_bytes(f"{path} {sorted((key, str(value)) for key, value in info.items())}").hex()
    copy = folder / f"{name}.shard"
    with FileLock(folder / f"{name[:2]}.lock"):
        if not copy.exists():
            for file in sorted(copies, key=lambda file: copies[file].st_mtime):
                if used + size > bound:
                    file.unlink(missing_ok=True)
                    used -= copies[file].st_size
            with atomic_file(copy) as partial:
                _remote(path, lambda filesystem, inner: filesystem.get_file(inner, str(partial)))
        os.utime(copy)
        return open(copy, "rb")


def suffix(path: str) -> str:
    """The ending in lower case without its dot; the whole path where it has none."""
    return path.rpartition(".")[2].lower()


def file_state(path: str) -> dict[str, Any]:
    """What tells whether a file has changed: its `path`, `size`, and the time of its last change (`mtime`), its `etag`
    or both. Raises OSError for a file that is gone.
    """
    if not is_remote(path):
        state = os.stat(path)
        return {"path": os.path.abspath(path), "size": state.st_size, "mtime": _as_time(state.st_mtime_ns)}
    info: dict[str, Any] = _remote(path, lambda filesystem, inner: filesystem.info(inner))
    facts = {name.lower(): value for name, value in info.items()}
    times = (facts.get(name) for name in ("mtime", "lastmodified", "last_modified", "updated", "created"))
    etag, mtime = facts.get("etag"), next(filter(None, times), None)
    state_of = {"path": path, "size": facts.get("size"), "etag": etag, "mtime": mtime and str(mtime)}
    return {name: value for name, value in state_of.items() if value is not None}


def files_state(paths: Sequence[str]) -> dict[str, Any]:
    """What tells whether one of several files has changed: their number, total size, and the latest change."""
    if any(map(is_remote, paths)):
        return {"path": parent(paths[0]), "files": len(paths)}
    states = [os.stat(path) for path in paths]
    latest = max((state.st_mtime_ns for state in states), default=0)
    total = sum(state.st_size for state in states)
    return {"path": parent(paths[0]), "files": len(paths), "size": total, "mtime": _as_time(latest)}


def _as_time(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09d}"


def changes_of_file(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How a file differs from what `file_state` said of it earlier, in words; empty where nothing shows.

    A copy in another place has another time of its last change, so only what is the same for all copies counts there.
    """
    names = ["files", "size", "etag", "mtime"]
    if before.get("path") != now.get("path"):
        names = ["files", "size"]
    stated = [name for name in names if name in before and name in now]
    return ", ".join(f"{name} was {before[name]}, is now {now[name]}" for name in stated if before[name] != now[name])


def is_directory(path: str) -> bool:
    if is_remote(path):
        return bool(_remote(path, lambda filesystem, inner: filesystem.isdir(inner)))
    return os.path.isdir(path)


def exists(path: str) -> bool:
    if is_remote(path):
        return bool(_remote(path, lambda filesystem, inner: filesystem.exists(inner)))
    return os.path.exists(path)


def canonical(path: str) -> str:
    """The path as listings begin: absolute, or the URL as its file system spells it."""
    if is_remote(path):
        return _remote(path, lambda filesystem, inner: str(filesystem.unstrip_protocol(inner)))
    return os.path.abspath(path)


def describe_content(head: bytes) -> str:
    """What a file is that is not what its name says, by its first bytes; empty where they do not tell."""
    for magic, what in _CONTENTS.items():
        if head.lstrip()[: len(magic)].lower() == magic.lower():
            return what
    return "but a tar archive" if head[257:262] == b"ustar" else ""


def list_files(directory: str, *, recursive: bool = False) -> list[str]:
    """List every file in a directory, sorted. Recursively also those behind links to directories, each directory once
    and by a path without links where it has one; one that cannot be opened is listed with a slash behind its name.
    """
    if is_remote(directory):
        depth = None if recursive else 1
        return _remote_names(directory, lambda filesystem, inner: filesystem.find(inner, maxdepth=depth))
    if not recursive:
        return sorted(
            entry.path for entry in os.scandir(directory) if not os.path.isdir(entry.path)
        )  # broken links, too
    paths: list[str] = []

    def add_closed(error: OSError) -> None:
        paths.append(f"{error.filename}/")

    seen: set[str] = set()
    waiting = [directory]  # links come after all directories that can be reached without them
    for top in waiting:
        if os.path.realpath(directory).startswith(f"{os.path.realpath(top)}/"):
            continue  # a link to a directory above
        for folder, folders, names in os.walk(top, onerror=add_closed):
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(real)
            paths += (os.path.join(folder, name) for name in names)
            waiting += (path for name in sorted(folders) if os.path.islink(path := os.path.join(folder, name)))
    return sorted(paths)


def _remote_names(path: str, call: Callable[[Any, str], Iterable[str]]) -> list[str]:
    return _remote(path, lambda filesystem, inner: sorted(map(filesystem.unstrip_protocol, call(filesystem, inner))))


def expand_braces(pattern: str) -> list[str]:
    """Expand `a{0..2}.tar` and `a{x,y}.tar` as a shell does; leading zeros set the width."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    choices = match[1].split(",")
    if numbers := _NUMBER_RANGE.fullmatch(match[1]):
        first, last = numbers.groups()
        step = 1 if int(first) <= int(last) else -1
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        choices = [str(n).zfill(width) for n in range(int(first), int(last) + step, step)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [path for choice in choices for path in expand_braces(f"{before}{choice}{after}")]


def expand_paths(spec: str) -> list[str]:
    """The files that a path with braces or wildcards names; raises `SourceError` where one or all are missing."""
    paths: list[str] = []
    for path in expand_braces(spec):
        path = os.path.expanduser(path)
        if not any(character in path for character in "*?[") or exists(path):  # a name may have a bracket
            paths.append(path)
        elif is_remote(path):
            paths += _remote_names(path, lambda filesystem, inner: filesystem.glob(inner))
        else:
            paths += sorted(glob.glob(path, recursive=True))
    if not paths:
        raise SourceError(f"{spec}: no file matches")
    looked_for: Iterable[str] = paths
    if is_remote(spec) and len(paths) > _FEW_PATHS:
        # A dict keeps the last value of a key: only the first and the last file of each folder are looked for.
        looked_for = [*{parent(p): p for p in reversed(paths)}.values(), *{parent(p): p for p in paths}.values()]
    missing = [path for path in looked_for if not exists(path)]
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
    """Shard name -> path: the file's stem, and where files share it as many parent folders as tell all apart."""
    parts = {path: (*Path(path).parts[:-1], Path(path).stem) for path in paths}
    depth = dict.fromkeys(paths, 1)
    while True:
        names = {path: _joined(parts[path][-depth[path] :]) for path in paths}
        count = Counter(names.values())
        shared = [path for path in paths if count[names[path]] > 1]
        if not shared:
            return {name: path for path, name in names.items()}
        if all(depth[path] > len(parts[path]) for path in shared):  # only the suffix differs: a.jsonl beside a.csv
            return {_joined(Path(path).parts): path for path in paths}
        for path in shared:
            depth[path] += 1


def _joined(parts: tuple[str, ...]) -> str:
    return safe_name("-".join(part.strip("/:") for part in parts).lstrip("-"))
