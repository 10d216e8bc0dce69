"""Tar shards as webdataset and img2dataset write them: members that follow each other and share a key are one sample.

A sample is an image (`KEY.jpg`), two images (`KEY.left.jpg` and `KEY.right.jpg`) or a video (`KEY.mp4`), with its texts
in `KEY.json` or `KEY.txt`.

A shard is read front to back, and payloads that are not wanted are skipped. Nothing is ever extracted, so a member's
name is only a key, whatever path it claims. `tarfile` itself silently stops at a damaged header, which would lose
samples unnoticed: here only its header parser is used, and whatever ends a shard early becomes a reject. webdataset
raises for a repeated file, and splits a sample whose files lie apart.
"""

import io
import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

from openblip.data.sample import (
    TEXT_SUFFIXES,
    Located,
    Reject,
    Sample,
    Selection,
    Source,
    file_kind,
    parse_json_object,
    sample_of_texts,
)
from openblip.data.sources import storage
from openblip.errors import SourceError

_BLOCK = tarfile.BLOCKSIZE
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
_LONGEST_PADDING = 1 << 20  # writers fill up to a record, 10 KiB unless asked otherwise
_OUTLINES_KEPT = 64  # shards whose samples a process remembers the places of
_LONG_NAMES_LIMIT = 1 << 20  # a longer extended header is damage, not a name


class _EndsEarlyError(Exception):
    """The archive is damaged or cut here; the message is the reject's reason."""

    def __init__(self, reason: str, *, goes_on: bool = False) -> None:
        super().__init__(reason)
        self.goes_on = goes_on
        """There is more after the archive's end mark, so the samples before it are whole."""
        self.num_samples = 0
        """The number of whole samples before it."""


class _Member(NamedTuple):
    """One file in a tar: where its headers begin, and where its payload lies."""

    name: str
    start: int
    offset: int
    size: int
    is_file: bool


class _Group:
    """The members of one sample, by their role: "image", "left", "right", "video", "json" or "txt"."""

    def __init__(self, key: str, start: int) -> None:
        self.key = key
        self.start = start  # the byte at which its first header begins
        self.members: dict[str, _Member] = {}
        self.repeats: Counter[str] = Counter()
        self.links: list[str] = []

    def add(self, role: str, member: _Member) -> None:
        if not member.is_file:
            self.links.append(member.name)
        elif self.members.setdefault(role, member) is not member:
            self.repeats[role] += 1

    def choose_images(self) -> tuple[list[_Member], str]:
        """The sample's image, or its left and right one, or none; and what is wrong with the group."""
        members, roles = self.members, self.members.keys()
        if "image" in roles:
            has_others = bool(roles & {"left", "right", "video"})
            return [members["image"]], "several images with this key: the plain image stays" if has_others else ""
        if roles >= {"left", "right"}:
            reason = "two images and a video with this key: the images stay" if "video" in roles else ""
            return [members["left"], members["right"]], reason
        for present, lacking in (("left", "right"), ("right", "left")):
            if present in roles:
                return [], f"of two images the {lacking} one is missing, there is only the {present} one"
        if "video" in roles:
            return [members["video"]], ""
        return [], "no image (jpg, jpeg, png or webp) or video (mp4, webm, mkv, avi, mov or m4v) with this key"


