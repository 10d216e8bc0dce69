"""Tar shards as webdataset and img2dataset write them: members that follow each other and share a key are one sample.

A sample is an image (`KEY.jpg`), two images (`KEY.left.jpg` and `KEY.right.jpg`) or a video (`KEY.mp4`), with its texts
in `KEY.json` or `KEY.txt`. Nothing is ever extracted, so a member's name is only a key, whatever path it claims.

webdataset ends the key at the first dot, so `img.v1.jpg` and `img.v2.jpg` have one key there. Here they are samples
with the texts of their own names; without texts and beside an `img.jpg` they are further fields of its sample, which
nobody uses. One image and one text of one webdataset key are a sample under any names: `s0.input.jpg` and
`s0.outputs.txt` are `s0`.

`tarfile` silently stops at a damaged header, which would lose samples: only its header parser is used, and what ends a
shard early becomes a reject. webdataset raises for a repeated file, and splits a sample whose files lie apart.
"""

import io
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, BinaryIO, NamedTuple

from openblip.data import sample as samples
from openblip.data.sample import Located, Reject, Sample, Selection, Source
from openblip.data.sources import storage
from openblip.errors import SourceError

_BLOCK = tarfile.BLOCKSIZE
_PLAIN_HEADER = re.compile(  # of a file with a short name
    rb"(?s)(?P<name>[^\0].{99}).{24}(?P<size>[0-7]{11})[\0 ].{12}(?P<checksum>[0-7]{6})[\0 ].0.{188}\0.{166}"
)
_LONGEST_PADDING = 1 << 20  # writers fill up to a record, 10 KiB unless asked otherwise
_OUTLINES_KEPT = 64  # shards whose samples a process remembers the places of
_MOST_DIGITS = 20  # of a number in an extended header
_LONG_NAMES_LIMIT = 16 << 20  # a longer extended header is damage, not a name
_APART = -1  # the place of a sample that is a run of its own
_LONGEST_RUN = 64  # members: beyond it what has one webdataset key is many samples, such as all of `laion.00042.jpg`


class _EndsEarlyError(Exception):
    """The archive is damaged or cut here, as the message says."""

    def __init__(self, reason: str, *, goes_on: bool = False) -> None:
        super().__init__(reason)
        self.goes_on = goes_on  # there is more after the archive's end mark, so the samples before it are whole
        self.num_samples = 0  # whole ones before it


class _Member(NamedTuple):
    """One file in a tar: where its headers begin, and where its payload lies."""

    name: str
    start: int
    offset: int
    size: int
    is_file: bool


@dataclass
class _Group:
    """The members of one sample, by their role: "image", "left", "right", "video", or the kind of a text."""

    key: str
    start: int  # the byte at which its first header begins, or that of the first sample of its run
    place: int = 0  # among the samples of its run; `_APART` where it is a run of its own
    number: int = 0
    is_repeat: bool = False  # an earlier sample has its key
    members: dict[str, _Member] = field(default_factory=dict)
    repeats: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)

    def add(self, role: str, member: _Member) -> None:
        if not member.is_file:
            self.links.append(member.name)
        elif self.members.setdefault(role, member) is not member:
            self.repeats[role] += 1

    @property
    def has_image(self) -> bool:
        return bool(self.members.keys() - set(samples.TEXT_SUFFIXES) or self.links)

    @property
    def has_text(self) -> bool:
        return not self.members.keys().isdisjoint(samples.TEXT_SUFFIXES)

    def examine(self) -> tuple[list[_Member], list[str]]:
        """The sample's image or video, or its left and right image, or none; and all that is wrong with the group."""
        reasons = [f"{name} is a link or special file, not a plain one" for name in self.links]
        roles = self.members.keys()
        images: list[str] = []
        if self.is_repeat and roles:
            return [], [*reasons, "duplicate key: the first one stays; files of a sample must not lie apart"]
        reasons += ["duplicate key: the first one stays"] * max(self.repeats.values(), default=0)
        if "image" in roles:
            images = ["image"]
            if roles & {"left", "right", "video"}:
                reasons.append("several images with this key: the plain image stays")
        elif roles >= {"left", "right"}:
            images = ["left", "right"]
            if "video" in roles:
                reasons.append("two images and a video with this key: the images stay")
        elif roles & {"left", "right"}:
            present, lacking = ("left", "right") if "left" in roles else ("right", "left")
            reasons.append(f"of two images the {lacking} one is missing, there is only the {present} one")
        elif "video" in roles:
            images = ["video"]
        elif roles:
            reasons.append("no image or video with this key, only a text; it must be named as its image is")
        return [self.members[role] for role in images], reasons


