"""Tar shards as webdataset and img2dataset write them: members that share a key are one sample.

A sample is a picture (`KEY.jpg`), two pictures (`KEY.left.jpg` and `KEY.right.jpg`) or a clip (`KEY.mp4`),
with its texts in `KEY.json` or `KEY.txt`.

Shards are indexed by walking headers and skipping payloads; nothing is ever extracted, so a member's name is
only a key, whatever path it claims. `tarfile` itself silently stops at a damaged header, which would lose
samples unnoticed: here only its header parser is used, and whatever ends a shard early becomes a reject.
"""

import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from openblip.data.sample import (
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    VIDEO_SUFFIXES,
    Record,
    Reject,
    Sample,
    ShardIndex,
    parse_texts,
    sample_image_id,
)
from openblip.data.sources import storage
from openblip.errors import SourceError

_BLOCK = tarfile.BLOCKSIZE
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
_LONGEST_PADDING = 1 << 20  # writers fill up to a record, 10 KiB unless asked otherwise
_LONG_NAMES_LIMIT = 1 << 20  # a longer extended header is damage, not a name


class _EndsEarly(Exception):
    """The archive is damaged or cut here; the message is the reject's reason."""


class _GoesOn(_EndsEarly):
    """There is more after the archive's end mark, so the samples before it are whole."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a tar: where its payload lies."""

    name: str
    offset: int
    size: int
    is_file: bool


@dataclass(frozen=True, slots=True)
class TarRecord:
    """A sample's payload ranges; `texts` maps `json` and `txt` to theirs. `second_image` is the right one of
    two pictures.
    """

    source: str
    path: str
    shard: str
    key: str
    image: tuple[int, int]
    texts: tuple[tuple[str, int, int], ...]
    second_image: tuple[int, int] | None = None

    def read(self) -> Sample:
        where = f"{self.shard}/{self.key}"
        second = None if self.second_image is None else storage.read_range(self.path, *self.second_image)
        payloads = {kind: storage.read_range(self.path, offset, size) for kind, offset, size in self.texts}
        info, captions = parse_texts(payloads, where)
        return Sample(
            key=self.key,
            shard=self.shard,
            image=storage.read_range(self.path, *self.image),
            captions=captions,
            image_id=sample_image_id(self.source, self.shard, self.key, info),
            info=info,
            second_image=second,
        )


@dataclass(slots=True)
class TarSource:
    """A list of tar files, one shard each."""

    name: str
    paths: dict[str, str] = field(repr=False)

    @classmethod
    def open(cls, spec: str, paths: list[str]) -> "TarSource":
        return cls(name=spec, paths=storage.shard_names(paths))

    def shards(self) -> Sequence[str]:
        return list(self.paths)

    def index(self, shard: str) -> ShardIndex:
        try:
            with storage.open_binary(self.paths[shard]) as file:
                return _index(file, self.name, self.paths[shard], shard)
        except OSError as error:
            raise SourceError(f"{self.paths[shard]}: cannot be read: {error}") from error


def _index(file: BinaryIO, source: str, path: str, shard: str) -> ShardIndex:
    samples: dict[str, dict[str, Member]] = {}
    repeats: dict[str, Counter[str]] = defaultdict(Counter)
    rejects: list[Reject] = []
    ends_early: Reject | None = None
    last_key = ""
    try:
        for member in _walk(file, path):
            key, slot = _split_name(member.name)
            if not slot:
                continue
            if not member.is_file:
                rejects.append(
                    Reject(shard, key, f"{member.name} is a link or special file, not a plain one")
                )
                continue
            last_key = key
            if samples.setdefault(key, {}).setdefault(slot, member) is not member:
                repeats[key][slot] += 1
    except _EndsEarly as stop:
        ends_early = Reject(shard, "", f"the shard ends early, the rest is lost: {stop}")
        if samples and not isinstance(stop, _GoesOn) and _is_partial(samples, last_key):
            del samples[last_key]
    records: list[Record] = []
    for key, members in samples.items():
        # One reject per repeated sample, however many files it repeats.
        rejects += [Reject(shard, key, "duplicate key: the first one stays")] * max(
            repeats[key].values(), default=0
        )
        image, reason = _choose_image(members)
        if reason:
            rejects.append(Reject(shard, key, reason))
        if image is None:
            continue
        texts = tuple((kind, m.offset, m.size) for kind, m in members.items() if kind in TEXT_SUFFIXES)
        second = (members["right"].offset, members["right"].size) if image is members.get("left") else None
        records.append(TarRecord(source, path, shard, key, (image.offset, image.size), texts, second))
    if ends_early:
        rejects.append(ends_early)
    return ShardIndex(records, rejects)