@dataclass
class TarSource(Source):
    """A list of tar files, one shard each."""

    name: str
    paths: dict[str, str] = field(repr=False)

    def shards(self) -> Sequence[str]:
        return list(self.paths)

    def file_name(self, shard: str) -> str:
        return os.path.basename(self.paths[shard])

    def num_samples(self, shard: str) -> int | None:
        """What img2dataset's `00000_stats.json` beside `00000.tar` says, if there is one."""
        path = f"{self.paths[shard].removesuffix('.tar')}_stats.json"
        try:
            count = parse_json_object(storage.read_bytes(path)).get("successes")
        except (SourceError, OSError):
            return None
        return count if isinstance(count, int) else None

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        path = self.paths[shard]
        opener = storage.open_copied if selection.pieces[1] > 1 else storage.open_binary
        try:
            with storage.source_errors(path, keep_transient=True), opener(path) as file:
                for number, group, is_repeat in _wanted_groups(file, path, selection):
                    for item in self._items(file, shard, group, is_repeat, selection):
                        yield Located(number, item)
        except _EndsEarlyError as stop:
            if not stop.num_samples:
                raise SourceError(f"{path}: nothing of this shard can be read: {stop}") from stop
            if selection.has(stop.num_samples):
                reject = Reject(shard, "", f"the shard ends early, the rest is lost: {stop}")
                yield Located(stop.num_samples, reject)

    def _items(
        self, file: BinaryIO, shard: str, group: _Group, is_repeat: bool, selection: Selection
    ) -> Iterator[Sample | Reject]:
        """What a group of members is: a sample, rejects, or both."""
        key = group.key
        for name in group.links:
            yield Reject(shard, key, f"{name} is a link or special file, not a plain one")
        if not group.members:
            return
        if is_repeat:
            yield Reject(shard, key, "duplicate key: the first one stays; files of a sample must not lie apart")
            return
        for _ in range(max(group.repeats.values(), default=0)):
            yield Reject(shard, key, "duplicate key: the first one stays")
        members, reason = group.choose_images()
        if reason:
            yield Reject(shard, key, reason)
        if not members:
            return
        try:
            texts = {kind: _payload(file, group.members[kind]) for kind in TEXT_SUFFIXES if kind in group.members}
            sample = sample_of_texts(self.name, shard, key, texts)
            if selection.skips(sample):
                return
            if selection.images:
                image, *second = (_payload(file, member) for member in members)
                sample = replace(sample, image=image, second_image=next(iter(second), None))
            yield sample
        except SourceError as error:
            yield Reject(shard, key, str(error))


def _payload(file: BinaryIO, member: _Member) -> bytes:
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) != member.size:
        raise SourceError(f"{member.name} ends early: {member.size} bytes wanted, {len(data)} read")
    return data


class _Outline(NamedTuple):
    """Where the samples of a local shard begin; for a process that reads the shard in many pieces."""

    starts: "array[int]"
    repeats: set[int]
    """The numbers of the samples whose key an earlier one has."""
    stop: _EndsEarlyError | None


@lru_cache(_OUTLINES_KEPT)
def _outline(file_name: str, path: str, version: tuple[int, int]) -> _Outline:
    """Read the headers of a shard. `path` is what errors call it, `version` its size and time of change."""
    starts, repeats = array("Q"), set[int]()
    with open(file_name, "rb") as file:
        try:
            for number, group, is_repeat in _numbered_groups(file, path):
                starts.append(group.start)
                if is_repeat:
                    repeats.add(number)
        except _EndsEarlyError as stop:
            return _Outline(starts, repeats, stop)
    return _Outline(starts, repeats, None)


def _wanted_groups(file: BinaryIO, path: str, selection: Selection) -> Iterator[tuple[int, _Group, bool]]:
    """The samples that are wanted, as `_numbered_groups` gives them."""
    if selection.pieces[1] > 1 and isinstance(file, io.BufferedReader):
        state = os.fstat(file.fileno())
        outline = _outline(file.name, path, (state.st_size, state.st_mtime_ns))
        for number, start in enumerate(outline.starts):
            if selection.has(number):
                yield number, next(_groups(file, path, start)), number in outline.repeats
        if outline.stop is not None:
            raise outline.stop.with_traceback(None)
    else:
        yield from (item for item in _numbered_groups(file, path) if selection.has(item[0]))


def _numbered_groups(file: BinaryIO, path: str) -> Iterator[tuple[int, _Group, bool]]:
    """The samples of a shard, each with its number and whether an earlier one has its key.

    Raises `_EndsEarlyError` after the last whole one of a damaged shard.
    """
    keys: set[str] = set()
    for number, group in enumerate(_groups(file, path)):
        yield number, group, group.key in keys
        if group.members:
            keys.add(group.key)


def _groups(file: BinaryIO, path: str, start: int | None = None) -> Iterator[_Group]:
    """The samples of a shard in order, or from byte `start` on, where a whole one begins.

    Raises `_EndsEarlyError` after the last whole one of a damaged shard.
    """
    first: _Group | None = None
    group: _Group | None = None
    num_groups = 0
    try:
        for member in _members(file, path, start or 0):
            key, role = _split_name(member.name)
            if not role:
                continue
            if group is None or group.key != key:
                if group is not None:
                    yield group
                    num_groups += 1
                    first = first or (group if group.members else None)
                group = _Group(key, member.start)
            group.add(role, member)
    except _EndsEarlyError as stop:
        if group is not None and (start is not None or stop.goes_on or not _is_partial(group, first)):
            yield group
            num_groups += 1
        stop.num_samples = num_groups
        raise
    if group is not None:
        yield group