@dataclass
class TarSource(Source):
    """A list of tar files, one shard each."""

    name: str
    paths: dict[str, str] = field(repr=False)
    unused: dict[str, Counter[str]] = field(default_factory=dict, repr=False)
    caption_field: str | None = None  # of the json files
    option_names = frozenset({"caption_column"})

    def shards(self) -> Sequence[str]:
        return list(self.paths)

    def file_name(self, shard: str) -> str:
        return os.path.basename(self.paths[shard])

    def file_state(self, shard: str) -> Mapping[str, Any]:
        return storage.file_state(self.paths[shard])

    def is_self_contained(self, shard: str) -> bool:
        return True

    def num_samples(self, shard: str) -> int | None:
        """What img2dataset's `00000_stats.json` beside `00000.tar` says, if there is one."""
        path = f"{self.paths[shard].removesuffix('.tar')}_stats.json"
        with suppress(SourceError):
            count = storage.read_object(path).get("successes")
            return count if isinstance(count, int) else None
        return None

    def read_selected(self, shard: str, selection: Selection) -> Iterator[Located]:
        path = self.paths[shard]
        opener = storage.open_copied if selection.pieces[1] > 1 else storage.open_binary
        try:
            with storage.source_errors(path, keep_transient=True), opener(path) as file:
                unused = self.unused[shard] = Counter[str]()
                for group in _wanted_groups(file, path, selection, unused):
                    for item in self._items(file, shard, group, selection):
                        yield Located(group.number, item)
        except _EndsEarlyError as stop:
            if not stop.num_samples:
                raise SourceError(f"{path}: nothing of this shard can be read: {stop}") from stop
            if selection.has(stop.num_samples):
                reject = Reject(shard, "", f"the shard ends early, the rest is lost: {stop}")
                yield Located(stop.num_samples, reject)

    def _items(self, file: BinaryIO, shard: str, group: _Group, selection: Selection) -> Iterator[Sample | Reject]:
        """What a group of members is: a sample, rejects, or both."""
        key = group.key
        members, reasons = group.examine()
        for reason in reasons:
            yield Reject(shard, key, reason)
        if not members:
            return
        try:
            texts = {
                kind: _payload(file, group.members[kind], samples.MOST_TEXT_BYTES)
                for kind in samples.TEXT_SUFFIXES
                if kind in group.members
            }
            sample = samples.sample_of_texts(self.name, shard, key, texts, self.caption_field)
            if selection.skips(sample):
                return
            if selection.images:
                limit = None if "video" in group.members else storage.MOST_FILE_BYTES
                image, *second = (_payload(file, member, limit) for member in members)
                sample = replace(sample, image=image, second_image=next(iter(second), None))
            yield sample
        except SourceError as error:
            yield Reject(shard, key, str(error))


def _payload(file: BinaryIO, member: _Member, limit: int | None) -> bytes:
    if limit is not None and member.size > limit:
        raise SourceError(f"{member.name}: {member.size} bytes, more than the limit of {limit}")
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) != member.size:
        raise SourceError(f"{member.name} ends early: {member.size} bytes wanted, {len(data)} read")
    return data


def _wanted_groups(file: BinaryIO, path: str, selection: Selection, unused: Counter[str]) -> Iterator[_Group]:
    """The samples that are wanted; raises as `_groups` does."""
    if selection.pieces[1] == 1 or not isinstance(file, io.BufferedReader):
        yield from (group for group in _groups(file, path, unused) if selection.has(group.number))
        return
    state = os.fstat(file.fileno())
    outline = _outline(file.name, path, (state.st_size, state.st_mtime_ns))
    unused.update(outline.unused)
    for number in filter(selection.has, range(len(outline.starts))):
        place = outline.places[number]
        run = _groups(file, path, Counter(), outline.starts[number], apart=place == _APART)
        group = next(islice(run, max(place, 0), None))
        yield replace(group, number=number, is_repeat=number in outline.repeats)
    if outline.stop is not None:
        raise outline.stop.with_traceback(None)