def _choose_image(members: dict[str, Member]) -> tuple[Member | None, str]:
    """Which member is the sample's image (`left` of two), None where there is none, and what there is to say
    against it.
    """
    if "image" in members:
        others = members.keys() & {"left", "right", "clip"}
        return members["image"], "several images with this key: the plain picture stays" if others else ""
    if "left" in members and "right" in members:
        others = members.keys() & {"clip"}
        return members["left"], "two pictures and a clip with this key: the pictures stay" if others else ""
    if "left" in members or "right" in members:
        found, lacking = ("left", "right") if "left" in members else ("right", "left")
        return None, f"of two pictures the {lacking} one is missing, there is only the {found} one"
    if "clip" in members:
        return members["clip"], ""
    return None, "no image (jpg, jpeg, png or webp) or clip (mp4, webm, mkv, avi, mov or m4v) with this key"


def _is_partial(samples: dict[str, dict[str, Member]], last_key: str) -> bool:
    """Whether the sample being written where a shard was cut lacks a file that the shard's first sample
    has.
    """
    first_key = next(iter(samples))
    if last_key == first_key:
        return len(samples[last_key]) < 2
    return not samples[last_key].keys() >= samples[first_key].keys()


def _split_name(name: str) -> tuple[str, str]:
    """(key, slot) by webdataset's rule: the key ends at the first dot of the base name. No slot: not ours."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, _slot(suffix.lower()) if stem else ""  # no stem: .DS_Store, ._0001.jpg


def _slot(suffix: str) -> str:
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in VIDEO_SUFFIXES:
        return "clip"
    side, _, kind = suffix.partition(".")
    if side in ("left", "right") and kind in IMAGE_SUFFIXES:
        return side
    return suffix if suffix in TEXT_SUFFIXES else ""


def _walk(file: BinaryIO, path: str) -> Iterator[Member]:
    """Every member in order. Raises `_EndsEarly` where the archive stops being one."""
    end = storage.file_size(file)
    offset = 0
    long_name: str | None = None
    pax: dict[str, Any] = {}
    while True:
        header = _read_header(file, offset, path)
        if header is None:
            if end - offset > _LONGEST_PADDING:  # archives joined by cat, or a download with a hole
                raise _GoesOn(f"end mark at byte {offset}, yet {end - offset} bytes follow")
            return
        payload = offset + _BLOCK
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            pax = _parse_pax(_read_extension(file, payload, header.size, end))
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            long_name = (
                _read_extension(file, payload, header.size, end)
                .rstrip(b"\0")
                .decode("utf-8", "backslashreplace")
            )
        elif header.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            header.size = int(pax.get("size", header.size)) if header.isreg() else 0
            if not 0 <= header.size <= end - payload:
                raise _EndsEarly(f"{header.name} needs {header.size} bytes, {max(0, end - payload)} are left")
            is_sparse = header.type == tarfile.GNUTYPE_SPARSE or "GNU.sparse.major" in pax
            if not header.isdir():
                name = pax.get("path") or long_name or header.name
                yield Member(name, payload, header.size, is_file=header.isreg() and not is_sparse)
            long_name, pax = None, {}
        offset = payload + -(-header.size // _BLOCK) * _BLOCK


def _read_header(file: BinaryIO, offset: int, path: str) -> tarfile.TarInfo | None:
    """The header at `offset`, None at the archive's end mark."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if not block and offset == 0:
        raise _EndsEarly("the file is empty")
    if len(block) == _BLOCK and not any(block):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError as error:
        if offset == 0:
            for magic, compression in _COMPRESSED.items():
                if block.startswith(magic):
                    what = f"compressed with {compression}; decompress it first, shards must be plain tar"
                    raise SourceError(f"{path}: {what}") from error
            raise _EndsEarly(f"not a tar archive ({error})") from error
        raise _EndsEarly(f"no archive end mark, {error} at byte {offset}") from error


def _read_extension(file: BinaryIO, offset: int, size: int, end: int) -> bytes:
    if not 0 <= size <= _LONG_NAMES_LIMIT or offset + size > end:
        raise _EndsEarly(f"extended header of {size} bytes at byte {offset}")
    file.seek(offset)
    return file.read(size)


def _parse_pax(data: bytes) -> dict[str, Any]:
    """The `length key=value` lines of a POSIX extended header that matter here."""
    found: dict[str, Any] = {}
    while data and data[:1] != b"\0":
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            raise _EndsEarly("a damaged extended header")
        keyword, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        found[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        data = data[int(length) :]
    if "size" in found and not found["size"].isdigit():
        raise _EndsEarly("a damaged extended header")
    return found