def _is_partial(last: _Group, first: _Group | None) -> bool:
    """Whether the sample that was being written where a shard was cut lacks a file that the first one has."""
    if first is None:
        return len(last.members) < 2
    return not last.members.keys() >= first.members.keys()


def _split_name(name: str) -> tuple[str, str]:
    """(key, role) by webdataset's rule: the key ends at the first dot of the base name.

    The role is empty for files that are no part of a sample.
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    side, _, kind = suffix.lower().rpartition(".")
    role = file_kind(kind)
    if side:
        role = side if side in ("left", "right") and role == "image" else ""
    return folder + slash + stem, role if stem else ""  # no stem: .DS_Store, ._0001.jpg


def _members(file: BinaryIO, path: str, offset: int) -> Iterator[_Member]:
    """Every member in order, from byte `offset` on, where one begins.

    Raises `_EndsEarlyError` where the archive stops being one.
    """
    end = storage.file_size(file)
    start = offset
    long_name: str | None = None
    pax: dict[str, Any] = {}
    while True:
        header = _read_header(file, offset, path)
        if header is None:
            if end - offset > _LONGEST_PADDING:  # archives joined by cat, or a download with a hole
                reason = f"end mark at byte {offset}, yet {end - offset} bytes follow"
                raise _EndsEarlyError(reason, goes_on=True)
            return
        payload = offset + _BLOCK
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            pax = _parse_pax(_read_extension(file, payload, header.size, end))
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            extension = _read_extension(file, payload, header.size, end)
            long_name = extension.rstrip(b"\0").decode("utf-8", "backslashreplace")
        elif header.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            header.size = int(pax.get("size", header.size)) if header.isreg() else 0
            if not 0 <= header.size <= end - payload:
                left = max(0, end - payload)
                raise _EndsEarlyError(f"{header.name} needs {header.size} bytes, {left} are left")
            is_sparse = header.type == tarfile.GNUTYPE_SPARSE or "GNU.sparse.major" in pax
            if not header.isdir():
                name = pax.get("path") or long_name or header.name
                yield _Member(name, start, payload, header.size, header.isreg() and not is_sparse)
            long_name, pax = None, {}
            start = payload + -(-header.size // _BLOCK) * _BLOCK
        offset = payload + -(-header.size // _BLOCK) * _BLOCK


def _read_header(file: BinaryIO, offset: int, path: str) -> tarfile.TarInfo | None:
    """The header at `offset`, None at the archive's end mark."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if not block and offset == 0:
        raise _EndsEarlyError("the file is empty")
    if len(block) == _BLOCK and not any(block):
        return None
    try:
        return _plain_header(block) or tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError as error:
        if offset == 0:
            for magic, compression in _COMPRESSED.items():
                if block.startswith(magic):
                    what = f"compressed with {compression}; decompress it first, shards must be plain tar"
                    raise SourceError(f"{path}: {what}") from error
            raise _EndsEarlyError(f"not a tar archive ({error})") from error
        raise _EndsEarlyError(f"no archive end mark, {error} at byte {offset}") from error


def _plain_header(block: bytes) -> tarfile.TarInfo | None:
    """The header of a plain file with a short name, as `tarfile` parses it but in a third of the time; else None."""
    if len(block) < _BLOCK or block[156] != tarfile.REGTYPE[0] or block[345] or not block[0]:
        return None
    size, checksum = block[124:135], block[148:154]
    if (size + checksum).strip(b"01234567") or block[135] not in b"\0 " or block[154] not in b"\0 ":
        return None
    if int(checksum, 8) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return None
    header = tarfile.TarInfo(block[:100].partition(b"\0")[0].decode("utf-8", "backslashreplace"))
    header.size = int(size, 8)
    return header


def _read_extension(file: BinaryIO, offset: int, size: int, end: int) -> bytes:
    if not 0 <= size <= _LONG_NAMES_LIMIT or offset + size > end:
        raise _EndsEarlyError(f"extended header of {size} bytes at byte {offset}")
    file.seek(offset)
    return file.read(size)


def _parse_pax(data: bytes) -> dict[str, Any]:
    """The `length key=value` lines of a POSIX extended header that matter here."""
    fields: dict[str, Any] = {}
    while data and data[:1] != b"\0":
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            raise _EndsEarlyError("a damaged extended header")
        keyword, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        data = data[int(length) :]
    if "size" in fields and not fields["size"].isdigit():
        raise _EndsEarlyError("a damaged extended header")
    return fields