@dataclass
class _Outline:
    """What is remembered of a shard that is read in pieces."""

    starts: "array[int]" = field(default_factory=lambda: array("Q"))  # `start` of each sample
    places: "array[int]" = field(default_factory=lambda: array("h"))  # `place` of each sample
    repeats: set[int] = field(default_factory=set)  # the numbers of those that repeat a key
    unused: Counter[str] = field(default_factory=Counter)
    stop: _EndsEarlyError | None = None


@lru_cache(_OUTLINES_KEPT)
def _outline(file_name: str, path: str, version: object) -> _Outline:
    """The outline of a local shard; another `version` of the file is read anew."""
    outline = _Outline()
    try:
        with open(file_name, "rb") as file:
            for group in _groups(file, path, outline.unused):
                outline.starts.append(group.start)
                outline.places.append(group.place)
                if group.is_repeat:
                    outline.repeats.add(group.number)
    except _EndsEarlyError as stop:
        outline.stop = stop
    return outline


def _groups(
    file: BinaryIO, path: str, unused: Counter[str], start: int | None = None, *, apart: bool = False
) -> Iterator[_Group]:
    """The samples of a shard, or those from byte `start` on, where a run begins; raises `_EndsEarlyError`. The members
    that no sample has are counted in `unused` by their endings.
    """
    first: _Group | None = None  # that has any member
    keys: set[str] = set()
    number = 0
    for run in _runs(file, path, unused, start or 0, apart):
        groups = run.samples(unused)
        if run.stop is not None and groups and start is None and not run.stop.goes_on:
            # Where a shard was cut, the sample that was being written lacks a file that the first one has.
            last, whole = groups[-1], first or (groups[0] if len(groups) > 1 else None)
            if not (len(last.members) > 1 if whole is None else last.members.keys() >= whole.members.keys()):
                groups.pop()
        for group in groups:
            group.number, group.is_repeat = number, group.key in keys
            yield group
            number += 1
            if group.members:
                first = first or group
                keys.add(group.key)
        if run.stop is not None:
            run.stop.num_samples = number
            raise run.stop


@dataclass
class _Run:
    """Members that follow each other and have one webdataset key, or, `apart`, one name before the ending."""

    key: str = ""
    apart: bool = False
    members: list[tuple[str, str, _Member]] = field(default_factory=list)  # each after its name and role
    has_plain: bool = False  # an image or video is named as the key
    stop: _EndsEarlyError | None = None  # what ended the shard in this run

    def samples(self, unused: Counter[str]) -> list[_Group]:
        """The samples, in the order of their first members."""
        groups: dict[str, _Group] = {}  # by name
        for name, role, member in self.members:
            if name not in groups:
                groups[name] = _Group(name, member.start, _APART if self.apart else 0)
            groups[name].add(role, member)
        if len(groups) < 2:
            return list(groups.values())
        joined = _join(groups, self.key, unused)
        return [replace(g, start=self.members[0][2].start, place=place) for place, g in enumerate(joined)]


def _join(groups: Mapping[str, _Group], key: str, unused: Counter[str]) -> list[_Group]:
    """The samples of several names with one webdataset key, as the head of this file says."""
    images = {name: group for name, group in groups.items() if group.has_image}
    texts = {name: group for name, group in groups.items() if not group.has_image}
    plain = images.get(key)
    main = plain or (next(iter(images.values())) if len(images) == 1 else None)
    if main is None:
        return list(groups.values())
    kept, dropped = dict(groups), dict[str, _Group]()
    roles = [role for group in texts.values() for role in group.members]
    if main.has_text:
        dropped = {**texts} if plain else {}
    elif texts and len(roles) == len({*roles}):  # else nothing tells which text is meant
        main.key = key
        for name in texts:
            text = kept.pop(name)
            main.members |= text.members
            main.repeats += text.repeats
    if plain:
        dropped |= {name: group for name, group in images.items() if group is not plain and not group.has_text}
    unused.update(
        f".{member.name.rpartition('/')[2].partition('.')[2].lower()}"
        for group in dropped.values()
        for member in group.members.values()
    )
    return [group for name, group in kept.items() if name not in dropped]


def _runs(file: BinaryIO, path: str, unused: Counter[str], start: int, apart: bool) -> Iterator[_Run]:
    """The members of a shard from byte `start` on; the last run has the error that ended the shard."""
    run = _Run(apart=apart)
    try:
        for member in _members(file, path, start):
            key, name, role = _split_name(member.name)
            if not role:
                unused[samples.ending_of(member.name)] += 1
                continue
            is_same_name = not run.members or run.members[-1][0] == name
            if run.members and (run.key != key or (run.apart and not is_same_name)):
                yield run
                run = _Run(apart=run.apart and run.key == key)
            elif len(run.members) >= _LONGEST_RUN and not (run.has_plain or is_same_name):
                for _, members in groupby(run.members, key=itemgetter(0)):
                    yield _Run(key, True, list(members))
                run = _Run(apart=True)
            run.key = key
            run.members.append((name, role, member))
            run.has_plain |= name == key and role not in samples.TEXT_SUFFIXES
    except _EndsEarlyError as stop:
        run.stop = stop
    if run.members or run.stop:
        yield run


def _split_name(name: str) -> tuple[str, str, str]:
    """(webdataset's key, which ends at the first dot; the name before its ending; the role, empty without one)."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, ending = base.rpartition(".")
    role = "" if samples.is_hidden(name) else samples.file_kind(ending.lower())
    before, _, side = stem.rpartition(".")
    if role == "image" and before and side.lower() in ("left", "right"):
        stem, role = before, side.lower()
    return folder + slash + base.partition(".")[0], folder + slash + stem, role


def _members(file: BinaryIO, path: str, offset: int) -> Iterator[_Member]:
    """Every member from byte `offset` on, where one begins; raises `_EndsEarlyError`."""
    end = storage.file_size(file)
    start = offset
    long_name: str | None = None
    pax: dict[str, Any] = {}
    while (header := _read_header(file, offset, path)) is not None:
        payload = offset + _BLOCK
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if not 0 <= header.size <= _LONG_NAMES_LIMIT or payload + header.size > end:
                raise _EndsEarlyError(f"extended header of {header.size} bytes at byte {payload}")
            file.seek(payload)
            extension = file.read(header.size)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = extension.rstrip(b"\0").decode("utf-8", "backslashreplace")
            else:
                pax = _parse_pax(extension)
        elif header.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            header.size = int(pax.get("size", header.size)) if header.isreg() else 0
            if not 0 <= header.size <= end - payload:
                raise _EndsEarlyError(f"{header.name} needs {header.size} bytes, {max(0, end - payload)} are left")
            is_sparse = header.type == tarfile.GNUTYPE_SPARSE or "GNU.sparse.major" in pax
            if not header.isdir():
                name = pax.get("path") or long_name or header.name
                yield _Member(name, start, payload, header.size, header.isreg() and not is_sparse)
            long_name, pax = None, {}
            start = payload + -(-header.size // _BLOCK) * _BLOCK
        offset = payload + -(-header.size // _BLOCK) * _BLOCK
    if end - offset > _LONGEST_PADDING:  # archives joined by cat, or a download with a hole
        raise _EndsEarlyError(f"end mark at byte {offset}, yet {end - offset} bytes follow", goes_on=True)


def _read_header(file: BinaryIO, offset: int, path: str) -> tarfile.TarInfo | None:
    """The header at `offset`, None at the end mark. The usual one is parsed as by `tarfile`, in a third of the time."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if not block and offset == 0:
        raise _EndsEarlyError("the file is empty")
    if len(block) == _BLOCK and not any(block):
        return None
    plain = _PLAIN_HEADER.fullmatch(block)
    if plain is not None and int(plain["checksum"], 8) == sum(block) - sum(block[148:156]) + 8 * ord(" "):
        header = tarfile.TarInfo(plain["name"].partition(b"\0")[0].decode("utf-8", "backslashreplace"))
        header.size = int(plain["size"], 8)
        return header
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError as error:
        if offset > 0:
            raise _EndsEarlyError(f"no archive end mark, {error} at byte {offset}") from error
        raise _EndsEarlyError(f"not a tar archive, {storage.describe_content(block) or error}") from error


def _parse_pax(data: bytes) -> dict[str, Any]:
    """The `length key=value` lines of a POSIX extended header that matter here."""
    fields: dict[str, Any] = {}
    while data and data[:1] != b"\0":
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or len(length) > _MOST_DIGITS or not 0 < int(length) <= len(data):
            raise _EndsEarlyError("a damaged extended header")
        keyword, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        data = data[int(length) :]
    size = fields.get("size", "0")
    if not (size.isascii() and size.isdigit() and len(size) <= _MOST_DIGITS):
        raise _EndsEarlyError("a damaged extended header")
    return fields
